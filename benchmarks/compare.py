"""Contenders side by side: one call of each in turn, round after round, so that a slow moment hits all alike.

A speedup without agreement is none: nothing is timed before all contenders gave the same result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

Result = Tensor | tuple[Tensor, ...]
Contenders = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Row:
    """One contender: seconds, and its time over the first one's, the median over the rounds."""

    minimum: float
    median: float
    ratio: float
    rate: float | None  # work a second, at the minimum
    error: float | None  # largest difference from the truth, over the truth's largest value


@dataclass(frozen=True)
class Table:
    """What a race gave."""

    title: str
    unit: str
    rounds: int
    rows: dict[str, Row]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        width = max(map(len, self.rows))
        lines = [f"{self.title}; {self.rounds} rounds"]
        lines.append(f"  {'':{width}} {'min':>9} {'median':>9} {'/ first':>8} {self.unit:>8} {'error':>8}")
        for name, row in self.rows.items():
            rate = "" if row.rate is None else f"{row.rate:.1f}"
            error = "" if row.error is None else f"{row.error:.1e}"
            times = f"{seconds(row.minimum):>9} {seconds(row.median):>9} {row.ratio:>8.2f}"
            lines.append(f"  {name:{width}} {times} {rate:>8} {error:>8}".rstrip())
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def race(
    benchmark: Any,
    title: str,
    contenders: Contenders,
    *,
    budget: float,
    truth: str | Result = "",
    tolerance: float = 0.0,
    work: float = 0.0,
    unit: str = "",
) -> Table:
    """Check that the contenders agree with `truth`, then time as many rounds as fit into `budget` seconds.

    truth: one of them, or a result. 3 rounds or more, one for a budget of 0. work: 10⁹ operations or bytes
    a call, for a `unit` a second. pytest-benchmark's own table shows the first contender.
    """
    errors = agree(contenders, truth, tolerance)
    rounds = 1 if budget == 0 else max(3, min(500, int(budget / sum(map(elapsed, contenders.values())))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    first, *others = contenders

    def once(name: str) -> None:
        times[name].append(elapsed(contenders[name]))

    benchmark.pedantic(once, (first,), setup=lambda: [once(name) for name in others] and None, rounds=rounds)
    rows = {
        name: Row(
            minimum=min(spent),
            median=median(spent),
            ratio=median(one / base for one, base in zip(spent, times[first], strict=True)),
            rate=work / min(spent) if work else None,
            error=errors.get(name),
        )
        for name, spent in times.items()
    }
    return Table(title, unit, rounds, rows)


def agree(contenders: Contenders, truth: str | Result, tolerance: float) -> dict[str, float]:
    """Call each once; the errors of what they give, AssertionError where one is above the tolerance.

    A result is a tensor, a tuple of them, or None for nothing to agree on.
    """
    made = {name: run() for name, run in contenders.items()}
    flat = {name: _flat(result) for name, result in made.items() if result is not None}
    errors = {}
    for name, result in flat.items():
        wanted = flat[truth] if isinstance(truth, str) else _flat(truth)
        errors[name] = float((result - wanted).abs().max() / wanted.abs().max())
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"no timing counts: relative errors {wrong} are above {tolerance}"
    return errors


def _flat(result: Result) -> Tensor:
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([part.double().flatten() for part in parts])


def elapsed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile at its best on a CPU: shapes fixed, weights packed. Drops what it compiled before."""
    torch.compiler.reset()  # else the ninth shape of a function silently runs eager
    return torch.compile(function, dynamic=False, options={"freezing": True})


def seconds(value: float) -> str:
    """1.23 s, 4.56 ms, 7.89 µs."""
    scale, unit = (1.0, "s") if value >= 1 else (1e3, "ms") if value >= 1e-3 else (1e6, "µs")
    return f"{value * scale:.3g} {unit}"
