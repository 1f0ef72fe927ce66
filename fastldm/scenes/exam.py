"""The questions that a model of scenes is judged by: GenEval's six categories in this world, and what
training never showed. (GenEval: Ghosh et al. 2023, arXiv:2310.11513)

A picture is right when it shows exactly what was asked: as many objects of each kind, each in its colour
where one was named, in the relation asked for, and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fastldm.scenes.captions import phrase
from fastldm.scenes.judge import Reading
from fastldm.scenes.marks import Pair
from fastldm.scenes.palette import (
    ALL_PAIRS,
    COLOURS,
    HELD_OUT_PAIRS,
    HELD_OUT_TRIPLES,
    KINDS,
    LANDSCAPES,
    RELATIONS,
    SKIES,
    STYLES,
    unfit_colours,
)
from fastldm.scenes.scene import relation
from fastldm.scenes.vocabulary import COUNT_WORDS, LANDSCAPE_PHRASES, NOUNS, SKY_PHRASES, STYLE_LABELS

_T = TypeVar("_T")

GENEVAL = (
    "single object",
    "two objects",
    "colours",
    "counting",
    "position",
    "attribute binding",
)
"""The categories whose mean is the overall score."""

PER_CATEGORY = 100

SENTENCES = (
    "{lead} with {things}",
    "there {verb} {things} in the picture",
    "in the drawing there {verb} {things}",
    "{things} in {lead}",
)
"""Sentences that no caption of training has, of words that captions have."""

_LEADS = ("a picture", "a drawing", "an illustration", "an image")


@dataclass(frozen=True)
class Thing:
    """Objects that a question asks for; without a colour they may have any."""

    kind: str
    colour: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Question:
    """A prompt and what a right picture shows; `related` is the relation of the first thing to the second."""

    category: str
    prompt: str
    things: tuple[Thing, ...]
    related: str | None = None
    style: str | None = None
    background: str | None = None
    sky: str | None = None

    def is_right(self, reading: Reading) -> bool:
        """Whether the picture shows what was asked, and nothing else."""
        for fact in ("style", "background", "sky"):
            if getattr(self, fact) not in (None, getattr(reading, fact)):
                return False
        asked, seen = self._asked_and_seen(reading)
        if seen != asked or any(o.colour is None for o in reading.objects):
            return False
        if self.related is None:
            return True
        first, second = (next(o for o in reading.objects if o.kind == thing.kind) for thing in self.things)
        return relation(first, second) == self.related

    def found(self, reading: Reading) -> float:
        """The share of the objects asked for that are there, of their kind and, where one was named, in their
        colour; whatever else is there. It tells of progress long before whole pictures are right.
        """
        asked, seen = self._asked_and_seen(reading)
        return (asked & seen).total() / asked.total()

    def _asked_and_seen(self, reading: Reading) -> tuple[Counter[Pair], Counter[Pair]]:
        """How often each kind in each colour; in none where a thing may have any."""
        coloured = all(thing.colour is not None for thing in self.things)
        seen = Counter[Pair]((o.kind, o.colour if coloured else None) for o in reading.objects)
        asked = Counter[Pair]()
        for thing in self.things:
            asked[thing.kind, thing.colour] += thing.count
        return asked, seen


def questions(per_category: int = PER_CATEGORY, seed: int = 2024) -> list[Question]:
    """The same questions each time, `per_category` of each category, those of GENEVAL first."""
    asked = []
    for number, (category, ask) in enumerate(_CATEGORIES.items()):
        rng = np.random.default_rng([seed, number])
        asked += [ask(category, i, rng) for i in range(per_category)]
    return asked


def _single(category: str, i: int, rng: np.random.Generator) -> Question:
    return _asked(category, rng, Thing(KINDS[i % len(KINDS)]))


def _two(category: str, i: int, rng: np.random.Generator) -> Question:
    return _asked(category, rng, *map(Thing, _some(rng, KINDS, 2)))


def _coloured(category: str, i: int, rng: np.random.Generator) -> Question:
    return _asked(category, rng, Thing(*_pick(rng, _SEEN_PAIRS)))


def _counting(category: str, i: int, rng: np.random.Generator) -> Question:
    return _asked(category, rng, Thing(_pick(rng, KINDS), count=2 + i % 3))


def _position(category: str, i: int, rng: np.random.Generator) -> Question:
    return _related(category, i, rng, unseen=False)


def _binding(category: str, i: int, rng: np.random.Generator) -> Question:
    while True:
        kinds, colours = _some(rng, KINDS, 2), _some(rng, COLOURS, 2)
        things = tuple(map(Thing, kinds, colours))
        if not any((thing.kind, thing.colour) in HELD_OUT_PAIRS for thing in things):
            return _asked(category, rng, *things)


def _unseen_pair(category: str, i: int, rng: np.random.Generator) -> Question:
    return _asked(category, rng, Thing(*_UNSEEN_PAIRS[i % len(_UNSEEN_PAIRS)]))


def _unseen_relation(category: str, i: int, rng: np.random.Generator) -> Question:
    return _related(category, i, rng, unseen=True)


def _style_and_place(category: str, i: int, rng: np.random.Generator) -> Question:
    """One object in each style in turn, every second time in a landscape."""
    style = STYLES[i % len(STYLES)]
    if i // len(STYLES) % 2 == 0:
        place, sky, where, unfit = None, None, "", frozenset[str]()
    else:
        place, sky = _pick(rng, LANDSCAPES), _pick(rng, SKIES)
        where, unfit = f" {LANDSCAPE_PHRASES[place][0]} {SKY_PHRASES[sky][0]}", unfit_colours(place, sky)
    thing = Thing(*_pick(rng, [pair for pair in _SEEN_PAIRS if pair[1] not in unfit]))
    prompt = f"{_sentence(rng, _told(thing) + where, 'is')}, {STYLE_LABELS[style][0]}"
    return Question(category, prompt, (thing,), None, style, place, sky)


_CATEGORIES: dict[str, Callable[[str, int, np.random.Generator], Question]] = {
    **dict(zip(GENEVAL, (_single, _two, _coloured, _counting, _position, _binding), strict=True)),
    "unseen pairs": _unseen_pair,
    "unseen relations": _unseen_relation,
    "styles and places": _style_and_place,
}
CATEGORIES = tuple(_CATEGORIES)

_SEEN_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT_PAIRS)
_UNSEEN_PAIRS = tuple(sorted(HELD_OUT_PAIRS))


def _related(category: str, i: int, rng: np.random.Generator, unseen: bool) -> Question:
    """Two kinds in a relation that training did or did not show."""
    related = RELATIONS[i % len(RELATIONS)]
    while True:
        first, second = _some(rng, KINDS, 2)
        if ((first, related, second) in HELD_OUT_TRIPLES) == unseen:
            break
    things = Thing(first), Thing(second)
    told = f"{_told(things[0])} {related} {_told(things[1])}"
    return Question(category, _sentence(rng, told, "is"), things, related)


def _asked(category: str, rng: np.random.Generator, *things: Thing) -> Question:
    verb = "is" if things[0].count == 1 else "are"
    return Question(category, _sentence(rng, " and ".join(map(_told, things)), verb), things)


def _sentence(rng: np.random.Generator, things: str, verb: str) -> str:
    return phrase(_pick(rng, SENTENCES), lead=_pick(rng, _LEADS), things=things, verb=verb)


def _told(thing: Thing) -> str:
    singular, plural = NOUNS[thing.kind][0]
    colour = f"{thing.colour} " if thing.colour else ""
    if thing.count == 1:
        return f"a {colour}{singular}"
    return f"{COUNT_WORDS[thing.count][0]} {colour}{plural}"


def _pick(rng: np.random.Generator, items: Sequence[_T]) -> _T:
    return items[int(rng.integers(len(items)))]


def _some(rng: np.random.Generator, items: Sequence[_T], count: int) -> list[_T]:
    """Different ones."""
    return [items[int(i)] for i in rng.choice(len(items), count, replace=False)]
