"""The model in the package: its files, its offline use, and the main job from the command line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastldm
from fastldm.scenes.check import read_object
from fastldm.scenes.exam import questions
from fastldm.scenes.judge import Judge

ASSETS = Path(fastldm.__file__).parent / "assets"
PROMPT = "a black circle on a yellow background"


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastldm", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_assets_are_small_and_described() -> None:
    size = sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file())
    assert size <= 25 * 2**20
    card = (ASSETS / "default" / "README.md").read_text()
    assert "scenes.toml" in card and "cannot" in card


def test_it_generates_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "__init__", refuse)
    result = fastldm.load().generate(PROMPT, steps=2)
    assert result.image.size == (128, 128) and not result.warnings


def test_the_judge_reads_what_was_asked_for() -> None:
    """Text encoder, UNet, guidance, sampler and decoder together: of 20 such pictures 20 were right."""
    asked = [question for question in questions() if question.category == "colours"][:10]
    pictures = fastldm.generate([each.prompt for each in asked], seed=list(range(10)), steps=25).images
    readings = Judge.load().read(np.stack([np.asarray(picture) for picture in pictures]))
    assert sum(each.is_right(reading) for each, reading in zip(asked, readings, strict=True)) >= 7


def test_unknown_words_are_named() -> None:
    result = fastldm.generate("a large red zebra, please", steps=1)
    assert result.warnings == ("unknown words: zebra, please",)


def test_command_line_makes_the_picture_and_replays_it(tmp_path: Path) -> None:
    made = run("generate", PROMPT, "--steps", "25", "--seed", "1", "-o", "made.png", folder=tmp_path)
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == "made.png"
    with Image.open(tmp_path / "made.png") as picture:
        pixels = np.asarray(picture)
    seen = read_object(pixels)
    assert (seen.kind, seen.colour, seen.background) == ("circle", "black", "yellow")
    again = run("generate", "--replay", "made.png", "-o", "again.png", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    with Image.open(tmp_path / "again.png") as picture:
        assert np.array_equal(np.asarray(picture), pixels)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", PROMPT, "--steps", "0"),
        ("generate", PROMPT, "--model", "nowhere/at/all"),
        ("generate", PROMPT, "-o", "no/such/folder/made.png"),
        ("info", "nothing.safetensors"),
    ],
    ids=["steps", "model", "output", "info"],
)
def test_errors_are_one_line_and_exit_code_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    failed = run(*arguments, folder=tmp_path)
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.startswith("fastldm: error: ") and failed.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
