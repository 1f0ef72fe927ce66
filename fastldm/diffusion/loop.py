"""The loop that a sampler table stands for, in plain PyTorch: the truth of the runtime's slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastldm.diffusion.parameterization import log_variance, split_variance
from fastldm.diffusion.samplers import COLUMNS, SamplerTable
from fastldm.errors import InvalidArgument

Model = Callable[[Tensor, Tensor], Tensor]


class State(NamedTuple):
    """After a step: the next x and the x0 estimated at this one, both [rows, C, ...]."""

    x: Tensor
    x0: Tensor


def denoise(table: SamplerTable, model: Model, x: Tensor, noise: Iterable[Tensor] = ()) -> Iterator[State]:
    """Run a table from x [rows, C, ...] on: the state after each of its steps, in x's dtype.

    model(x, t [rows]) → out [rows, C, ...]; guided, 2*rows, the unconditional half first; for a learned
    variance of 2C channels, which guidance does not mix. noise: unit noise shaped like x, one for each step
    that draws; `unit_noise` makes it. Raises InvalidArgument for too little noise or a wrong number of
    channels.
    """
    drawn = iter(noise)
    state = State(x, torch.zeros_like(x))
    for step, draws in enumerate(table.draws):
        fresh = next(drawn, None) if draws else None
        if draws and fresh is None:
            raise InvalidArgument("noise", f"too few, at step {step}", f"{sum(table.draws)} draws")
        state = _step(table, step, model, state, fresh)
        yield state


def sample(table: SamplerTable, model: Model, x: Tensor, noise: Iterable[Tensor] = ()) -> Tensor:
    """Where a table ends from x on; as `denoise`."""
    for state in denoise(table, model, x, noise):
        x = state.x
    return x


@torch.no_grad()
def _step(table: SamplerTable, step: int, model: Model, state: State, noise: Tensor | None) -> State:
    row = dict(zip(COLUMNS, table.rows64[step].tolist(), strict=True))
    x, learned = state.x, table.log_variances is not None or None
    out = model(x, x.new_full((len(x),), row["t"])).to(x.dtype)
    out, place = split_variance(out, x.shape[1], learned)
    if len(out) != len(x):
        unconditional, conditional = out.chunk(2)
        out = unconditional + row["guidance"] * (conditional - unconditional)
    x0 = (row["x0_x"] * x + row["x0_out"] * out).clamp(-row["clamp"], row["clamp"])
    following = row["next_x"] * x + row["next_x0"] * x0 + row["next_prev"] * state.x0
    if noise is not None:
        scale: float | Tensor = row["noise"]
        if table.log_variances is not None and place is not None:
            scale = scale * (0.5 * log_variance(place[-len(x) :], *table.log_variances[step].tolist())).exp()
        following = following + scale * noise
    return State(following, x0)
