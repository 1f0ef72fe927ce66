"""The benchmarks' own rules: contenders take turns, none is timed whose result differs; the suite runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import calls, gpu
from benchmarks.compare import race, seconds
from fastldm import ops
from fastldm.errors import BackendUnavailable

ROOT = Path(__file__).parents[1]


class Benchmark:
    """Stands in for pytest-benchmark's fixture."""

    def pedantic(
        self, run: Callable[..., None], args: tuple[str], setup: Callable[[], None], rounds: int
    ) -> None:
        for _ in range(rounds):
            assert setup() is None
            run(*args)


def test_contenders_take_turns_and_rates_follow_from_the_minimum() -> None:
    called: list[str] = []

    def contender(name: str) -> Callable[[], torch.Tensor]:
        return lambda: called.append(name) or torch.ones(2)

    contenders = {name: contender(name) for name in "abc"}
    table = race(Benchmark(), "t", contenders, budget=1e-9, truth="c", work=3.0, unit="GB/s")
    agreeing_and_calibrating = 2
    assert called == ["a", "b", "c"] * agreeing_and_calibrating + ["b", "c", "a"] * 3
    assert table.rounds == 3 and table.rows["a"].ratio == 1.0
    assert all(row.rate == 3.0 / row.minimum and row.minimum <= row.median for row in table.rows.values())
    assert str(table).splitlines()[2].split()[0] == "a"


@pytest.mark.parametrize(
    "wrong", [torch.tensor([1.0, 2.1]), torch.tensor([1.0, float("nan")])], ids=["off", "nan"]
)
def test_a_contender_that_differs_is_not_timed(wrong: torch.Tensor) -> None:
    contenders = {"ours": lambda: (wrong,), "theirs": lambda: torch.tensor([1.0, 2.0]), "copy": lambda: None}
    with pytest.raises(AssertionError, match="no timing counts.*ours"):
        race(Benchmark(), "t", contenders, budget=0, truth="theirs", tolerance=1e-2)


def test_seconds_have_three_digits_and_a_unit() -> None:
    assert [seconds(s) for s in (12.345, 0.0123, 4.5e-6)] == ["12.3 s", "12.3 ms", "4.5 µs"]


def test_the_quick_suite_runs() -> None:
    options = ["benchmarks", "--benchmark-only", "--quick", "-q", "-k", "import or op or unet"]
    # Without what xdist leaves for its workers, under which pytest-benchmark times nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "UNet step of scenes" in ran.stdout and "import fastldm, without torch" in ran.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_the_gpu_script_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--only", "ops", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "benchmarks.gpu: no CUDA device\n" and not (tmp_path / "out").exists()


def test_the_gpu_scripts_correctness_on_the_kernels_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds the right ones right, a wrong one wrong, and says why one is refused."""
    pytest.importorskip("fastldm.ops.cpp", exc_type=BackendUnavailable)
    small = {
        "attention": (1, 2, 9, 9, 40),
        "conv2d": (1, 16, 4),
        "geglu": (1, 5, 16),
        "group_norm_silu": (1, 64, 4),
        "guided_step": (1, 4, 4),
        "layer_norm": (1, 5, 16),
        "upsample_conv": (1, 16, 4),
    }
    shapes = {name: (make, [small[name]]) for name, (make, _) in calls.SHAPES.items()}
    right = list(gpu.correctness(("cpp",), (torch.float32,), shapes))
    assert {row["op"] for row in right} == set(small)
    assert [row["op"] for row in right if not row["right"]] == ["attention"]  # too small for it in float32
    assert "torch" in next(row["refused"] for row in right if row["op"] == "attention").lower()
    stand_in = ops.geglu.stand_ins["cpp"]
    wrong = replace(stand_in, run=lambda *call: stand_in.run(*call) * 1.01)
    monkeypatch.setitem(ops.geglu.stand_ins, "cpp", wrong)
    rows = list(gpu.correctness(("cpp",), (torch.float32,), shapes))
    assert [row["op"] for row in rows if row["right"] is False] == ["geglu"]
    assert gpu.table({"machine": {}, "correctness": rows}).count("WRONG") == 1
