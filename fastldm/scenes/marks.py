"""What a reading of a picture is worth: objects found, and whether all is as asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

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


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|μ_a − μ_b|² + tr(C_a + C_b − 2 (C_a C_b)^½) of two sets of features [n, d], [m, d], in float64.

    (Heusel et al. 2017, arXiv:1706.08500) It grows as 1 / n when sets are small: compare sets of one size.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    # C_a C_b and its symmetric relative C_a^½ C_b C_a^½ have the same eigenvalues.
    common = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * common
    return float(distance.clamp_min(0))
