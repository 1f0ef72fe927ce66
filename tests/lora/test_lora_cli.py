"""`fastldm generate --lora FILE[:WEIGHT]`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastldm
from fastldm import cli
from fastldm.images import read_metadata

FIXTURES = Path(__file__).parents[1] / "fixtures" / "lora"
KOHYA, PEFT = FIXTURES / "lora_kohya_sd15.safetensors", FIXTURES / "lora_peft.safetensors"


def pixels(file: str) -> np.ndarray:
    return np.asarray(Image.open(file))


@pytest.fixture
def generate(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """generate(*options): the exit code of the command, in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def run(*options: object) -> int:
        given = ("generate", "--model", base_folder, "--steps", 2, "--quiet", *options)
        return cli.main([str(option) for option in given])

    return run


def test_loras_are_merged_recorded_and_asked_for(generate, pipe, capsys) -> None:
    loras = ("--lora", f"{KOHYA}:0.5", "--lora", PEFT)
    assert generate("a cat", "-o", "one.png", *loras) == 0
    pipe.load_lora(KOHYA, 0.5)
    pipe.load_lora(PEFT)
    want = pipe.generate("a cat", steps=2).image
    assert np.array_equal(pixels("one.png"), np.asarray(want))
    made = read_metadata("one.png")["fastldm"]["loras"]
    assert [(each["file"], each["weight"]) for each in made] == [(str(KOHYA), 0.5), (str(PEFT), 1.0)]
    capsys.readouterr()
    assert generate("--replay", "one.png") == 2
    error = capsys.readouterr().err
    assert "lora=None: allowed is --lora FILE:WEIGHT" in error and "lora_kohya_sd15" in error
    assert generate("--replay", "one.png", *loras, "-o", "two.png") == 0
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()
    assert "not the one used before" not in capsys.readouterr().err
    assert generate("--replay", "one.png", *loras[:2], "-o", "three.png") == 0
    assert "--lora is not the one used before" in capsys.readouterr().err


def test_a_colon_may_belong_to_the_name(generate, monkeypatch) -> None:
    loaded = []
    monkeypatch.setattr(fastldm.Pipeline, "load_lora", lambda _, path, weight: loaded.append((path, weight)))
    Path("style:2").touch()
    options = [
        part for name in ("a:b", "style:2", "style:2:-0.5", "x.safetensors") for part in ("--lora", name)
    ]
    assert generate("a cat", *options) == 0
    assert loaded == [("a:b", 1.0), ("style:2", 1.0), ("style:2", -0.5), ("x.safetensors", 1.0)]


def test_errors_are_one_line(generate, capsys) -> None:
    for lora, why in (
        ("none.safetensors", "none.safetensors: cannot be read"),
        (f"{KOHYA}:nan", "weight=nan"),
    ):
        assert generate("a cat", "--lora", lora) == 2
        error = capsys.readouterr().err
        assert error.startswith("fastldm: error: ") and why in error and error.count("\n") == 1
    assert not list(Path().iterdir())
