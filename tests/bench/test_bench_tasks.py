"""`fastldm bench tasks` on doubles of a model: one that draws what is asked, one that draws nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastldm import cli
from fastldm.abilities import Abilities
from fastldm.bench import tasks
from fastldm.errors import InvalidArgument
from fastldm.scenes import KINDS, draw_scene, render
from fastldm.scenes.judge import Judge

ABLE = Abilities(
    classes=len(KINDS),
    labels=KINDS,
    layout=True,
    segmentation=("background", *KINDS),
    inpainting=True,
    upscaling=4,
)


class Double:
    """What `measure` needs of a pipeline: its answer to question `seed` is that question's true picture, or
    white; a step of a task takes the seconds given.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, able: bool = True, abilities: Abilities = ABLE) -> None:
        self.able, self.limits = able, SimpleNamespace(abilities=abilities)

    def generate(self, *, seed: int = 0, output_type: str = "pil", **question: Any) -> SimpleNamespace:
        if output_type == "latent":
            assert question.pop("steps") == tasks.TIMED_STEPS
            return SimpleNamespace(timings={"denoise": 3.0 if "mask" in question else 2.0})
        assert question.pop("steps") == 25
        whole = tasks._render(seed)
        image = whole.image if self.able else np.full_like(whole.image, 255)
        if "label" in question:
            return SimpleNamespace(image=Image.fromarray(self.alone(question["label"], seed)))
        if "mask" in question:
            image = np.where(question["mask"][..., None], image, question["image"])
        if "upscale" in question:
            assert question["image"].size == (32, 32)
        return SimpleNamespace(image=Image.fromarray(image))

    def alone(self, kind: str, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        while True:
            scene = draw_scene(rng, 1)
            if [thing.kind for thing in scene.objects] == [kind]:
                image: np.ndarray = render(scene).image
                return image if self.able else np.full_like(image, 255)


def measured(monkeypatch: pytest.MonkeyPatch, pipe: Double) -> tasks.Report:
    monkeypatch.setattr("fastldm.api.load", lambda model, **options: pipe)
    return tasks.measure(every=10)


def test_true_pictures_have_full_marks(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured(monkeypatch, Double())
    print(report)
    assert {row.task for row in report.rows} == {"label", "layout", "segmentation", "inpainting", "upscaling"}
    for row in report.rows:
        assert row.value >= 0.9 and row.cap >= 0.9
        assert row.step == (1.5 if row.task == "inpainting" else 1.0)
    assert report.psnr > 100 > report.bicubic > 15


def test_white_pictures_have_none(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured(monkeypatch, Double(able=False))
    values = {(row.task, row.what): row.value for row in report.rows}
    assert values.pop(("segmentation", "pixels of the map read back")) > 0.5  # most of a map is background
    assert max(values.values()) < 0.3


def test_a_model_for_less_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgument, match="this one does text to image"):
        measured(monkeypatch, Double(abilities=Abilities()))


def test_the_command_writes_json(
    judge: Judge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastldm.api.load", lambda model, **options: Double())
    file = tmp_path / "tasks.json"
    assert cli.main(["bench", "tasks", "--every", "25", "--json", str(file)]) == 0
    assert "boxes that hold their object" in capsys.readouterr().out
    assert json.loads(file.read_text())["tasks"]["pictures"] == 4
    assert cli.main(["bench", "tasks", "--rounds", "3"]) == 2
