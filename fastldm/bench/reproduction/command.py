"""`fastldm bench ddim | tradeoff | objectives | guidance`: run missing cells, print the table."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastldm import checks
from fastldm.bench import machine
from fastldm.bench.report import check_file, say
from fastldm.bench.reproduction import cells
from fastldm.bench.reproduction.cells import Cell, Results
from fastldm.bench.reproduction.lab import NAMED_FROM, Lab, OutOfTime
from fastldm.bench.reproduction.plot import draw
from fastldm.bench.reproduction.settings import Settings
from fastldm.bench.reproduction.statistics import MOST_SEEDS
from fastldm.bench.reproduction.tables import TABLES, Found, plan
from fastldm.errors import CheckpointError, FastLDMError, InvalidArgument
from fastldm.images import encode_png, write_files
from fastldm.scenes.judge import WEIGHTS, Judge

RESULTS = Path("benchmarks/results/reproduction.json")
WORKSHOP = Path("runs/reproduction")
SETTINGS = Settings()
TRAINING, EVALUATION = 40e9, 85e9
"""Operations a second that one Zen 4 core does on these nets; what --dry-run estimates with."""


def run(
    *,
    table: str,
    minutes: float | None = None,
    seeds: int = 3,
    dry_run: bool = False,
    pixel: bool = False,
    json_file: str | None = None,
    plot: str | None = None,
    judge: str | None = None,
) -> None:
    """Run the missing cells of a table until the minutes are up (None: all), then print it from the file.

    Ctrl-C keeps what is done, prints the table, and goes through. InvalidArgument before any work;
    FastLDMError at the end where a cell failed.
    """
    checks.choice("part", table, tuple(TABLES))
    deadline = math.inf if minutes is None else checks.number("minutes", minutes, 0.0, 1e6) * 60
    seeds = checks.integer("seeds", seeds, 1, MOST_SEEDS)
    if pixel and table != "ddim":
        raise InvalidArgument("pixel", True, "only with ddim")
    file = RESULTS if json_file is None else Path(json_file)
    for name, path in (("json", file), ("plot", None if plot is None else Path(plot))):
        check_file(name, path)
    wanted = plan(table, seeds, pixel)
    if dry_run:
        known = judge is not None or WEIGHTS.exists()  # no row is of a judge that is not there
        results = Results.open(file, SETTINGS.digest(), judge_hash(judge) if known else "")
        print(estimated(wanted, results))
        return
    reader = Judge.load(judge, NAMED_FROM)
    results = Results.open(file, SETTINGS.digest(), judge_hash(judge))
    lab = Lab(SETTINGS, WORKSHOP, reader, results.judge, say, time.monotonic() + deadline)
    failed: list[str] = []
    interrupted = None
    try:
        failed = cells.run(wanted, lab, results, _facts)
    except OutOfTime:
        say("the minutes are up; what was reached is kept")
    except KeyboardInterrupt as error:
        interrupted = error
        say("stopped; what was reached is kept")
    found = TABLES[table](Found(results, seeds), pixel)
    print(found)
    left = cells.missing(wanted, results)
    print(f"  {len(wanted) - len(left)} of {len(wanted)} cells, from {file}; settings {results.settings}")
    if results.foreign():
        print(f"  {results.foreign()} rows of other settings or another judge are left out")
    if plot is not None:
        headline = machine.headline(machine.describe())
        write_files({Path(plot): encode_png(draw(found.panels, headline))})
    if interrupted is not None:
        raise interrupted
    if failed:
        raise FastLDMError(f"{len(failed)} cells failed: {'; '.join(failed)}")


def judge_hash(path: str | os.PathLike[str] | None) -> str:
    """Of a judge's weights file; CheckpointError where there is none."""
    file = Path(WEIGHTS if path is None else path)
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise CheckpointError(file, None, f"cannot be read: {error.strerror}") from None


def seconds(cell: Cell, threads: int) -> float:
    """What a cell takes, about, on so many cores."""
    training, evaluation = cell.flops(SETTINGS)
    return (training / TRAINING + evaluation / EVALUATION) / threads


def estimated(wanted: Sequence[Cell], results: Results) -> str:
    """What the missing cells cost on this many threads: floating-point operations and time."""
    todo, threads = cells.missing(wanted, results), torch.get_num_threads()
    lines = []
    for name in dict.fromkeys(cell.name for cell in todo):
        same = [cell for cell in todo if cell.name == name]
        flops, minutes = sum(same[0].flops(SETTINGS)), seconds(same[0], threads) / 60
        seeds = ", ".join(str(cell.seed) for cell in same)
        lines.append(f"  {name:44} {flops / 1e12:6.1f} TFLOP, {minutes:5.1f} min each, seeds {seeds}")
    total = sum(seconds(cell, threads) for cell in todo) / 60
    rates = f"{TRAINING / 1e9:g} GFLOP/s a core in training, {EVALUATION / 1e9:g} in evaluation"
    said = f"{len(todo)} of {len(wanted)} cells are missing: about {total:.0f} minutes on {threads} threads"
    return "\n".join([*lines, f"  {said} ({rates})"])


def _facts() -> dict[str, Any]:
    facts = machine.describe()
    return {"machine": machine.headline(facts), "commit": facts["commit"]}
