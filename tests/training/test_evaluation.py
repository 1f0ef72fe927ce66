"""The evaluation of the shipped model: its questions, its marks, and the bars it has to reach."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import fastldm
from fastldm.scenes import COLOURS, HELD_OUT_PAIRS, KINDS, render, sample_scene
from fastldm.training.evaluation import Question, evaluate, questions


def test_questions_ask_every_pair_in_four_phrasings() -> None:
    asked = questions()
    assert len(asked) == len({q.prompt for q in asked}) == len(KINDS) * len(COLOURS) * 4
    assert "a large red fish on a white background" in {q.prompt for q in asked}
    assert {(q.kind, q.colour) for q in asked if q.unseen} == set(HELD_OUT_PAIRS)
    assert all(q.background != q.colour for q in asked)


def rendered(question: Question, seed: int) -> Image.Image:
    scene = sample_scene(
        np.random.default_rng(seed),
        kind=question.kind,
        colour=question.colour,
        background=question.background,
        size="large",
        held_out=question.unseen,
    )
    return Image.fromarray(render(scene).image)


def test_true_pictures_get_full_marks_and_false_ones_none() -> None:
    asked = questions()[::7]
    by_prompt = {q.prompt: q for q in asked}

    def true(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        return [rendered(by_prompt[prompt], seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def shifted(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        following = {q.prompt: asked[(i + 9) % len(asked)] for i, q in enumerate(asked)}
        return [rendered(following[prompt], seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    good, bad = evaluate(true, asked), evaluate(shifted, asked)
    assert good["colour"] >= 0.99 and good["object"] >= 0.99 and good["background"] == 1.0
    assert bad["object"] <= 0.05


def score(every: int) -> dict[str, float]:
    pipe = fastldm.load()

    def generate(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        return pipe.generate(prompts, seed=seeds, steps=25, guidance_scale=3.0).images

    return evaluate(generate, questions()[::every])


COLOUR = 0.80  # the bar; its model card states 0.86, and 0.81 at guidance 7.5


def test_the_shipped_model_is_as_good_as_its_card_says() -> None:
    shares = score(every=16)  # the first phrasing: large objects, on a background that is asked for
    assert shares["background"] >= 0.95
    assert shares["colour"] >= COLOUR - 0.1  # 32 pictures: chance moves the share by 0.06


@pytest.mark.long
def test_the_shipped_model_on_every_question_of_its_card() -> None:
    assert score(every=1)["colour"] >= COLOUR
