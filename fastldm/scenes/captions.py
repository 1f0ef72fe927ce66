"""Plain English for a scene, in many phrasings, and which of its facts a phrasing told."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from fastldm.scenes.palette import COLOURS, KINDS, LANDSCAPES, POSITIONS, SIZES
from fastldm.scenes.scene import Scene, SceneObject, relation
from fastldm.scenes.vocabulary import (
    COLOUR_WORDS,
    COUNT_WORDS,
    LANDSCAPE_NAMES,
    LANDSCAPE_PHRASES,
    LEADS,
    NEAR_PHRASES,
    NOUNS,
    POSITION_PHRASES,
    RELATION_PHRASES,
    SIZE_WORDS,
    SKY_PHRASES,
    STYLE_LABELS,
    STYLE_LEADS,
    VOCABULARY,
)

__all__ = [
    "EVALUATION_PHRASINGS",
    "FACTS",
    "MAX_WORDS",
    "VOCABULARY",
    "caption",
    "caption_and_facts",
    "phrase",
    "scene_labels",
    "words",
]

_T = TypeVar("_T")

EVALUATION_PHRASINGS = (
    "a {size} {colour} {kind} on a {background} background",
    "a {colour} {kind}",
    "a picture of a {size} {colour} {kind}",
    "on a {background} background there is a {colour} {kind}",
)
"""Templates for `phrase`; the first tells all but the position."""

FACTS: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    "colour": COLOURS,
    "background": COLOURS + LANDSCAPES,
    "size": tuple(SIZES),
    "position": POSITIONS,
}
"""The facts of a one-object scene and the classes of each; a label is an index into them."""

MAX_WORDS = 30
"""Words of the longest caption: the tokenizer has 32 ids, with the begin and the end."""

_CHANCE = {"colour": 0.92, "background": 0.65, "size": 0.5, "position": 0.35, "relation": 0.6}
# What is usual is seldom said, so that a prompt without it means it.
_SKY_CHANCE = {"day": 0.4, "sunset": 0.85, "night": 0.85}
_STYLE_CHANCE = {"flat": 0.15, "outlined": 0.9, "pixel": 0.9, "watercolour": 0.9}
_FIRST_LEFT_OUT = ("size", "background", "sky", "position", "style", "colour")
_PLAIN_NAME = 0.85
"""Chance of the commonest word where there are synonyms."""


def words(text: str) -> list[str]:
    """The words of a caption as the tokenizer splits them: lower case, punctuation apart."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def phrase(template: str, **facts: str) -> str:
    """The template with its facts filled in and `a` made `an` where English wants it."""
    return _with_articles(template.format(**facts))


def _with_articles(text: str) -> str:
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def scene_labels(scene: Scene) -> dict[str, int]:
    """Each fact of FACTS for a one-object scene, as an index; -1 for a position that no word names."""
    (thing,) = scene.objects
    return {
        "kind": KINDS.index(thing.kind),
        "colour": COLOURS.index(thing.colour),
        "background": FACTS["background"].index(scene.background),
        "size": list(SIZES).index(thing.size),
        "position": -1 if thing.position is None else POSITIONS.index(thing.position),
    }


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A true sentence or label for the scene, phrased by lot; it may leave facts out, never an object."""
    return caption_and_facts(scene, rng)[0]


def caption_and_facts(scene: Scene, rng: np.random.Generator) -> tuple[str, frozenset[str]]:
    """A caption of at most MAX_WORDS words and the facts it told.

    They are names of FACTS, `sky`, `style` and, of several objects, `count` and `relation`.
    """
    chances = _CHANCE | {"style": _STYLE_CHANCE[scene.style]}
    if scene.sky is not None:
        chances["sky"] = _SKY_CHANCE[scene.sky]
    told = {fact for fact, chance in chances.items() if rng.random() < chance}
    describe = _one if len(scene.objects) == 1 else _several
    text = describe(scene, told, rng)
    for fact in _FIRST_LEFT_OUT:
        if len(words(text)) <= MAX_WORDS:
            break
        if fact in told:
            told.remove(fact)
            text = describe(scene, told, rng)
    return _with_articles(text), frozenset(told)


def _one(scene: Scene, told: set[str], rng: np.random.Generator) -> str:
    (thing,) = scene.objects
    told.add("kind")
    told.discard("relation")
    if thing.position is None:
        told.discard("position")
    place = ""
    if "position" in told and thing.position is not None:
        place = _usual(rng, POSITION_PHRASES[thing.position])
    bare = _described([thing], told, rng)
    return _sentence(f"{_pick(rng, _ARTICLES)}{bare}", bare, place, scene, told, rng)


def _several(scene: Scene, told: set[str], rng: np.random.Generator) -> str:
    told.discard("position")
    told.update({"kind", "count"})
    groups: dict[tuple[str, str], list[SceneObject]] = {}
    for thing in scene.objects:
        groups.setdefault((thing.kind, thing.colour if "colour" in told else ""), []).append(thing)
    if any(thing.size != group[0].size for group in groups.values() for thing in group):
        told.discard("size")
    members = [list(groups.values())[int(i)] for i in rng.permutation(len(groups))]
    stated = relation(members[0][0], members[1][0]) if len(members) == len(scene.objects) == 2 else None
    if stated is None:
        told.discard("relation")
    things = [_counted(group, told, rng) for group in members]
    if stated is not None and "relation" in told:
        text = f"{things[0]} {_usual(rng, RELATION_PHRASES[stated])} {things[1]}"
    elif stated in ("left of", "right of") and rng.random() < 0.3:
        text = f"{things[0]} {_pick(rng, NEAR_PHRASES)} {things[1]}"
    else:
        text = " and ".join([", ".join(things[:-1]), things[-1]] if len(things) > 1 else things)
    return _sentence(text, text, "", scene, told, rng)


def _sentence(
    thing: str, bare: str, place: str, scene: Scene, told: set[str], rng: np.random.Generator
) -> str:
    """A clause around what is seen: `thing` with its article, `bare` without, `place` empty when untold."""
    verb = "are" if re.match(r"(two|three|four|[234]) ", thing) else "is"
    after = f" {place}" if place else ""
    label = f", {place}" if place else ""
    lead = _pick(rng, STYLE_LEADS[scene.style] if "style" in told else LEADS)
    led = [f"{lead} {thing}{after}"]
    forms = [
        f"{thing}{after}",
        f"there {verb} {thing}{after}",
        f"{place} there {verb} {thing}" if place else thing,
        f"{bare}{label}",
    ]
    around = _surroundings(scene, told, rng)
    if around is not None:
        where, whole, short = around
        led = [f"{lead} {thing}{after} {where}"]
        forms = [
            f"{thing}{after} {where}",
            f"{bare}{label}, {short}",
            f"{where} there {verb} {thing}{after}",
            f"there {verb} {thing}{after} {where}",
        ]
        if whole:
            led += [f"{lead} {whole} with {thing}{after}"]
            forms += [f"{whole} with {thing}{after}", f"{thing}{after}, {whole}"]
    if "style" not in told:
        text = _pick(rng, forms + led)
    elif rng.random() < 0.5:
        text = _pick(rng, led)
    else:
        style = _pick(rng, STYLE_LABELS[scene.style])
        text = f"{_pick(rng, forms)}, {style}"
    return text + ("." if rng.random() < 0.05 else "")


def _surroundings(scene: Scene, told: set[str], rng: np.random.Generator) -> tuple[str, str, str] | None:
    """Where the objects are, the whole around them (empty when only the sky is told), and a label for it."""
    if scene.sky is None:
        if "background" not in told:
            return None
        ground = _usual(rng, COLOUR_WORDS[scene.background])
        whole = f"a {_pick(rng, _PLAIN)}{ground} {_usual(rng, ('background', 'backdrop'))}"
        where = f"{_usual(rng, ('on', 'against', 'in front of'))} {whole}"
        return (where if rng.random() < 0.85 else f"on {ground}"), whole, f"{ground} background"
    when = _pick(rng, SKY_PHRASES[scene.sky]) if "sky" in told else ""
    if "background" not in told:
        return (when, "", when) if when else None
    then = f" {when}" if when else ""
    where = f"{_pick(rng, LANDSCAPE_PHRASES[scene.background])}{then}"
    short = ", ".join([scene.background, scene.sky] if when else [scene.background])
    return where, f"{_pick(rng, LANDSCAPE_NAMES[scene.background])}{then}", short


_ARTICLES = ("a ",) * 14 + ("the ", "the ", "one ", "a single ", "1 ")
_PLAIN = ("",) * 6 + ("plain ", "solid ")


def _counted(group: Sequence[SceneObject], told: set[str], rng: np.random.Generator) -> str:
    described = _described(group, told, rng)
    if len(group) == 1:
        return f"{_pick(rng, _ARTICLES)}{described}"
    return f"{_usual(rng, COUNT_WORDS[len(group)])} {described}"


def _described(group: Sequence[SceneObject], told: set[str], rng: np.random.Generator) -> str:
    """Size, colour and name of alike objects, without article or number."""
    parts = []
    if "size" in told:
        parts.append(_usual(rng, SIZE_WORDS[group[0].size], 0.5))
    if "colour" in told:
        parts.append(_usual(rng, COLOUR_WORDS[group[0].colour]))
    singular, plural = _usual(rng, NOUNS[group[0].kind])
    parts.append(singular if len(group) == 1 else plural)
    return " ".join(parts)


def _pick(rng: np.random.Generator, items: Sequence[_T]) -> _T:
    return items[int(rng.integers(len(items)))]


def _usual(rng: np.random.Generator, items: Sequence[_T], chance: float = _PLAIN_NAME) -> _T:
    """The first item mostly, else one of the others."""
    if len(items) == 1 or rng.random() < chance:
        return items[0]
    return items[1 + int(rng.integers(len(items) - 1))]
