"""Whole steps, decodes and pictures: fastldm, diffusers and torch.compile, as `fastldm bench` races them.

At full size torch.compile is left to --full: it takes minutes, which are reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import bars
from benchmarks.compare import pedantic, rounds_within
from fastldm.bench.cases import Case, Model
from fastldm.bench.contenders import CHANNELS_LAST, COMPILED, OURS, REFERENCE, missing
from fastldm.bench.lineup import Setup, lined_up
from fastldm.bench.models import open_model
from fastldm.bench.parts import TITLES, cold, title
from fastldm.bench.race import Table

pytestmark = pytest.mark.skipif(missing(CHANNELS_LAST) is not None, reason=str(missing(CHANNELS_LAST)))

DTYPES = ["float32", "bfloat16"]
BUDGET = {"sd15": 150.0, "default": 10.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Model]:
    """Models by name and dtype, the random ones written once."""
    opened: dict[tuple[str, str], Model] = {}

    def get(name: str, dtype: str) -> Model:
        if (name, dtype) not in opened:
            opened[name, dtype] = open_model(name, getattr(torch, dtype), tmp_path_factory.mktemp("model"))
        return opened[name, dtype]

    return get


@pytest.fixture
def setup(models: Any, effort: int, pytestconfig: pytest.Config) -> Callable[[str, str], Setup]:
    """A race of a model in a dtype on the CPU, as strong as the effort."""

    def get(name: str, dtype: str) -> Setup:
        if name == "sd15" and not effort:
            pytest.skip("full size is not for --quick")
        model = models(name if name == "sd15" else pytestconfig.getoption("model") or name, dtype)
        names = [OURS, REFERENCE, CHANNELS_LAST] if effort else [OURS, CHANNELS_LAST]
        if effort > (name == "sd15"):
            names.append(COMPILED)
        return Setup(model, "cpu", dtype, names, rounds=effort, minutes=0.0, steps=25 if effort else 2)

    return get


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("part", "name"),
    [("step", "default"), ("step", "sd15"), ("vae", "default"), ("vae", "sd15"), ("image", "default")],
)
def test_race(
    setup: Any, benchmark: Any, keep: Callable[[Table], None], effort: int, part: str, name: str, dtype: str
) -> None:
    asked = setup(name, dtype)
    case = Case(1, asked.model.side)
    with lined_up(asked, part, case) as lineup:
        assert OURS not in lineup.failed, lineup.failed
        for contender in lineup.race.timers:
            lineup.race.once(contender)
        a_round = sum(times.pop() for times in lineup.race.times.values())
        pedantic(benchmark, lineup.race, rounds_within(effort * BUDGET[name], a_round))
        table = lineup.table(title(TITLES[part], asked, case))
    table.notes.extend(bar.judge(table) for bar in bars.CPU.get((name, part), ()))
    keep(table)


def test_cold_start(setup: Any, benchmark: Any, keep: Callable[[Table], None], effort: int) -> None:
    asked = replace(setup("default", "float32"), contenders=[OURS, CHANNELS_LAST], rounds=3 if effort else 1)
    table = benchmark.pedantic(lambda: next(cold(asked, Case(1, asked.model.side))), rounds=1)
    assert not any(row.failed for name, row in table.rows.items() if name.startswith(OURS)), table
    table.notes.extend(bars.of_cold(table))
    keep(table)
