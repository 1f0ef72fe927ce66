"""The benchmarks' own rules: contenders take turns, none is timed whose result differs; the suite runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bars, bounds, calls, gpu, gpu_models
from benchmarks.compare import race
from fastldm import ops, tuning
from fastldm.bench.contenders import CHANNELS_LAST, EAGER, OURS
from fastldm.bench.race import Row, Table
from fastldm.errors import BackendUnavailable
from fastldm.kernels import measuring

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


def test_the_quick_suite_runs() -> None:
    options = ["benchmarks", "--benchmark-only", "--quick", "-q", "-k", "import or op or (step and float32)"]
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
    assert (
        "Guided step of the UNet of default" in ran.stdout and "import fastldm, without torch" in ran.stdout
    )


def test_bars_stand_beside_what_was_got() -> None:
    table = Table("t", "", 3, {OURS: Row(0.1, 0.12, 0.2, 1.0), EAGER: Row(0.4, 0.4, 0.4, 3.5)})
    assert bars.Bar(3.0, 5.0, EAGER).judge(table) == f"bar: ≥ 3 × {EAGER} (aim 5): 3.50, met"
    assert bars.Bar(0.1).judge(table) == "bar: ≤ 100 ms: 120 ms, MISSED"
    assert bars.Bar(3.0, None, CHANNELS_LAST).judge(table).endswith("not measured")
    wrong = Table("t", "", 3, {OURS: Row(failed="wrong"), EAGER: table.rows[EAGER]})
    assert bars.Bar(3.0, 5.0, EAGER).judge(wrong).endswith("not measured")


def test_the_bars_of_a_cold_start() -> None:
    parts = {"first picture": 1.2, "a later one": 1.0}
    parts |= {"the first of another size": 2.0, "a later one of it": 0.5}
    table = Table("t", "", 1, {f"{OURS}, empty caches": Row(40.0, 40.0, 40.0, 1.0, parts=parts)})
    assert bars.of_cold(table) == ["bar: the first picture once loaded ≤ 1.1 × a later one: 1.20, MISSED"]
    assert [told.rsplit(", ")[-1] for told in bars.of_cold(table, on_gpu=True)] == ["MISSED", "met"]
    assert bars.of_cold(Table("t", "", 1, {})) == ["bar: cold start: not measured"]


def test_a_part_for_models_on_a_gpu_runs_and_is_read_back(tmp_path: Path) -> None:
    """On the CPU, with the shipped model, as what gpu.json keeps."""
    found = gpu.Findings(tmp_path / "gpu.json")
    small = {"device": "cpu", "model": "default", "rounds": 1, "dtype": "fp32"}
    with found.within("sd21-step"):
        gpu_models.run("sd21-step", 0.0, found.add, contenders=["fastldm", "reference"], **small)
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert "failed" not in kept and not gpu.wrong(kept)
    said = gpu.table(kept)
    assert "Guided step of the UNet of default" in said and "bar: ≤ 12.5 ms (aim 10 ms): " in said
    kept["sd21-step"][0]["rows"]["fastldm"]["failed"] = "wrong: error 1"
    assert gpu.wrong(kept) == ["sd21-step: fastldm wrong: error 1"]


def test_a_part_for_models_does_without_who_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastldm.bench import contenders

    absent = {contenders.CONTENDERS["eager"]: "diffusers not installed"}
    monkeypatch.setattr(contenders, "missing", absent.get)
    kept: list[dict[str, object]] = []
    small = {"device": "cpu", "model": "default", "rounds": 1, "dtype": "fp32"}
    gpu_models.run("sd21-step", 0.0, kept.append, contenders=["fastldm", "eager"], **small)
    assert kept[0]["rows"].keys() == {"fastldm"}  # type: ignore[attr-defined]
    assert "eager is missing: diffusers not installed" in kept[0]["notes"]  # type: ignore[operator]


def test_every_part_for_models_names_what_there_is() -> None:
    from fastldm.bench import command, contenders, parts
    from fastldm.presets import PRESETS

    for asked in gpu_models.PARTS.values():
        assert asked["model"] in PRESETS and set(asked["parts"]) <= set(parts.PARTS)
        assert set(asked["contenders"]) <= set(contenders.CONTENDERS)
        assert set(asked) <= set(command.measure.__kwdefaults__)
    assert set(bars.GPU) <= set(gpu_models.PARTS)


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
        "channel_moments": (1, 16, 32),
        "conv2d": (1, 16, 4),
        "geglu": (1, 5, 16),
        "group_norm_silu": (1, 64, 4),
        "guided_step": (1, 4, 4),
        "layer_norm": (1, 5, 16),
        "linear": (600, 16, 16),
        "upsample_conv": (1, 16, 4),
    }
    shapes = {name: (make, [small[name]]) for name, (make, _) in calls.SHAPES.items()}
    right = list(gpu.correctness(("cpp",), (torch.float32,), shapes))
    assert {row["op"] for row in right} == set(small)
    refused = {row["op"] for row in right if "right" not in row}
    assert refused == {"linear"}  # of so many rows in float32 it is left to PyTorch
    assert "packing" in next(row["refused"] for row in right if row["op"] == "linear")
    assert not gpu.wrong({"correctness": right})
    stand_in = ops.geglu.stand_ins["cpp"]
    wrong = replace(stand_in, run=lambda *call: stand_in.run(*call) * 1.01)
    monkeypatch.setitem(ops.geglu.stand_ins, "cpp", wrong)
    rows = list(gpu.correctness(("cpp",), (torch.float32,), shapes))
    assert [row["op"] for row in rows if row.get("right") is False] == ["geglu"]
    told = gpu.wrong({"correctness": rows})
    assert len(told) == 2 and "geglu cpp float32 1 5 16" in told[0] and "RMS error" in told[1]

    def fails(*_: object) -> None:
        raise RuntimeError("out of\nresources")

    monkeypatch.setitem(ops.geglu.stand_ins, "cpp", replace(stand_in, run=fails))
    rows = list(gpu.correctness(("cpp",), (torch.float32,), shapes))
    assert {row["op"] for row in rows} == set(small)  # the other rows are there
    assert gpu.wrong({"correctness": rows}) == [
        "FAILED geglu cpp float32 1 5 16 : RuntimeError: out of resources"
    ]
    late = list(gpu.correctness(("cpp",), (torch.float32,), shapes, until=0.0))
    assert {row["failed"] for row in late} == {"out of time"} and len(late) == len(small)


def test_a_part_that_fails_is_told_and_leaves_the_others(tmp_path: Path) -> None:
    found = gpu.Findings(tmp_path / "gpu.json")
    with found.within("build"):
        raise RuntimeError("no compiler")
    with found.within("tune"):
        found.add("attention: sizes")
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["failed"] == {"build": "RuntimeError: no compiler"} and kept["tune"] == ["attention: sizes"]
    assert "FAILED build: RuntimeError: no compiler" in gpu.table(kept)


def test_the_ops_of_a_gpu_are_judged_by_bound_and_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times by a table in place of a GPU: what is met, what is missed, what fails."""
    machine = bounds.Machine("toy", bytes=1e9, operations=1e12, exponentials=1e12, cache=0)
    took = {"fastldm": 2e-3, "PyTorch": 3e-3, "copy": 1e-3, "cuDNN benchmark": 1e-3}

    def race(contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
        assert contenders["PyTorch"]() is not None
        return {name: took.get(name, 5e-3) for name in contenders}

    monkeypatch.setattr(measuring, "race", race)
    shapes = {
        "group_norm_silu": (calls.group_norm_silu, [(1, 64, 8)]),
        "conv2d": (calls.conv2d, [(1, 16, 4)]),
        "attention": (calls.attention, [(1, 1, 0, 8)]),  # too few numbers for a shape
    }
    rows = {
        row["op"]: row for row in gpu.speeds(torch.float32, shapes, machine, until=time.perf_counter() + 60)
    }
    norm, moved = rows["group_norm_silu"], 2 * 4 * 64 * 64 + 2 * 4 * 64
    assert norm["bytes"] == moved and norm["bound_by"] == "bytes" and norm["bound"] == moved / 1e9
    assert norm["rate"] == f"{moved / 2e-3 / 1e9:.0f} GB/s" and norm["share"] == round(moved / 2e-3 / 1e9, 3)
    assert [(goal["got"], goal["met"]) for goal in norm["targets"]] == [(1.5, False), (0.5, False)]
    assert [(goal["got"], goal["met"]) for goal in rows["conv2d"]["targets"]] == [(0.5, False)]
    assert "TypeError" in rows["attention"]["failed"]
    said = gpu.table({"ops": list(rows.values())})
    assert "MISSED ≥ 2 × PyTorch: 1.5" in said and said.count("FAILED attention") == 1


def test_work_is_that_of_the_definitions() -> None:
    """SD1.5's largest attention takes 42.9 GFLOP and 2.7e8 exponentials. (performance notes, section 4)"""
    q = k = v = torch.empty(2, 8, 4096, 40, dtype=torch.bfloat16, device="meta")
    told = bounds.work("attention", (q, k, v, None, False))
    assert (told.bytes, told.exponentials) == (4 * q.nbytes, 2 * 8 * 4096**2)
    assert told.operations == 42_949_672_960 and told.bound(bounds.H200)[1] == "exponentials"
    x = torch.empty(2, 320, 64, 64, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(640, 320, 3, 3, dtype=torch.bfloat16, device="meta")
    told = bounds.work("conv2d", (x, weight, None, 2, 1, None))
    assert told.operations == 2 * (2 * 640 * 32 * 32) * 320 * 9
    assert told.bytes == x.nbytes + weight.nbytes + 2 * (2 * 640 * 32 * 32)


def test_the_prediction_holds_the_flops_of_a_step_and_a_decode(capsys: pytest.CaptureFixture[str]) -> None:
    """1.607 and 2.515 TFLOP, less the 2.5 % that both halves of guidance share and what `condition` does once
    a request. (performance notes, sections 2 and 3)
    """
    listed = tuning.calls_of("sd15", torch.bfloat16)
    split = next(i for i, call in enumerate(listed) if call.op == "guided_step") + 1
    sums = [
        sum(bounds.work(call.op, call.arguments).operations for call in part) / 1e12
        for part in (listed[:split], listed[split:])
    ]
    assert sums[0] == pytest.approx(0.975 * 1.607, rel=0.01) and sums[1] == pytest.approx(2.515, rel=0.005)
    assert gpu.main(["--predict"]) == 0
    done = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| **step** | 368 ") for line in done)
    assert any("attention 2x8x4096x40" in line and "≥ 1.3 × SDPA" in line for line in done)
