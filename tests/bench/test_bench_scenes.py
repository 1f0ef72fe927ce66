"""`fastldm bench scenes` on doubles of a model, which draw what is asked, or something else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastldm import cli
from fastldm.bench import scenes
from fastldm.errors import FastLDMError
from fastldm.scenes import HELD_OUT_PAIRS, Scene, SceneObject, draw_scene, render, sample_scene
from fastldm.scenes.exam import CATEGORIES, GENEVAL, Question, questions
from fastldm.scenes.judge import Judge, new_net

CENTRES = {
    None: [(32, 32), (96, 96), (32, 96), (96, 32)],
    "left of": [(32, 64), (96, 64)],
    "right of": [(96, 64), (32, 64)],
    "above": [(64, 32), (64, 96)],
    "below": [(64, 96), (64, 32)],
}


def drawn(question: Question, rng: np.random.Generator) -> Image.Image:
    """A right answer: its things side by side, what was not asked by lot."""
    things = [thing for thing in question.things for _ in range(thing.count)]
    ground = {"white": "black", "black": "blue"}.get(things[0].colour or "", "white")
    if len(things) > 1 and ground in {thing.colour for thing in things}:
        ground = "purple" if "purple" not in {thing.colour for thing in things} else "orange"
    objects: list[SceneObject] = []
    for thing, (x, y) in zip(things, CENTRES[question.related], strict=False):
        colour = thing.colour or "red"
        (one,) = sample_scene(
            rng,
            kind=thing.kind,
            colour=colour,
            size="small",
            held_out=(thing.kind, colour) in HELD_OUT_PAIRS,
        ).objects
        half = (one.box[2] - one.box[0]) / 2, (one.box[3] - one.box[1]) / 2
        objects.append(replace(one, box=(x - half[0], y - half[1], x + half[0], y + half[1])))
    scene = Scene(tuple(objects), question.background or ground, question.style or "flat", question.sky)
    return Image.fromarray(render(scene).image)


class Double:
    """What `measure` needs of a pipeline; `shift` answers the question that stands so much later."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, shift: int = 0) -> None:
        asked = questions()
        self.answers = {q.prompt: asked[(i + shift) % len(asked)] for i, q in enumerate(asked)}
        same = SimpleNamespace(encode=lambda x: SimpleNamespace(mean=x), decode=lambda z: z)
        self.components = SimpleNamespace(vae=same)

    @contextmanager
    def turn(self) -> Iterator[None]:
        yield

    def generate(self, prompts: list[str], seed: list[int], **options: object) -> SimpleNamespace:
        assert len(prompts) == len(seed) <= 8
        assert options == {"steps": 25, "guidance_scale": 3.0, "eta": 0.0}
        return SimpleNamespace(images=list(map(self.picture, prompts, seed)))

    def picture(self, prompt: str, seed: int) -> Image.Image:
        rng = np.random.default_rng(seed)
        if prompt in self.answers:
            return drawn(self.answers[prompt], rng)
        return Image.fromarray(render(draw_scene(rng)).image)


def measured(monkeypatch: pytest.MonkeyPatch, pipe: Double, every: int = 10) -> scenes.Report:
    monkeypatch.setattr("fastldm.api.load", lambda model, **options: pipe)
    return scenes.measure(every=every, guidance=3.0)


def test_who_draws_what_is_asked_has_full_marks(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured(monkeypatch, Double())
    print(report)
    assert list(report.categories) == list(CATEGORIES) and report.pictures == 10
    assert min(report.categories.values()) >= 0.9 and report.overall >= 0.97
    assert report.found >= 0.97
    assert report.overall == pytest.approx(sum(report.categories[name] for name in GENEVAL) / 6)
    assert 0 < report.distance < 2 * report.floor  # renders too, of as many pictures
    for style in report.styles.values():
        assert style.objects >= 0.99 and style.reconstructed >= 0.9
        assert style.psnr == pytest.approx(78.1, abs=0.1)  # the highest that is told
    assert measured(monkeypatch, Double()) == report


def test_who_draws_something_else_has_none(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured(monkeypatch, Double(shift=105))
    assert report.overall <= 0.1 and max(report.categories.values()) <= 0.2
    assert report.overall <= report.found <= 0.3


def test_a_judge_that_cannot_read_renders_judges_nothing() -> None:
    pipe: object = Double()
    with pytest.raises(FastLDMError, match=r"the judge reads 0.0% of the objects of flat renders; 99% are"):
        scenes.style_report(Judge(new_net()), pipe, "flat", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["scenes", "step"], "scenes alone"),
        (["scenes", "--rounds", "3"], "rounds=3: allowed is only in a race"),
        (["step", "--every", "2"], "every=2: allowed is only with scenes"),
        (["scenes", "--every", "0"], "every=0"),
        (["scenes", "--guidance", "-1"], "guidance=-1.0"),
        (["scenes", "--eta", "2"], "eta=2.0"),
        (["scenes", "--json", "no/such/folder/x.json"], "a file in a folder that exists"),
        (["scenes", "--judge", "no-judge.safetensors"], "no-judge.safetensors: cannot be read"),
    ],
    ids=["parts", "rounds", "every of a race", "every", "guidance", "eta", "json", "judge"],
)
def test_errors_of_the_command(
    capsys: pytest.CaptureFixture[str], arguments: Sequence[str], told: str
) -> None:
    assert cli.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastldm: error: ") and told in error and error.count("\n") == 1


def test_the_command_prints_and_writes(
    judge: Judge, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("fastldm.api.load", lambda model, **options: Double())
    file = tmp_path / "scenes.json"
    assert cli.main(["bench", "scenes", "--every", "50", "--guidance", "3", "--json", str(file)]) == 0
    table = capsys.readouterr().out
    for name in (*CATEGORIES, "overall of the first six", "Fréchet distance", "watercolour"):
        assert name in table
    found = json.loads(file.read_text())
    assert found["scenes"]["pictures"] == 2 and set(found["scenes"]["categories"]) == set(CATEGORIES)
