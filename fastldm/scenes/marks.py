"""What a reading of a picture is worth: objects found, and whether all is as asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from fastldm.scenes.judge import Reading, Seen, overlap
from fastldm.scenes.scene import Scene, SceneObject

Pair = tuple[str | None, str | None]
"""A kind and a colour; None where it may be any."""


def objects_right(reading: Reading, scene: Scene) -> int:
    """How many objects of the scene were read with their kind, their colour and a box of IoU ≥ 0.5."""
    left = list(reading.objects)
    right = 0
    for thing in scene.objects:
        found = next((seen for seen in left if _same(seen, thing)), None)
        if found is not None:
            left.remove(found)
            right += 1
    return right


def is_exact(reading: Reading, scene: Scene) -> bool:
    """Whether kinds and colours read are those of the scene, each as often; boxes may be anywhere."""
    return pairs(reading.objects) == pairs(scene.objects)


def pairs(things: Iterable[Seen | SceneObject]) -> Counter[Pair]:
    """How often each kind in each colour is there."""
    return Counter((thing.kind, thing.colour) for thing in things)


def _same(seen: Seen, thing: SceneObject) -> bool:
    return (seen.kind, seen.colour) == (thing.kind, thing.colour) and overlap(seen.box, thing.box) >= 0.5
