"""`fastldm info` and `convert`, and what is no command."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from PIL import Image

import fastldm
import fastldm.checkpoint
from fastldm import images


def test_info_of_a_picture(pipe, run, fails):
    run("generate", "a house", "--seed", 7)
    code, out, _ = run("info", "out.png")
    assert code == 0
    assert out.startswith("a house\nSteps: 25, Sampler: DDIM, CFG scale: 7.5, Seed: 7, Size: 32x16")
    assert "\n  prompt: a house\n" in out
    code, out, _ = run("info", "--json", "out.png")
    assert json.loads(out) == images.read_metadata("out.png")
    Image.new("RGB", (8, 8)).save("plain.png")
    assert "a PNG that says how it was made" in fails("info", "plain.png")


def test_info_of_a_model(pipe, run, monkeypatch):
    @dataclasses.dataclass
    class Info:
        family: str = "sd1"
        parameters: dict = dataclasses.field(default_factory=lambda: {"unet": 859520964})
        files: tuple = ("a", "b")
        warnings: tuple = ()
        hash: str | None = None

    asked = []
    monkeypatch.setattr(fastldm.checkpoint, "inspect", lambda *a, **k: asked.append((a, k)) or Info())
    code, out, _ = run("info", "model", "--config", "c.json")
    assert code == 0 and asked == [(("model",), {"config": "c.json"})]
    assert out == "family: sd1\nparameters:\n  unet: 859,520,964\nfiles: a, b\nwarnings: none\n"
    assert json.loads(run("info", "model", "--json")[1])["parameters"] == {"unet": 859520964}


def test_info_and_convert_of_missing_models(pipe, fails):
    Path("foreign.safetensors").write_bytes(b"not a model")
    for path in ("./none", "./none.safetensors", "foreign.safetensors"):
        fails("info", path)
        fails("convert", path, "new")
    assert os.listdir() == ["foreign.safetensors"]


def test_convert_prints_what_it_wrote(pipe, run, monkeypatch):
    asked = []
    monkeypatch.setattr(fastldm.checkpoint, "convert", lambda *a, **k: asked.append((a, k)) or Path(a[1]))
    assert run("convert", "a", "b.safetensors", "--overwrite", "--tokenizer", "t")[:2] == (
        0,
        "b.safetensors\n",
    )
    assert asked == [(("a", "b.safetensors"), {"overwrite": True, "tokenizer": "t"})]


@pytest.mark.parametrize(
    "arguments", [[], ["paint"], ["generate", "a", "b"], ["info"], ["convert", "a"], ["train"]]
)
def test_wrong_commands(fails, arguments):
    fails(*arguments)
