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


@pytest.mark.parametrize("arguments", [[], ["paint"], ["info"], ["convert", "a"], ["train"]])
def test_wrong_commands(fails, arguments):
    fails(*arguments)


def test_tune_passes_its_options_and_prints_the_table(run, monkeypatch):
    from fastldm import tuning

    asked = []
    monkeypatch.setattr(tuning, "run", lambda **options: asked.append(options) or Path("nvidia-h200.json"))
    monkeypatch.setattr(tuning, "compile_only", lambda targets: asked.append(targets) or 12)
    options = ("--model", "sd21", "--ops", "conv2d,geglu", "--minutes", 5, "--out", "t.json")
    assert run("tune", *options) == (0, "nvidia-h200.json\n", "")
    assert run("tune")[0] == 0
    assert run("tune", "--compile-only", "--target", "sm_80", "sm_90")[1] == "12 kernels compiled\n"
    assert run("tune", "--compile-only")[0] == 0
    chosen = {"model": "sd21", "ops": "conv2d,geglu", "minutes": 5.0, "out": "t.json"}
    assert asked == [chosen, {}, ["sm_80", "sm_90"], None]


def test_tune_without_a_gpu_and_with_wrong_options(fails, monkeypatch, tmp_path):
    import torch

    from fastldm import tuning

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tuning, "missing", lambda backend: "no CUDA device")
    assert "fastldm tune: no CUDA device" in fails("tune")
    assert "minutes=0.0: allowed is a number above 0" in fails("tune", "--minutes", 0)
    assert "only beside --compile-only" in fails("tune", "--target", "sm_90")
    assert "out='t.json': allowed is nothing beside" in fails("tune", "--compile-only", "--out", "t.json")
    assert "target='sm_x': allowed is sm_80 or" in fails("tune", "--compile-only", "--target", "sm_x")
    pytest.importorskip("triton")
    monkeypatch.setattr(tuning, "missing", lambda backend: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    assert "ops='conv3d': allowed is some of attention, conv2d" in fails("tune", "--ops", "conv3d")
    assert "out='none/t.json'" in fails("tune", "--out", "none/t.json")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert "none.safetensors" in fails("tune", "--model", "none.safetensors")
    assert os.listdir() == []
