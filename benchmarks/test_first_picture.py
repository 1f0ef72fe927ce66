"""Importing fastldm; the shipped model's first picture from process start, and a later one; diffusers too."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fastldm
from benchmarks.compare import Table, seconds
from benchmarks.first_picture import load_diffusers, load_fastldm

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
SHIPPED = Path(fastldm.__file__).parent / "assets" / "default"
IMPORT = """
import sys, time
began = time.perf_counter()
import fastldm
print(time.perf_counter() - began)
assert "torch" not in sys.modules
"""


def python(*arguments: object) -> str:
    """What a fresh Python prints."""
    ran = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def bar(what: str, spent: float, allowed: float) -> str:
    """A line that is printed and kept but fails nothing: the bars are for two idle cores."""
    return f"{what}: median {seconds(spent)}, bar {allowed} s {'met' if spent <= allowed else 'MISSED'}"


@pytest.fixture
def model(pytestconfig: pytest.Config) -> Path:
    folder = Path(pytestconfig.getoption("model") or SHIPPED)
    if not folder.is_dir():
        pytest.skip(f"there is no model in {folder}")
    return folder.absolute()


@pytest.fixture
def steps(effort: int) -> int:
    return 25 if effort else 2


def test_import(race: Callable[..., Table]) -> None:
    spent: list[float] = []

    def importing() -> None:
        spent.append(float(python("-c", IMPORT)))

    def bare() -> None:
        python("-c", "pass")

    contenders = {"python, import fastldm": importing, "python": bare}
    table = race("processes that import fastldm, or nothing", contenders, budget=4.0)
    table.notes.append(bar("import fastldm, without torch", median(spent[1:]), 0.15))


def test_first_picture(race: Callable[..., Table], model: Path, steps: int, tmp_path: Path) -> None:
    splits: dict[str, list[dict[str, float]]] = {"fastldm": [], "diffusers": []}

    def picture(library: str) -> Tensor:
        file, moment, split = tmp_path / f"{library}.png", time.time(), {}
        finished = json.loads(python("-m", "benchmarks.first_picture", library, model, file, steps))
        for part, then in finished.items():
            split[part], moment = then - moment, then
        splits[library].append(split)
        return torch.from_numpy(np.array(Image.open(file))) / 255

    contenders = {"fastldm": lambda: picture("fastldm"), "diffusers": lambda: picture("diffusers")}
    title = f"process for one picture of {model.name}, {steps} steps"
    table = race(title, contenders, budget=40.0, truth="diffusers", tolerance=1.5 / 255)  # one grey level
    for library, made in splits.items():
        parts = {part: median(split[part] for split in made[1:]) for part in made[0]}
        table.notes.append(f"{library}: " + ", ".join(f"{part} {seconds(s)}" for part, s in parts.items()))
    saved = median(sum(split.values()) for split in splits["fastldm"][1:])
    table.notes.append(bar("fastldm, from process start until the picture is saved", saved, 4.0))


def test_later_picture(race: Callable[..., Table], model: Path, steps: int) -> None:
    ours, theirs = load_fastldm(str(model)), load_diffusers(str(model))
    contenders = {
        "fastldm": lambda: torch.from_numpy(ours(steps, "np").images),
        "diffusers, channels last": lambda: torch.from_numpy(theirs(steps, "np").images),
    }
    title = f"picture of {model.name} once loaded, {steps} steps"
    table = race(title, contenders, budget=20.0, truth="diffusers, channels last", tolerance=1e-4)
    table.notes.append(bar("fastldm", table.rows["fastldm"].median, 1.0))
