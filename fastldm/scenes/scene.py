"""Scenes as data, and how to draw one by lot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from fastldm.errors import InvalidArgument
from fastldm.scenes.palette import (
    ALL_PAIRS,
    COLOURS,
    HELD_OUT_PAIRS,
    HELD_OUT_TRIPLES,
    IMAGE_SIZE,
    LANDSCAPES,
    POSITIONS,
    RELATIONS,
    SIZES,
    SKIES,
    STYLES,
    unfit_colours,
)
from fastldm.scenes.silhouettes import posed
from fastldm.scenes.sprites import sprite_extent

MARGIN = 4
"""Pixels that stay free between an object and the edge of the picture, and between two objects."""

MAX_ANGLE = 8.0
MAX_STRETCH = 0.05

BLOCK = 4
"""Side in pixels of the blocks that pixel art is made of; its objects fill whole ones."""

_T = TypeVar("_T")
Box = tuple[float, float, float, float]


class Placed:
    """What has a box in the picture: x0, y0, x1, y1 in pixels."""

    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    @property
    def position(self) -> str | None:
        """The word of POSITIONS for where it stands, or None between the clear cases."""
        return position_of(self.box)


@dataclass(frozen=True)
class SceneObject(Placed):
    """One object; the turned, mirrored silhouette fills `box` (x0, y0, x1, y1; pixels) exactly."""

    kind: str
    colour: str
    size: str
    box: Box
    angle: float = 0.0
    mirror: bool = False


@dataclass(frozen=True)
class Scene:
    """What a picture shows; objects never overlap.

    `background` is a colour of the palette, or one of LANDSCAPES with `sky` one of SKIES. InvalidArgument for
    other names.
    """

    objects: tuple[SceneObject, ...]
    background: str
    style: str = "flat"
    sky: str | None = None

    def __post_init__(self) -> None:
        _check_names(self.background, self.sky, self.style)
        if self.sky is None and self.background in LANDSCAPES:
            raise InvalidArgument("sky", self.sky, f"{', '.join(SKIES)} over a landscape")


def _check_names(background: str | None, sky: str | None, style: str) -> None:
    for name, value, choices in (
        ("background", background, COLOURS + LANDSCAPES),
        ("sky", sky, SKIES),
        ("style", style, STYLES),
    ):
        if value is not None and value not in choices:
            raise InvalidArgument(name, value, ", ".join(choices))
    if sky is not None and background in COLOURS:
        raise InvalidArgument("sky", sky, "None unless the background is a landscape")


def snapped(thing: SceneObject) -> SceneObject:
    """The object upright, its box on the blocks of pixel art; those MARGIN apart stay a block apart."""
    x0, y0, x1, y1 = (math.floor(side / BLOCK + 0.5) * BLOCK for side in thing.box)
    return replace(thing, box=(x0, y0, x1, y1), angle=0.0)


def position_of(box: Box) -> str | None:
    """The word of POSITIONS for a box in the picture, or None between the clear cases.

    Offsets are fractions of the room that an object of this size has, so a large object can be `left` too.
    """
    x0, y0, x1, y1 = box
    room = IMAGE_SIZE - 2 * MARGIN
    u = (x0 + x1 - IMAGE_SIZE) / max(room - (x1 - x0), 1)
    v = (y0 + y1 - IMAGE_SIZE) / max(room - (y1 - y0), 1)
    if max(abs(u), abs(v)) <= 0.4:
        return "centre"
    if abs(u) >= 0.5 and abs(v) <= 0.4:
        return "left" if u < 0 else "right"
    if abs(v) >= 0.5 and abs(u) <= 0.4:
        return "top" if v < 0 else "bottom"
    return None


def size_of(box: Box) -> str:
    """The word of SIZES whose range lies nearest to the longer side of a box."""
    side = max(box[2] - box[0], box[3] - box[1])
    return min(SIZES, key=lambda size: max(SIZES[size][0] - side, side - SIZES[size][1]))


def relation(first: Placed, second: Placed) -> str | None:
    """The word of RELATIONS for first to second, or None when they stand on a diagonal."""
    dx, dy = (a - b for a, b in zip(first.centre, second.centre, strict=True))
    if max(abs(dx), abs(dy)) < 1.5 * min(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def is_held_out(scene: Scene) -> bool:
    """True when the scene shows a pair or a triple that training must not see."""
    if any((thing.kind, thing.colour) in HELD_OUT_PAIRS for thing in scene.objects):
        return True
    return any(
        (first.kind, relation(first, second), second.kind) in HELD_OUT_TRIPLES
        for i, first in enumerate(scene.objects)
        for second in scene.objects[:i]
    )


def sample_scene(
    rng: np.random.Generator,
    count: int = 1,
    *,
    alike: bool = False,
    kind: str | None = None,
    colour: str | None = None,
    background: str | None = None,
    sky: str | None = None,
    style: str = "flat",
    size: str | None = None,
    position: str | None = None,
    related: str | None = None,
    held_out: bool = False,
    arranged: bool = False,
) -> Scene:
    """A scene of `count` objects (1 to 4) with the given facts fixed and all others drawn by lot.

    `alike` gives all objects one kind and colour. `kind`, `colour`, `size` hold for the first object,
    `position` for a single one; `related` is the relation of the first of two objects to the second.
    `arranged` puts objects where one would expect them: one in the middle and large, several of medium size
    side by side, in a triangle or in a square; then no size or position can be given. The background is plain
    unless it is a landscape or a `sky` is given: then the other is drawn by lot. Scenes are fit for training
    unless `held_out`, which makes the first object a pair of HELD_OUT_PAIRS. InvalidArgument when nothing
    fits.
    """
    if not 1 <= count <= 4:
        raise InvalidArgument("count", count, "1 to 4")
    if position is not None and count != 1:
        raise InvalidArgument("position", position, "None unless count is 1")
    if related is not None and count != 2:
        raise InvalidArgument("related", related, "None unless count is 2")
    if arranged and (size is not None or position is not None):
        raise InvalidArgument("arranged", True, "False where a size or a position is given")
    for name, value, choices in (
        ("size", size, tuple(SIZES)),
        ("position", position, POSITIONS),
        ("related", related, RELATIONS),
    ):
        if value is not None and value not in choices:
            raise InvalidArgument(name, value, ", ".join(choices))
    _check_names(background, sky, style)
    grounds = [
        ground
        for ground in _grounds(background, sky)
        if colour is None or colour not in unfit_colours(*ground)
    ]
    first_pairs = [
        pair
        for pair in ALL_PAIRS
        if (pair in HELD_OUT_PAIRS) == held_out
        and kind in (None, pair[0])
        and colour in (None, pair[1])
        and any(pair[1] not in unfit_colours(*ground) for ground in grounds)
    ]
    if not first_pairs:
        allowed = f"a pair with held_out={held_out} that differs from its background"
        raise InvalidArgument("kind, colour", (kind, colour), allowed)
    for _ in range(1000):
        ground = grounds[0] if len(grounds) == 1 else _pick(rng, grounds)
        unfit = unfit_colours(*ground)
        firsts = [pair for pair in first_pairs if pair[1] not in unfit]
        if not firsts:
            continue
        pairs = [_pick(rng, firsts)] * count
        if not alike:
            others = [pair for pair in _TRAINING_PAIRS if pair[1] not in unfit]
            pairs[1:] = [_pick(rng, others) for _ in pairs[1:]]
        objects = _place(rng, pairs, size, position, related, style == "pixel", arranged)
        if objects is None:
            continue
        scene = Scene(objects, ground[0], style, ground[1])
        if held_out or not is_held_out(scene):
            return scene
    raise InvalidArgument("related", related, "a relation that training may show between these kinds")


_TRAINING_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT_PAIRS)
_SINGLE_POSITIONS = ("centre",) * 8 + ("left", "right", "top", "bottom") * 3
_SIZES_BY_COUNT = {
    1: tuple(SIZES),
    2: ("small", "medium", "medium"),
    3: ("small", "small", "medium"),
    4: ("small", "small", "small", "medium"),
}


_PLACES = {
    1: ((64, 64),),
    2: ((33, 64), (95, 64)),
    3: ((64, 33), (33, 95), (95, 95)),
    4: ((33, 33), (95, 33), (33, 95), (95, 95)),
}
_ABOVE = ((64, 33), (64, 95))
"""Centres of objects that are arranged; _ABOVE of two in the relations above and below."""


def _places(count: int, related: str | None) -> tuple[tuple[int, int], ...]:
    """Where arranged objects stand, the first of two in this relation to the second."""
    places = _ABOVE if related in ("above", "below") else _PLACES[count]
    return places[::-1] if related in ("right of", "below") else places


def _grounds(background: str | None, sky: str | None) -> list[tuple[str, str | None]]:
    """Every background and sky that agree with what is given; without either the plain ones."""
    if background in COLOURS or (background is None and sky is None):
        return [(name, None) for name in COLOURS if background in (None, name)]
    return [
        (name, over)
        for name in LANDSCAPES
        if background in (None, name)
        for over in SKIES
        if sky in (None, over)
    ]


def _pick(rng: np.random.Generator, items: Sequence[_T]) -> _T:
    return items[int(rng.integers(len(items)))]


def _place(
    rng: np.random.Generator,
    pairs: Sequence[tuple[str, str]],
    size: str | None,
    position: str | None,
    related: str | None,
    in_blocks: bool,
    arranged: bool,
) -> tuple[SceneObject, ...] | None:
    """Objects at places drawn by lot, or None when this draw overlaps or misses what was asked."""
    objects: list[SceneObject] = []
    for i, (kind, colour) in enumerate(pairs):
        if arranged:
            word = "large" if len(pairs) == 1 else "medium"
        else:
            word = size if size is not None and i == 0 else _pick(rng, _SIZES_BY_COUNT[len(pairs)])
        angle = float(rng.uniform(-MAX_ANGLE, MAX_ANGLE))
        mirror = bool(rng.integers(2))
        width, height = _extent(rng, kind, word, angle, mirror)
        if in_blocks and word == "small":
            width, height = (BLOCK * side for side in sprite_extent(kind))
        for _ in range(20):
            if arranged:
                across, along = (middle + rng.uniform(-2, 2) for middle in _places(len(pairs), related)[i])
                x, y = across - width / 2, along - height / 2
            else:
                spot = (position or _pick(rng, _SINGLE_POSITIONS)) if len(pairs) == 1 else None
                u, v = _offset(rng, spot)
                x = (IMAGE_SIZE - width) / 2 + u * ((IMAGE_SIZE - width) / 2 - MARGIN)
                y = (IMAGE_SIZE - height) / 2 + v * ((IMAGE_SIZE - height) / 2 - MARGIN)
            thing = SceneObject(kind, colour, word, (x, y, x + width, y + height), angle, mirror)
            if in_blocks:
                thing = snapped(thing)
            if not any(_overlap(thing, other) for other in objects):
                break
        else:
            return None
        objects.append(thing)
    if related is not None and (len(objects) != 2 or relation(*objects) != related):
        return None
    return tuple(objects)


def _extent(
    rng: np.random.Generator, kind: str, size: str, angle: float, mirror: bool
) -> tuple[float, float]:
    _, low, high = posed(kind, angle, mirror)
    width, height = high - low
    width *= 1 + rng.uniform(-MAX_STRETCH, MAX_STRETCH)
    scale = rng.uniform(*SIZES[size]) / max(width, height)
    return float(width * scale), float(height * scale)


def _offset(rng: np.random.Generator, position: str | None) -> tuple[float, float]:
    """Where in its room an object stands, both in -1 … 1; None means anywhere."""
    if position is None:
        return float(rng.uniform(-1, 1)), float(rng.uniform(-1, 1))
    across, along = float(rng.uniform(-0.2, 0.2)), float(rng.uniform(0.65, 1))
    return {
        "left": (-along, across),
        "right": (along, across),
        "top": (across, -along),
        "bottom": (across, along),
        "centre": (across, float(rng.uniform(-0.2, 0.2))),
    }[position]


def _overlap(a: SceneObject, b: SceneObject) -> bool:
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.box, b.box
    return ax0 < bx1 + MARGIN and bx0 < ax1 + MARGIN and ay0 < by1 + MARGIN and by0 < ay1 + MARGIN
