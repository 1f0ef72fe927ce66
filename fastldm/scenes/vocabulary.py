"""Every word that the shipped model knows. A change here changes the ids of a trained model: retrain it."""

from __future__ import annotations

from fastldm.scenes.palette import COLOURS, KINDS

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
)

_GRAMMAR = """
, . a an the of on in at to with and is are there it one 1 single this
against front near next beside side by
picture image drawing illustration photo painting sketch scene icon art show shows showing
background backdrop plain solid colour color coloured colored
upper lower half part
object objects shape shapes
"""

_LATER = """
style flat simple outlined outline outlines line pixel pixels pixelated watercolour watercolor painted drawn
landscape meadow grass grassy field snow snowy beach sand sandy sea ocean water desert dunes
day daytime sunny sunset evening night dark starry sky
"""
"""Words of the styles and landscapes that the world grows into; renders of today never need them."""


def _words() -> tuple[str, ...]:
    phrases = [_GRAMMAR, _LATER, *LEADS]
    phrases += [form for names in NOUNS.values() for name in names for form in name]
    for table in (COLOUR_WORDS, SIZE_WORDS, POSITION_PHRASES, RELATION_PHRASES, COUNT_WORDS):
        phrases += [phrase for phrases_of_one in table.values() for phrase in phrases_of_one]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


VOCABULARY = _words()
"""The closed, sorted list of words; comma and full stop are words too."""
