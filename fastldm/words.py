"""Labels and layouts as words: what a model that reads text learns beside sentences.

`label circle` is a class. `layout red circle p3 p5 p12 p14 , fish p16 p2 p28 p11` are objects in boxes: the
first and the last of 32 bins that a box fills across, and those down, in the order left top right bottom.
"""

from __future__ import annotations

from collections.abc import Sequence

LABEL, LAYOUT = "label", "layout"
BINS = tuple(f"p{i}" for i in range(32))

Box = tuple[float, float, float, float]
"""left, top, right, bottom: shares of the picture's width and height."""


def label_words(name: str) -> str:
    """The prompt for a class."""
    return f"{LABEL} {name}"


def layout_words(boxes: Sequence[tuple[str, Box]]) -> str:
    """The prompt for objects in boxes; edges go to the nearest bin, and at least one bin is filled."""
    return f"{LAYOUT} " + " , ".join(f"{name} {' '.join(_edges(box))}" for name, box in boxes)


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes have a point inside in common."""
    return all(one[i] < other[i + 2] and other[i] < one[i + 2] for i in (0, 1))


def _edges(box: Box) -> list[str]:
    first = [min(int(low * len(BINS) + 0.5), len(BINS) - 1) for low in box[:2]]
    last = [max(int(high * len(BINS) + 0.5) - 1, low) for high, low in zip(box[2:], first, strict=True)]
    return [BINS[edge] for edge in first + last]
