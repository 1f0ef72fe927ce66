"""Marks of readings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastldm.scenes import Scene, SceneObject
from fastldm.scenes.judge import Reading, Seen
from fastldm.scenes.marks import is_exact, objects_right

RED = SceneObject("fish", "red", "medium", (10, 10, 60, 50))
BLUE = SceneObject("star", "blue", "medium", (70, 60, 120, 110))
SCENE = Scene((RED, BLUE), "white")


def read(*objects: Seen) -> Reading:
    return Reading(objects, "white", None, "flat")


def seen(thing: SceneObject, **facts: object) -> Seen:
    return replace(Seen(thing.kind, thing.colour, thing.box, 1.0), **facts)


@pytest.mark.parametrize(
    ("reading", "right", "exact"),
    [
        (read(seen(BLUE), seen(RED)), 2, True),
        (read(seen(RED)), 1, False),
        (read(seen(RED), seen(BLUE), seen(BLUE)), 2, False),
        (read(seen(RED), seen(BLUE, colour="red")), 1, False),
        (read(seen(RED), seen(BLUE, kind=None)), 1, False),
        (read(seen(RED), seen(BLUE, box=(20, 60, 70, 110))), 1, True),
        (read(seen(RED, colour="blue"), seen(BLUE, colour="red")), 0, False),
        (read(), 0, False),
    ],
    ids=["all", "one", "one too many", "colour", "unreadable", "elsewhere", "swapped", "nothing"],
)
def test_marks(reading: Reading, right: int, exact: bool) -> None:
    assert objects_right(reading, SCENE) == right
    assert is_exact(reading, SCENE) == exact
