"""The questions: fixed, told in known words and in sentences of no caption, and strictly marked."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from fastldm.scenes import HELD_OUT_PAIRS, HELD_OUT_TRIPLES, VOCABULARY, caption, draw_scene
from fastldm.scenes.captions import MAX_WORDS, words
from fastldm.scenes.exam import CATEGORIES, GENEVAL, Question, questions
from fastldm.scenes.judge import Reading, Seen

ASKED = questions()


def test_a_hundred_of_each_category_and_the_same_each_time() -> None:
    assert Counter(q.category for q in ASKED) == dict.fromkeys(CATEGORIES, 100)
    assert CATEGORIES[:6] == GENEVAL and ASKED == questions()
    assert len({q.prompt for q in ASKED}) >= 780
    assert {q.things[0].count for q in ASKED if q.category == "counting"} == {2, 3, 4}


def test_prompts_are_of_known_words_in_sentences_that_no_caption_has() -> None:
    rng = np.random.default_rng(5)
    captions = [caption(draw_scene(rng), rng) for _ in range(3000)]
    learnt = {word for text in captions for word in words(text)}
    for question in ASKED:
        asked = words(question.prompt)
        assert set(asked) <= learnt <= set(VOCABULARY) and len(asked) <= MAX_WORDS
    assert not {q.prompt for q in ASKED} & set(captions)


def test_only_the_unseen_is_held_out() -> None:
    for question in ASKED:
        pairs = {(thing.kind, thing.colour) for thing in question.things}
        assert bool(pairs & HELD_OUT_PAIRS) == (question.category == "unseen pairs")
        kinds = [thing.kind for thing in question.things]
        held_out = question.related is not None and (kinds[0], question.related, kinds[1]) in HELD_OUT_TRIPLES
        assert held_out == (question.category == "unseen relations")
    assert {(q.things[0].kind, q.things[0].colour) for q in ASKED if q.category == "unseen pairs"} == set(
        HELD_OUT_PAIRS
    )


PLACES = {
    "left of": [(10, 50), (80, 50)],
    "right of": [(80, 50), (10, 50)],
    "above": [(50, 10), (50, 80)],
    "below": [(50, 80), (50, 10)],
    None: [(10, 10), (80, 80), (10, 80), (80, 10)],
}


def answer(question: Question) -> Reading:
    things = [thing for thing in question.things for _ in range(thing.count)]
    objects = tuple(
        Seen(thing.kind, thing.colour or "red", (x, y, x + 38, y + 38), 1.0)
        for thing, (x, y) in zip(things, PLACES[question.related], strict=False)
    )
    return Reading(objects, question.background or "white", question.sky, question.style or "flat")


def test_only_the_exact_picture_is_right() -> None:
    for question in ASKED:
        right = answer(question)
        first, *rest = right.objects
        assert question.is_right(right)
        for wrong in (
            rest,
            [*right.objects, first],
            [*right.objects, replace(first, kind=None)],
            [replace(first, kind=None), *rest],
            [replace(first, colour=None), *rest],
            [replace(first, kind="car" if first.kind != "car" else "boat"), *rest],
        ):
            assert not question.is_right(replace(right, objects=tuple(wrong))), question
        other = replace(
            right, objects=(replace(first, colour="black" if first.colour != "black" else "red"), *rest)
        )
        assert question.is_right(other) == (question.things[0].colour is None)
        if question.related is not None:
            assert not question.is_right(
                replace(
                    right,
                    objects=tuple(
                        replace(o, box=p.box) for o, p in zip(right.objects, right.objects[::-1], strict=True)
                    ),
                )
            )
        if question.category == "styles and places":
            assert not question.is_right(
                replace(right, style="flat" if question.style != "flat" else "pixel")
            )
            assert question.is_right(replace(right, background="snow", sky="day")) == (
                question.sky is None or (question.background, question.sky) == ("snow", "day")
            )


def test_what_is_found_counts_whatever_stands_beside_it() -> None:
    for question in ASKED:
        right = answer(question)
        first, *rest = right.objects
        share = 1 / len(right.objects)
        for seen, want in (
            (right.objects, 1.0),
            ([*right.objects, first, replace(first, kind=None)], 1.0),
            (rest, 1 - share),
            ([replace(first, kind=None), *rest], 1 - share),
            ([], 0.0),
        ):
            found = question.found(replace(right, objects=tuple(seen), background="snow"))
            assert found == pytest.approx(want), question


def test_colours_go_with_their_kinds() -> None:
    for question in [q for q in ASKED if q.category == "attribute binding"]:
        right = answer(question)
        first, second = right.objects
        swapped = replace(first, colour=second.colour), replace(second, colour=first.colour)
        assert not question.is_right(replace(right, objects=swapped))
