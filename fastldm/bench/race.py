"""Contenders in turn, one call of each a round, so that a slow moment hits all alike; the table of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles

from torch import Tensor

FEWEST = 3  # rounds, however long they take


@dataclass(frozen=True)
class Error:
    """A result's distance from the truth, over the truth's largest value."""

    largest: float
    rms: float

    @classmethod
    def of(cls, result: Tensor, truth: Tensor) -> Error:
        """Of any shapes of as many numbers; NaN anywhere makes NaN."""
        result, truth = result.double().flatten(), truth.double().flatten()
        scale, off = truth.abs().max(), result - truth
        return cls(float(off.abs().max() / scale), float(off.square().mean().sqrt() / scale))

    def within(self, largest: float, rms: float) -> bool:
        """Whether neither is above what is allowed; NaN is."""
        return self.largest <= largest and self.rms <= rms


@dataclass(frozen=True)
class Row:
    """One contender. `failed` says why it has no times: it is wrong, or could not run."""

    minimum: float | None = None  # seconds, as all times
    median: float | None = None
    p90: float | None = None
    ratio: float | None = None  # its time over the first one's, the median over the rounds
    rate: float | None = None  # work a second, at the minimum
    error: float | None = None  # the largest, as in `Error`
    rms: float | None = None
    failed: str | None = None
    parts: dict[str, float] = field(default_factory=dict)  # what the time is made of, medians
    bytes: dict[str, int] = field(default_factory=dict)  # memory, at named moments
    curves: dict[str, list[tuple[float, float]]] = field(
        default_factory=dict
    )  # size → seconds, by what grows
    exponents: dict[str, float] = field(default_factory=dict)  # of these curves


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
        lines = [f"{self.title}; {self.rounds} round{'s' * (self.rounds != 1)}"]
        if any(row.minimum is not None or row.failed for row in self.rows.values()):
            heads = (
                f"{'min':>9} {'median':>9} {'p90':>9} {'/ first':>8} {self.unit:>8} {'error':>8} {'rms':>8}"
            )
            lines.append(f"  {'':{width}} {heads}")
            lines += [f"  {name:{width}} {_figures(row)}".rstrip() for name, row in self.rows.items()]
        for name, row in self.rows.items():
            told = [f"{part} {seconds(spent)}" for part, spent in row.parts.items()]
            told += [f"{moment} {size / 2**20:,.0f} MiB" for moment, size in row.bytes.items()]
            told += [f"{what} {_curve(points)}" for what, points in row.curves.items()]
            if row.minimum is None and row.error is not None:
                told.append(f"error {row.error:.1e}, rms {row.rms:.1e}")
            told += [f"cost ~ {what}^{exponent:.2f}" for what, exponent in row.exponents.items()]
            if told:
                lines.append(f"  {name}: {', '.join(told)}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def _figures(row: Row) -> str:
    if row.failed is not None:
        return row.failed
    times = [f"{'' if each is None else seconds(each):>9}" for each in (row.minimum, row.median, row.p90)]
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    rate = "" if row.rate is None else f"{row.rate:.1f}"
    errors = [f"{'' if each is None else f'{each:.1e}':>8}" for each in (row.error, row.rms)]
    return " ".join([*times, f"{ratio:>8}", f"{rate:>8}", *errors])


def _curve(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{size:g}: {seconds(spent)}" for size, spent in points)


class Race:
    """Rounds of contenders, each a function that makes one call and gives its seconds; the first is ours."""

    def __init__(self, timers: Mapping[str, Callable[[], float]]) -> None:
        self.timers = timers
        self.times: dict[str, list[float]] = {name: [] for name in timers}

    def once(self, name: str) -> None:
        """One call of one contender."""
        self.times[name].append(self.timers[name]())

    def run(self, rounds: int, budget: float) -> None:
        """As many rounds, or those that fit into `budget` seconds, then `FEWEST` at least."""
        until = time.perf_counter() + budget
        for done in range(rounds):
            if done >= FEWEST and time.perf_counter() > until:
                return
            for name in self.timers:
                self.once(name)

    @property
    def rounds(self) -> int:
        """Rounds so far."""
        return min(map(len, self.times.values()), default=0)

    def rows(self, work: float = 0.0, errors: Mapping[str, Error] | None = None) -> dict[str, Row]:
        """work: of a call, for a rate in as much a second."""
        base = next(iter(self.times.values()), [])
        return {
            name: Row(
                minimum=min(spent),
                median=median(spent),
                p90=quantiles(spent, n=10, method="inclusive")[-1] if len(spent) > 1 else spent[0],
                ratio=median(one / first for one, first in zip(spent, base, strict=True)),
                rate=work / min(spent) if work else None,
                error=errors[name].largest if errors and name in errors else None,
                rms=errors[name].rms if errors and name in errors else None,
            )
            for name, spent in self.times.items()
        }


def elapsed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def seconds(value: float) -> str:
    """1.23 s, 4.56 ms, 7.89 µs."""
    scale, unit = (1.0, "s") if value >= 1 else (1e3, "ms") if value >= 1e-3 else (1e6, "µs")
    return f"{value * scale:.3g} {unit}"
