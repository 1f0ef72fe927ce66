"""Every word that the shipped model knows. A change here changes the ids of a trained model: retrain it."""

from __future__ import annotations

from fastldm.scenes.palette import COLOURS, KINDS
from fastldm.words import BINS, LABEL, LAYOUT

NOUNS: dict[str, tuple[tuple[str, str], ...]] = {
    kind: ((kind, kind if kind == "fish" else kind + "s"),) for kind in KINDS
} | {
    "circle": (("circle", "circles"), ("disc", "discs")),
    "house": (("house", "houses"), ("home", "homes"), ("cottage", "cottages")),
    "tree": (("tree", "trees"), ("fir tree", "fir trees")),
    "moon": (("moon", "moons"), ("crescent moon", "crescent moons"), ("crescent", "crescents")),
    "boat": (("boat", "boats"), ("sailboat", "sailboats"), ("ship", "ships")),
    "mushroom": (("mushroom", "mushrooms"), ("toadstool", "toadstools")),
}
"""Singular and plural names of each kind, the plain one first."""

COLOUR_WORDS: dict[str, tuple[str, ...]] = {colour: (colour,) for colour in COLOURS} | {
    "purple": ("purple", "violet")
}

SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium sized", "middle sized"),
    "large": ("large", "big", "huge"),
}

POSITION_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "at the left", "on the left side", "to the left"),
    "right": ("on the right", "at the right", "on the right side", "to the right"),
    "top": ("at the top", "near the top", "in the upper part", "in the upper half"),
    "bottom": ("at the bottom", "near the bottom", "in the lower part", "in the lower half"),
    "centre": ("in the centre", "in the center", "in the middle", "at the centre"),
}

RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath", "underneath"),
}

NEAR_PHRASES = ("next to", "beside", "near", "by the side of")
"""Between two objects side by side when their order is not told."""

COUNT_WORDS: dict[int, tuple[str, ...]] = {
    2: ("two", "2", "a pair of", "a couple of"),
    3: ("three", "3"),
    4: ("four", "4"),
}

LEADS = (
    "a picture of",
    "an image of",
    "a drawing of",
    "an illustration of",
    "a photo of",
    "a simple drawing of",
    "picture of",
    "drawing of",
    "a sketch of",
    "an icon of",
    "a scene with",
    "a picture showing",
    "this picture shows",
)

STYLE_LEADS: dict[str, tuple[str, ...]] = {
    "flat": ("a flat drawing of", "a flat picture of", "flat art of"),
    "outlined": ("an outlined drawing of", "an outline drawing of", "a line drawing of"),
    "pixel": ("pixel art of", "a pixel art picture of", "a pixel art drawing of", "a pixelated picture of"),
    "watercolour": (
        "a watercolour of",
        "a watercolour painting of",
        "a watercolor painting of",
        "a watercolour picture of",
    ),
}
STYLE_LABELS: dict[str, tuple[str, ...]] = {
    "flat": ("flat style", "in flat style", "flat"),
    "outlined": ("outlined", "in outlined style", "with outlines", "outline style"),
    "pixel": ("pixel art", "in pixel art style", "pixel style", "drawn in pixels"),
    "watercolour": (
        "watercolour",
        "in watercolour",
        "painted in watercolour",
        "watercolor",
        "watercolour style",
        "watercolour painting",
    ),
}

LANDSCAPE_PHRASES: dict[str, tuple[str, ...]] = {
    "meadow": ("in a meadow", "on a meadow", "in a grassy field", "on the grass", "in a grassy meadow"),
    "snow": ("in the snow", "on snow", "in a snowy landscape", "in a snowy field"),
    "beach": ("on the beach", "on a beach", "at the beach", "on a sandy beach"),
    "sea": ("at sea", "on the sea", "in the sea", "on the ocean", "on the water", "by the sea"),
    "desert": ("in the desert", "in a desert", "in the sand dunes", "in a sandy desert"),
}
LANDSCAPE_NAMES: dict[str, tuple[str, ...]] = {
    "meadow": ("a meadow", "a grassy field", "a meadow landscape"),
    "snow": ("a snowy landscape", "snow", "a snowy field"),
    "beach": ("a beach", "a sandy beach", "a beach landscape"),
    "sea": ("the sea", "the ocean", "a sea landscape"),
    "desert": ("a desert", "sand dunes", "a desert landscape"),
}

SKY_PHRASES: dict[str, tuple[str, ...]] = {
    "day": ("by day", "in the daytime", "on a sunny day", "in the day", "under a day sky"),
    "sunset": ("at sunset", "in the evening", "under a sunset sky", "under an evening sky"),
    "night": ("at night", "under a night sky", "under a starry sky", "on a dark night"),
}

_GRAMMAR = """
, . a an the of on in at to with and is are there it one 1 single this
against front near next beside side by
picture image drawing illustration photo painting sketch scene icon art show shows showing
background backdrop plain solid colour color coloured colored
upper lower half part
object objects shape shapes
"""


def _words() -> tuple[str, ...]:
    phrases = [_GRAMMAR, LABEL, LAYOUT, *LEADS, *NEAR_PHRASES, *BINS]
    phrases += [form for names in NOUNS.values() for name in names for form in name]
    word_tables: tuple[dict[str, tuple[str, ...]], ...] = (
        *(COLOUR_WORDS, SIZE_WORDS, POSITION_PHRASES, RELATION_PHRASES),
        *(STYLE_LEADS, STYLE_LABELS, LANDSCAPE_PHRASES, LANDSCAPE_NAMES, SKY_PHRASES),
    )
    phrases += [phrase for several in COUNT_WORDS.values() for phrase in several]
    for table in word_tables:
        phrases += [phrase for phrases_of_one in table.values() for phrase in phrases_of_one]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


VOCABULARY = _words()
"""The closed, sorted list of words; comma and full stop are words too."""
