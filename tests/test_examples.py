"""Every example runs as its first lines say, and writes what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import fastldm
from fastldm.images import read_metadata

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: str, folder: Path, code: int = 0) -> list[str]:
    """The lines that an example prints when run from `folder`."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert not done.stderr
    return done.stdout.splitlines()


def made(path: Path) -> dict[str, object]:
    """The arguments that a picture says it was made with."""
    return read_metadata(path)["fastldm"]["arguments"]


def test_all_examples_are_tested() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == {
        "threads",
        "preview",
        "batch",
        "asynchronous",
        "tasks",
    }


def test_threads(tmp_path: Path) -> None:
    lines = run("threads", folder=tmp_path)
    assert sorted(file.name for file in tmp_path.glob("pictures/*")) == ["circle.png", "triangle.png"]
    assert made(tmp_path / "pictures/circle.png")["prompt"] == "a red circle on a white background"
    assert "a large green square: cancelled" in lines
    steps = [line for line in lines if line.startswith("a large green square: step")]
    assert 3 <= len(steps) < 20  # cancelled after the third, of a thousand
    # What one thread alone makes, whatever ran beside it.
    alone = fastldm.load().generate("a red circle on a white background", steps=10, seed=7).image
    with Image.open(tmp_path / "pictures/circle.png") as picture:
        assert (
            np.abs(np.asarray(picture, int) - np.asarray(alone, int)).max() <= 1
        )  # threads of another count


def test_preview(tmp_path: Path) -> None:
    assert run("preview", "strip.png", folder=tmp_path) == ["6 previews and the picture: strip.png"]
    with Image.open(tmp_path / "strip.png") as strip:
        pixels = np.asarray(strip, float).reshape(128, 7, 128, 3).swapaxes(0, 1)
    last, picture = pixels[5], pixels[6]
    # The last preview shows the picture, but for detail: nearer to it than to one of its mean colour.
    assert np.square(last - picture).mean() < 0.2 * np.square(picture - picture.mean((0, 1))).mean()
    errors = [np.square(preview - picture).mean() for preview in pixels[:6]]
    assert errors[5] < errors[0]


def test_asynchronous(tmp_path: Path) -> None:
    lines = run("asynchronous", "out", folder=tmp_path)
    assert sorted(file.name for file in tmp_path.glob("out/*")) == ["blue.png", "red.png"]
    assert made(tmp_path / "out/red.png")["steps"] == 10
    assert [line for line in lines if line.startswith("red.png")] == [
        f"red.png: step {done}" for done in range(1, 11)
    ]
    assert lines[-1] == "the third took too long and was stopped"


def test_batch_resumes(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# two pictures\na red circle\n\na blue square\n", encoding="utf-8")
    lines = run("batch", "prompts.txt", "out", "--steps", "2", folder=tmp_path)
    assert lines[0] == "2 pictures, 0 already there"
    first, second = sorted(tmp_path.glob("out/*"))
    assert [made(path)["prompt"] for path in (first, second)] == ["a red circle", "a blue square"]
    before = first.stat().st_mtime_ns
    second.unlink()
    prompts.write_text("a red circle\na yellow star\n", encoding="utf-8")
    assert run("batch", "prompts.txt", "out", "--steps", "2", folder=tmp_path)[0] == (
        "2 pictures, 1 already there"
    )
    again, changed = sorted(tmp_path.glob("out/*"))
    assert again == first and first.stat().st_mtime_ns == before
    assert changed.name != second.name and made(changed)["prompt"] == "a yellow star"


def test_batch_of_json_tells_errors_and_goes_on(tmp_path: Path) -> None:
    jobs = [
        "a red circle",
        {"prompt": "a star", "stepz": 3},
        {"prompt": "a blue square", "seed": 5, "steps": 3},
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    lines = run("batch", "jobs.json", "out", "--steps", "2", folder=tmp_path, code=1)
    assert len([line for line in lines if "stepz" in line and "'steps'" in line]) == 1
    first, second = sorted(tmp_path.glob("out/*"))
    assert (made(first)["steps"], made(second)["steps"], made(second)["seed"]) == (2, 3, 5)


def test_batch_with_nothing_to_do_loads_no_model(tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("", encoding="utf-8")
    assert run("batch", "none.txt", "out", "--model", "nowhere", folder=tmp_path) == [
        "0 pictures, 0 already there"
    ]


def test_every_task_has_its_command_and_pictures_in_the_docs(tmp_path: Path) -> None:
    """examples/tasks.py runs what docs/tasks.md shows."""
    printed = run("tasks", str(tmp_path / "made"), folder=tmp_path)
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    commands = [line for line in printed if line.startswith("fastldm ")]
    assert len(commands) >= 8
    for command in commands:
        assert command in text
        name = command.split("-o ")[1]
        assert (tmp_path / "made" / name).is_file() and name in printed
        assert (ROOT / "docs" / "tasks" / name).is_file() and f"tasks/{name}" in text
