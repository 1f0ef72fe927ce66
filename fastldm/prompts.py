"""What a picture is to show, as generate() is told it: prompts, embeddings, class labels, layouts.

Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from fastldm.abilities import Abilities
from fastldm.checks import number, refuse, shape_of
from fastldm.words import Box, label_words, layout_words, overlap

MAX_CHARACTERS = 32_000
MAX_EMBEDS = 32_768  # prompts, and tokens of each, in prompt_embeds
MAX_BOXES = 4096

Layout = tuple[tuple[str | int, Box], ...]
"""Objects, each with its box."""


@dataclass(frozen=True)
class Content:
    """What the rows of a request show, one entry a row.

    prompts    None where embeddings, a label or nothing stand in
    negatives  "" where none was given
    labels     numbers of classes, for a model that reads no text
    layouts    for a model that reads no text
    """

    prompts: list[str] | None
    negatives: list[str]
    labels: list[int] | None = None
    layouts: list[Layout] | None = None


def check_content(
    abilities: Abilities,
    context: tuple[int, int],
    guided: bool,
    *,
    prompt: object,
    negative_prompt: object,
    prompt_embeds: object,
    negative_prompt_embeds: object,
    label: object,
    layout: object,
) -> Content:
    """What the rows show, or InvalidArgument for the first wrong argument.

    context: tokens of a chunk of prompt, width of their embeddings.
    """
    told = {"label": label, "layout": layout}
    texts = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "prompt_embeds": prompt_embeds,
        "negative_prompt_embeds": negative_prompt_embeds,
    }
    labels = _classes(abilities) > 0 and abilities.needs != "layout"
    for name, able in (("label", labels), ("layout", abilities.layout)):
        if told[name] is not None and not able:
            cannot(abilities, name, told[name])
    if not abilities.prompt:
        for name, value in texts.items():
            if value is not None:
                refuse(name, value, "None: this model takes no prompt")
        return _textless(abilities, label, layout)
    contents = {**told, "prompt_embeds": prompt_embeds, "prompt": prompt}
    given = [name for name, value in contents.items() if value is not None]
    if len(given) > 1:
        refuse(given[-1], contents[given[-1]], f"None together with {given[0]}=")
    if label is not None:
        prompts = [label_words(abilities.labels[each]) for each in _labels(abilities, label)]
        return Content(prompts, _negatives(negative_prompt, len(prompts)))
    if layout is not None:
        prompts = [_layout_prompt(abilities, boxes) for boxes in _layouts(abilities, layout)]
        return Content(prompts, _negatives(negative_prompt, len(prompts)))
    return _texts_or_embeds(context, guided, **texts)


def cannot(abilities: Abilities, name: str, value: object) -> NoReturn:
    """Refuse an argument for a task that this model does not do."""
    refuse(name, value, f"None: this model does {', '.join(abilities.tasks)}")


def _textless(abilities: Abilities, label: object, layout: object) -> Content:
    if label is not None:
        labels = _labels(abilities, label)
        return Content(None, [""] * len(labels), labels=labels)
    if layout is not None:
        layouts = _layouts(abilities, layout)
        return Content(None, [""] * len(layouts), layouts=layouts)
    if abilities.layout:
        refuse("layout", None, "a list of (object, (left, top, right, bottom)): this model needs one")
    if abilities.classes:
        refuse("label", None, f"{_label_allowed(abilities)}: this model needs one")
    return Content(None, [""])


def _classes(abilities: Abilities) -> int:
    """How many classes a number can name: where they are words of a prompt, as many as have a name."""
    return len(abilities.labels) if abilities.prompt else abilities.classes


def _label_allowed(abilities: Abilities) -> str:
    if abilities.labels:
        shown = ", ".join(abilities.labels[:20])
        more = f", … ({abilities.classes} in all)" if abilities.classes > 20 else ""
        return f"one of {shown}{more}, or its number"
    return f"an integer 0…{abilities.classes - 1}" if _classes(abilities) else "words"


def _labels(abilities: Abilities, value: object) -> list[int]:
    """The numbers of one or more classes, given by name or number."""
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = list(value)
    if not isinstance(value, list | tuple):
        return [_label(abilities, "label", value)]
    if not value:
        refuse("label", value, "a label or a list of at least one")
    return [_label(abilities, f"label[{i}]", item) for i, item in enumerate(value)]


def _label(abilities: Abilities, name: str, value: object) -> int:
    if isinstance(value, str):
        if value not in abilities.labels:
            refuse(name, value, _label_allowed(abilities))
        return abilities.labels.index(value)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | np.integer)
        or not 0 <= value < _classes(abilities)
    ):
        refuse(name, value, _label_allowed(abilities))
    return int(value)


def _layouts(abilities: Abilities, value: object) -> list[Layout]:
    """One layout, a list of (object, box), or several of them."""
    allowed = (
        "a list of (object, (left, top, right, bottom)), the box in shares of the sides; or several lists"
    )
    if not isinstance(value, list | tuple) or not value:
        refuse("layout", value, allowed)
    many = isinstance(value[0], list | tuple) and bool(value[0]) and isinstance(value[0][0], list | tuple)
    layouts = []
    for row, boxes in enumerate(value if many else [value]):
        name = f"layout[{row}]" if many else "layout"
        if not isinstance(boxes, list | tuple) or not 1 <= len(boxes) <= MAX_BOXES:
            refuse(name, boxes, allowed)
        layouts.append(tuple(_boxed(abilities, f"{name}[{i}]", item) for i, item in enumerate(boxes)))
    return layouts


def _boxed(abilities: Abilities, name: str, item: object) -> tuple[str | int, Box]:
    """One object with its box."""
    if not isinstance(item, list | tuple) or len(item) != 2:
        refuse(name, item, "(object, (left, top, right, bottom))")
    what, box = item
    thing: str | int
    if abilities.prompt and isinstance(what, str) and what.strip():
        thing = text(name, what)
        if abilities.labels and thing.split()[-1] not in abilities.labels:
            refuse(name, what, f"words that end in one of {', '.join(abilities.labels)}")
    else:
        thing = _label(abilities, name, what)
    if not isinstance(box, list | tuple) or len(box) != 4:
        refuse(name, box, "a box (left, top, right, bottom)")
    left, top, right, bottom = (number(name, edge, 0, 1) for edge in box)
    if left >= right or top >= bottom:
        refuse(name, box, "a box that is not empty: left < right and top < bottom, in shares of the sides")
    return thing, (left, top, right, bottom)


def _layout_prompt(abilities: Abilities, layout: Layout) -> str:
    """A layout as words. Boxes that overlap are none that a model could learn so."""
    for i, (_, box) in enumerate(layout):
        for other in layout[:i]:
            if overlap(other[1], box):
                refuse("layout", (other[1], box), "boxes that do not overlap")
    named = [(name if isinstance(name, str) else abilities.labels[name], box) for name, box in layout]
    return layout_words(named)


def _texts_or_embeds(
    context: tuple[int, int],
    guided: bool,
    prompt: object,
    negative_prompt: object,
    prompt_embeds: object,
    negative_prompt_embeds: object,
) -> Content:
    chunk, width = context
    if prompt_embeds is None:
        if prompt is None:
            refuse("prompt", prompt, "a string or a list of strings: this model needs a prompt")
        if negative_prompt_embeds is not None:
            refuse("negative_prompt_embeds", negative_prompt_embeds, "None without prompt_embeds=")
        prompts = _texts("prompt", prompt)
        return Content(prompts, _negatives(negative_prompt, len(prompts)))
    rows, length, _ = shape_of("prompt_embeds", prompt_embeds, ("prompts", "tokens", width))
    if max(rows, length) > MAX_EMBEDS:
        refuse("prompt_embeds", prompt_embeds, f"at most {MAX_EMBEDS} prompts, and as many tokens")
    if negative_prompt_embeds is None:
        if guided and length != chunk:
            allowed = f"{chunk} tokens, or negative_prompt_embeds= of the same shape"
            refuse("prompt_embeds", prompt_embeds, allowed)
        return Content(None, _negatives(negative_prompt, rows))
    if negative_prompt is not None:
        refuse("negative_prompt", negative_prompt, "None together with negative_prompt_embeds=")
    shape_of("negative_prompt_embeds", negative_prompt_embeds, (rows, length, width))
    return Content(None, [""] * rows)


def _texts(name: str, value: object) -> list[str]:
    """One or more prompts: a string, or a list or tuple of strings."""
    if isinstance(value, list | tuple) and value:
        return [text(f"{name}[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, list | tuple):
        refuse(name, value, "a string or a list of at least one string")
    return [text(name, value)]


def text(name: str, value: object) -> str:
    """`value` as a string that can be tokenized."""
    if not isinstance(value, str):
        refuse(name, value, "a string")
    if len(value) > MAX_CHARACTERS:
        refuse(name, value, f"at most {MAX_CHARACTERS} characters, not {len(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        refuse(name, value, "text without lone surrogates")
    return str(value)


def _negatives(value: object, rows: int) -> list[str]:
    """One negative prompt a prompt."""
    texts = [""] if value is None else _texts("negative_prompt", value)
    if isinstance(value, list | tuple) and len(texts) != rows:
        refuse("negative_prompt", value, f"one string, or one a prompt ({rows})")
    return texts if len(texts) == rows else texts * rows
