"""Label and layout prompts: within the vocabulary, readable back, and refused where they make no sense."""

import numpy as np
import pytest

from fastldm.errors import InvalidArgument
from fastldm.scenes import (
    COLOURS,
    KINDS,
    VOCABULARY,
    LayoutBox,
    draw_scene,
    label_prompt,
    layout_of,
    layout_prompt,
    sample_scene,
)
from fastldm.scenes.captions import MAX_WORDS, words
from fastldm.scenes.prompts import BIN


def read_layout(text):
    """The boxes of a layout prompt, edges in pixels."""
    name, rest = text.split(" ", 1)
    assert name == "layout"
    boxes = []
    for part in rest.split(" , "):
        *name, x0, y0, x1, y1 = part.split()
        assert all(edge.startswith("p") for edge in (x0, y0, x1, y1))
        left, top, right, bottom = (int(edge[1:]) * BIN for edge in (x0, y0, x1, y1))
        colour = name[0] if len(name) == 2 else None
        boxes.append(LayoutBox(name[-1], (left, top, right + BIN, bottom + BIN), colour))
    return boxes


@pytest.mark.parametrize("colours", [False, True])
def test_layouts_read_back_to_half_a_bin(colours):
    rng = np.random.default_rng(0)
    for i in range(200):
        boxes = layout_of(draw_scene(rng, 1 + i % 4), colours)
        text = layout_prompt(boxes)
        assert set(words(text)) <= set(VOCABULARY) and len(words(text)) <= MAX_WORDS
        back = read_layout(text)
        assert [(box.kind, box.colour) for box in back] == [(box.kind, box.colour) for box in boxes]
        for box, found in zip(boxes, back, strict=True):
            assert np.abs(np.subtract(box.box, found.box)).max() <= BIN / 2


def test_layouts_on_the_bins_read_back_exactly():
    boxes = [
        LayoutBox("circle", (0, 0, 64, 128), "red"),
        LayoutBox("fish", (64, 0, 128, 4)),
        LayoutBox("car", (124, 120, 128, 128), "blue"),
    ]
    assert (
        layout_prompt(boxes)
        == "layout red circle p0 p0 p15 p31 , fish p16 p0 p31 p0 , blue car p31 p30 p31 p31"
    )
    assert read_layout(layout_prompt(boxes)) == boxes


def test_the_longest_layout_fits_the_tokenizer():
    corners = [(4, 4), (68, 4), (4, 68), (68, 68)]
    boxes = [LayoutBox("mushroom", (x, y, x + 56, y + 56), "purple") for x, y in corners]
    assert len(words(layout_prompt(boxes))) == 28 <= MAX_WORDS


def test_boxes_of_pixel_art_lie_on_the_bins():
    rng = np.random.default_rng(1)
    for _ in range(50):
        boxes = layout_of(sample_scene(rng, 3, style="pixel"))
        assert tuple(read_layout(layout_prompt(boxes))) == boxes


def test_labels_are_words_of_the_vocabulary():
    assert label_prompt("circle") == "label circle"
    assert {word for kind in KINDS for word in words(label_prompt(kind))} <= set(VOCABULARY)


def at(*box):
    return LayoutBox("circle", box, "red")


@pytest.mark.parametrize(
    ("name", "boxes"),
    [
        ("boxes", []),
        ("boxes", [at(x, 0, x + 20, 20) for x in (0, 24, 48, 72, 96)]),
        ("boxes", [at(10, 10, 10, 40)]),
        ("boxes", [at(40, 10, 10, 40)]),
        ("boxes", [at(-1, 10, 40, 40)]),
        ("boxes", [at(10, 10, 40, 129)]),
        ("boxes", [at(float("nan"), 10, 40, 40)]),
        ("boxes", [at(10, 10, 50, 50), at(60, 10, 90, 50), at(49, 49, 80, 80)]),
        ("kind", [LayoutBox("dog", (10, 10, 40, 40))]),
        ("colour", [LayoutBox("fish", (10, 10, 40, 40), "pink")]),
    ],
    ids=["none", "five", "empty", "inverted", "left", "below", "nan", "overlapping", "dog", "pink"],
)
def test_bad_boxes_are_refused_by_name(name, boxes):
    with pytest.raises(InvalidArgument, match=f"^{name}="):
        layout_prompt(boxes)


def test_touching_boxes_are_no_overlap():
    assert layout_prompt([at(10, 10, 40, 40), at(40, 10, 80, 40)])


def test_unknown_labels_are_refused():
    with pytest.raises(InvalidArgument, match="^kind="):
        label_prompt("red")
    assert COLOURS[0] == "red"
