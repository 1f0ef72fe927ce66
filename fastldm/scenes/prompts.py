"""Prompts that are no English: a class label, and a layout of boxes. Models learn them beside captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastldm.errors import InvalidArgument
from fastldm.scenes.palette import COLOURS, IMAGE_SIZE, KINDS
from fastldm.scenes.scene import Box, Scene
from fastldm.words import BINS, label_words, layout_words, overlap

BIN = IMAGE_SIZE // len(BINS)
"""Pixels between two edges that a layout prompt can tell apart."""

MAX_BOXES = 4


@dataclass(frozen=True)
class LayoutBox:
    """A kind of object in a box (x0, y0, x1, y1; pixels); without a colour it has any."""

    kind: str
    box: Box
    colour: str | None = None


def label_prompt(kind: str) -> str:
    """The prompt that asks for a picture of one class of KINDS; InvalidArgument for another word."""
    _check("kind", kind, KINDS)
    return label_words(kind)


def layout_prompt(boxes: Sequence[LayoutBox]) -> str:
    """The prompt that asks for one to four objects, each in its box: see `fastldm.words`.

    InvalidArgument for boxes that are empty, overlap or leave the picture, too many of them, and unknown
    words.
    """
    if not 1 <= len(boxes) <= MAX_BOXES:
        raise InvalidArgument("boxes", boxes, f"1 to {MAX_BOXES} boxes")
    for i, box in enumerate(boxes):
        _check("kind", box.kind, KINDS)
        if box.colour is not None:
            _check("colour", box.colour, COLOURS)
        x0, y0, x1, y1 = box.box
        if not (0 <= x0 < x1 <= IMAGE_SIZE and 0 <= y0 < y1 <= IMAGE_SIZE):
            allowed = f"x0 < x1 and y0 < y1, all from 0 to {IMAGE_SIZE}"
            raise InvalidArgument("boxes", box.box, allowed)
        for other in boxes[:i]:
            if overlap(other.box, box.box):
                raise InvalidArgument("boxes", (other.box, box.box), "boxes that do not overlap")
    return layout_words([(_name(box), shares_of(box.box)) for box in boxes])


def layout_of(scene: Scene, colours: bool = True) -> tuple[LayoutBox, ...]:
    """The boxes of a scene's objects, for `layout_prompt`."""
    return tuple(LayoutBox(o.kind, o.box, o.colour if colours else None) for o in scene.objects)


def shares_of(box: Box) -> tuple[float, float, float, float]:
    """A box of pixels in shares of the picture's sides."""
    x0, y0, x1, y1 = (edge / IMAGE_SIZE for edge in box)
    return x0, y0, x1, y1


def _name(box: LayoutBox) -> str:
    return box.kind if box.colour is None else f"{box.colour} {box.kind}"


def _check(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InvalidArgument(name, value, ", ".join(allowed))
