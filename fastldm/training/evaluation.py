"""How well a model of scenes draws what it is asked; `benchmarks/shipped_model.py` prints it.

Every object in every colour, asked in four phrasings of which the first also names size and background, read
back by the automatic check of `fastldm.scenes.check`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fastldm.scenes import COLOURS, HELD_OUT_PAIRS, KINDS
from fastldm.scenes.captions import EVALUATION_PHRASINGS, phrase
from fastldm.scenes.check import Reading, read_object

Generate = Callable[[list[str], list[int]], Iterable[Image.Image]]


@dataclass(frozen=True)
class Question:
    """A prompt, and what a picture of it shows; `background` None where the prompt leaves it open."""

    prompt: str
    kind: str
    colour: str
    background: str | None
    phrasing: int

    @property
    def unseen(self) -> bool:
        """Whether training never showed this kind in this colour."""
        return (self.kind, self.colour) in HELD_OUT_PAIRS


def questions(kinds: Sequence[str] = KINDS, colours: Sequence[str] = COLOURS) -> list[Question]:
    """Every kind in every colour in every phrasing: large objects, on white, white ones on black."""
    asked = []
    for kind in kinds:
        for colour in colours:
            ground = "white" if colour != "white" else "black"
            for i, template in enumerate(EVALUATION_PHRASINGS):
                prompt = phrase(template, size="large", colour=colour, kind=kind, background=ground)
                asked.append(
                    Question(prompt, kind, colour, ground if "{background}" in template else None, i)
                )
    return asked


def evaluate(generate: Generate, asked: Sequence[Question], batch: int = 8) -> dict[str, float]:
    """Shares of pictures that are right, from generate(prompts, seeds); picture i is drawn with seed i.

    colour: the object's; object: colour and silhouette; background: where asked for; unseen: object, among
    pairs that training never showed; phrasing k: object, among prompts of that phrasing.
    """
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        images = generate([question.prompt for question in part], list(range(start, start + len(part))))
        for question, image in zip(part, images, strict=True):
            for name, correct in _marks(question, read_object(np.asarray(image))).items():
                right[name] += correct
                total[name] += 1
    return {name: right[name] / total[name] for name in total}


def _marks(question: Question, seen: Reading) -> dict[str, bool]:
    colour = seen.colour == question.colour
    exact = colour and seen.kind == question.kind
    marks = {"colour": colour, "object": exact, f"phrasing {question.phrasing}": exact}
    if question.background is not None:
        marks["background"] = seen.background == question.background
    if question.unseen:
        marks["unseen"] = exact
    return marks
