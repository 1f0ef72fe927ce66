"""The closed world of the scenes: its names, its colours and what training never shows."""

from __future__ import annotations

IMAGE_SIZE = 128

KINDS = (
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "house",
    "tree",
    "sun",
    "moon",
    "cloud",
    "boat",
    "car",
    "fish",
    "flower",
    "mushroom",
    "balloon",
)

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 44),
    "orange": (248, 132, 24),
    "yellow": (252, 222, 52),
    "green": (40, 160, 72),
    "blue": (32, 104, 226),
    "purple": (156, 48, 176),
    "white": (250, 250, 250),
    "black": (20, 20, 24),
}
COLOURS = tuple(PALETTE)

STYLES = ("flat", "outlined", "pixel", "watercolour")
LANDSCAPES = ("meadow", "snow", "beach", "sea", "desert")
SKIES = ("day", "sunset", "night")

_COLOURS_OF: dict[str, set[str]] = {
    "meadow": {"green"},
    "snow": {"white"},
    "beach": {"yellow", "blue"},
    "sea": {"blue"},
    "desert": {"yellow", "orange"},
    "day": set(),
    "sunset": {"orange", "purple"},
    "night": {"black"},
}
UNFIT_COLOURS: dict[tuple[str, str], frozenset[str]] = {
    (landscape, sky): frozenset(_COLOURS_OF[landscape] | _COLOURS_OF[sky])
    for landscape in LANDSCAPES
    for sky in SKIES
}
"""The colours that no object has in a landscape under a sky, for parts of the picture look like them."""


def unfit_colours(background: str, sky: str | None) -> frozenset[str]:
    """The colours that no object has on a background: its own, or those of a landscape under its sky."""
    return frozenset({background}) if sky is None else UNFIT_COLOURS[background, sky]


SIZES: dict[str, tuple[float, float]] = {"small": (32, 37), "medium": (48, 58), "large": (76, 88)}
"""Pixels of the longer side of an object's box, per size word."""

POSITIONS = ("left", "right", "top", "bottom", "centre")
RELATIONS = ("left of", "right of", "above", "below")


def _pair_is_held_out(kind: int, colour: int) -> bool:
    """True for 13 of the 128 pairs: no kind loses more than one colour, no colour more than two kinds."""
    return (kind + 3 * colour) % 10 == 0


def _triple_is_held_out(first: int, axis: int, second: int) -> bool:
    """True for 10 % of the triples of two kinds; two of one kind stand anywhere, for counting needs it."""
    return first != second and (first + 3 * second + 5 * axis) % 10 == 0


ALL_PAIRS = tuple((kind, colour) for kind in KINDS for colour in COLOURS)
HELD_OUT_PAIRS = frozenset(
    (kind, colour)
    for k, kind in enumerate(KINDS)
    for c, colour in enumerate(COLOURS)
    if _pair_is_held_out(k, c)
)
"""(kind, colour) pairs that no training scene contains."""

_INVERSE = {"left of": "right of", "above": "below"}
HELD_OUT_TRIPLES = frozenset(
    triple
    for a, first in enumerate(KINDS)
    for b, second in enumerate(KINDS)
    for axis, (relation, inverse) in enumerate(_INVERSE.items())
    if _triple_is_held_out(a, axis, b)
    for triple in ((first, relation, second), (second, inverse, first))
)
"""(kind, relation, kind) triples that no training scene contains; closed under swapping the two objects."""
