"""Contenders of one process side by side, through pytest-benchmark.

A speedup without agreement is none: nothing is timed before all contenders gave the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastldm.bench.race import FEWEST, Error, Race, Table, elapsed

Result = Tensor | tuple[Tensor, ...]
Contenders = Mapping[str, Callable[[], Any]]


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
    rounds = rounds_within(budget, sum(map(elapsed, contenders.values())))
    made = Race({name: lambda run=run: elapsed(run) for name, run in contenders.items()})
    pedantic(benchmark, made, rounds)
    return Table(title, unit, rounds, made.rows(work, errors))


def rounds_within(budget: float, a_round: float) -> int:
    """How many rounds of so many seconds fit; `FEWEST` at least, one for a budget of 0."""
    return 1 if budget == 0 else max(FEWEST, min(500, int(budget / a_round)))


def pedantic(benchmark: Any, made: Race, rounds: int) -> None:
    """Run the rounds in pytest-benchmark, which times the first contender; the others are its set-up."""
    first, *others = made.timers
    benchmark.pedantic(
        made.once, (first,), setup=lambda: [made.once(name) for name in others] and None, rounds=rounds
    )


def agree(contenders: Contenders, truth: str | Result, tolerance: float) -> dict[str, Error]:
    """Call each once; the errors of what they give, AssertionError where one is above the tolerance.

    A result is a tensor, a tuple of them, or None for nothing to agree on.
    """
    made = {name: run() for name, run in contenders.items()}
    flat = {name: _flat(result) for name, result in made.items() if result is not None}
    errors = {}
    for name, result in flat.items():
        errors[name] = Error.of(result, flat[truth] if isinstance(truth, str) else _flat(truth))
    wrong = {name: error for name, error in errors.items() if not error.within(tolerance, tolerance)}
    assert not wrong, f"no timing counts: relative errors {wrong} are above {tolerance}"
    return errors


def _flat(result: Result) -> Tensor:
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([part.double().flatten() for part in parts])


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile at its best on a CPU: shapes fixed, weights packed. Drops what it compiled before."""
    torch.compiler.reset()  # else the ninth shape of a function silently runs eager
    return torch.compile(function, dynamic=False, options={"freezing": True})
