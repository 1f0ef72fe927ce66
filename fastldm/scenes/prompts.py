"""Prompts that are no English: a class label, and a layout of boxes. Models learn them beside captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastldm.errors import InvalidArgument
from fastldm.scenes.palette import COLOURS, IMAGE_SIZE, KINDS
from fastldm.scenes.scene import Box, Scene
from fastldm.scenes.vocabulary import BINS, LABEL, LAYOUT

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
    return f"{LABEL} {kind}"


def layout_prompt(boxes: Sequence[LayoutBox]) -> str:
    """The prompt that asks for one to four objects, each in its box.

    `layout red circle p3 p5 p12 p14 , fish p16 p2 p28 p11`: the first and the last bin of BIN pixels that a
    box fills across, and those down, in the order x0 y0 x1 y1; edges go to the nearest bin. InvalidArgument
    for boxes that are empty, overlap or leave the picture, too many of them, and unknown words.
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
            a0, b0, a1, b1 = other.box
            if x0 < a1 and a0 < x1 and y0 < b1 and b0 < y1:
                raise InvalidArgument("boxes", (other.box, box.box), "boxes that do not overlap")
    return f"{LAYOUT} " + " , ".join(_words(box) for box in boxes)


def layout_of(scene: Scene, colours: bool = True) -> tuple[LayoutBox, ...]:
    """The boxes of a scene's objects, for `layout_prompt`."""
    return tuple(LayoutBox(o.kind, o.box, o.colour if colours else None) for o in scene.objects)


def _words(box: LayoutBox) -> str:
    x0, y0, x1, y1 = box.box
    (left, right), (top, bottom) = (_bins(low, high) for low, high in ((x0, x1), (y0, y1)))
    name = box.kind if box.colour is None else f"{box.colour} {box.kind}"
    return " ".join((name, *(BINS[edge] for edge in (left, top, right, bottom))))


def _bins(low: float, high: float) -> tuple[int, int]:
    """The first and the last bin of a span of pixels; at least one is filled."""
    first = min(int(low / BIN + 0.5), len(BINS) - 1)
    return first, max(int(high / BIN + 0.5) - 1, first)


def _check(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InvalidArgument(name, value, ", ".join(allowed))
