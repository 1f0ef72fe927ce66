"""How kernels are judged and timed: errors against float64, and captured CUDA graphs in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], object]

REPLAY, CALLS = 4e-3, 20  # seconds and calls of one replay, at most
ROUNDS = 15


def race(contenders: Mapping[str, Run], rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds of one call of each, the median over rounds in which they take turns, so that a slow moment
    hits all alike.
    """
    graphs = {name: capture(run) for name, run in contenders.items()}
    spent: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, calls) in graphs.items():
            spent[name].append(_elapsed(graph.replay) / calls)
    return {name: median(times) for name, times in spent.items()}


def capture(run: Run) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of several calls, so that neither launches nor the clock count, and how many they are."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run()
        once = _elapsed(run)
    torch.cuda.current_stream().wait_stream(aside)
    calls = max(1, min(CALLS, int(REPLAY / max(once, 1e-6))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    graph.replay()
    return graph, calls


def _elapsed(run: Run) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def flat(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """All that a call gives, as one float64 vector."""
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([part.double().flatten() for part in parts])


def errors(result: Any, plain: Any, truth: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Largest and RMS error of a result and of plain PyTorch's, each over the truth's largest value.

    right: at most twice PyTorch's and 4 units in the last place of the largest value; false for a NaN.
    """
    wanted = flat(truth)
    scale = float(wanted.abs().max()) or 1.0
    found = {}
    for name, made in (("error", result), ("reference", plain)):
        apart = (flat(made) - wanted).abs_()
        found[name] = float(apart.max()) / scale
        found[f"{name}_rms"] = float(apart.square_().mean().sqrt()) / scale
    right = found["error"] <= 2 * found["reference"] + 4 * torch.finfo(dtype).eps
    return found | {"right": right}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within the block new memory is full of NaN, so that what a kernel does not write is seen."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
