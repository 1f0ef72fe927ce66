"""`python -m pytest benchmarks --benchmark-only`: options, the `race` fixture, and the tables at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compare
from fastldm.bench import machine
from fastldm.bench.race import Table

TABLES = pytest.StashKey[list[Table]]()
RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("fastldm").addoption
    add("--quick", action="store_true", help="small sizes, one round, no torch.compile: does everything run?")
    add("--full", action="store_true", help="torch.compile of full-size models too; four times the rounds")
    add("--model", metavar="FOLDER", help="a model other than the shipped one, by path")
    add("--json-out", metavar="NAME", help="write the tables and the machine to benchmarks/results/NAME.json")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = []


@pytest.fixture(scope="session")
def effort(pytestconfig: pytest.Config) -> int:
    """Times the usual: 0 with --quick, 4 with --full."""
    return 0 if pytestconfig.getoption("quick") else 4 if pytestconfig.getoption("full") else 1


@pytest.fixture
def keep(benchmark: Any, pytestconfig: pytest.Config) -> Callable[[Table], None]:
    """Takes a table to be printed at the end, and into pytest-benchmark's own file."""

    def take(table: Table) -> None:
        pytestconfig.stash[TABLES].append(table)
        benchmark.extra_info.update(asdict(table))

    return take


@pytest.fixture
def race(benchmark: Any, keep: Callable[[Table], None], effort: int) -> Iterator[Callable[..., Table]]:
    """`compare.race`, once a test, its budget that of the default run; the table is printed at the end."""
    made: list[Table] = []

    def run(title: str, contenders: compare.Contenders, *, budget: float, **rest: Any) -> Table:
        made.append(compare.race(benchmark, title, contenders, budget=effort * budget, **rest))
        return made[0]

    with torch.inference_mode():
        yield run
    for table in made:
        keep(table)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    tables, name = config.stash[TABLES], config.getoption("json_out")
    if not tables:
        return
    facts = machine.describe()
    terminalreporter.section("contenders, interleaved in the same run")
    terminalreporter.write_line("\n\n".join([machine.headline(facts), *map(str, tables)]))
    if name:
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps({"machine": facts, "tables": [asdict(table) for table in tables]}, indent=1)
        (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
