"""The mixture of scenes that the shipped model is trained on, in the order in which its world grows."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from fastldm.errors import InvalidArgument
from fastldm.scenes.palette import RELATIONS, SKIES
from fastldm.scenes.scene import Scene, sample_scene

_T = TypeVar("_T")

LAST_STAGE = 4

COUNT_CHANCES = {1: 0.5, 2: 0.26, 3: 0.12, 4: 0.12}
ALIKE = 0.5
"""Chance that two or more objects are of one kind and colour: such scenes teach counting."""
RELATED = 0.5
"""Chance that two unlike objects stand clearly beside or above one another, rather than anywhere."""

STYLE_CHANCES: dict[int, dict[str, float]] = {
    1: {"flat": 1.0},
    2: {"flat": 0.5, "outlined": 0.25, "pixel": 0.25},
    3: {"flat": 0.5, "outlined": 0.25, "pixel": 0.25},
    4: {"flat": 0.4, "outlined": 0.2, "pixel": 0.2, "watercolour": 0.2},
}
LANDSCAPE_CHANCE: dict[int, float] = {1: 0.0, 2: 0.0, 3: 0.4, 4: 0.4}
"""Chance of a landscape, of which all fifteen are equally likely, rather than a plain background."""


def draw_scene(rng: np.random.Generator, stage: int = LAST_STAGE, arranged: float = 0.0) -> Scene:
    """A training scene of a stage: 1 flat and plain, 2 also outlined and pixel, 3 landscapes, 4 watercolour.

    The chances are COUNT_CHANCES, ALIKE, RELATED, STYLE_CHANCES and LANDSCAPE_CHANCE, drawn independently;
    nothing held out is ever shown. `arranged` is the chance of a scene whose objects stand where one expects
    them (see `sample_scene`), unlike pairs in each relation as often: shapes are learnt from such scenes much
    sooner.
    """
    if stage not in STYLE_CHANCES:
        raise InvalidArgument("stage", stage, f"1 to {LAST_STAGE}")
    count = _draw(rng, COUNT_CHANCES)
    alike = count > 1 and bool(rng.random() < ALIKE)
    in_order = arranged > 0 and bool(rng.random() < arranged)
    related = count == 2 and not alike and (bool(rng.random() < RELATED) or in_order)
    style = _draw(rng, STYLE_CHANCES[stage])
    sky = SKIES[int(rng.integers(len(SKIES)))] if rng.random() < LANDSCAPE_CHANCE[stage] else None
    relation = RELATIONS[int(rng.integers(len(RELATIONS)))] if related else None
    return sample_scene(rng, count, alike=alike, style=style, sky=sky, related=relation, arranged=in_order)


def _draw(rng: np.random.Generator, chances: dict[_T, float]) -> _T:
    """A key, each as likely as its value; the values sum to one."""
    steps = np.cumsum(list(chances.values()))[:-1]
    return list(chances)[int(np.searchsorted(steps, rng.random(), side="right"))]
