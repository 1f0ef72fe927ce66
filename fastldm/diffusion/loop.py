"""The loop that a sampler table stands for, in plain PyTorch: the truth of the runtime's slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastldm.diffusion.parameterization import add_noise, log_variance, split_variance
from fastldm.diffusion.samplers import SamplerTable
from fastldm.errors import InvalidArgument

Model = Callable[[Tensor, Tensor], Tensor]


class State(NamedTuple):
    """After a step: the next x and the x0 estimated at this one, both [rows, C, ...]."""

    x: Tensor
    x0: Tensor


class Known(NamedTuple):
    """The part of the latents that is given, for a net that has no channels to be told of it.

    Where `mask` [rows or 1, C or 1, ...] is 1, what the net sees is `x0` with `noise`, mixed to the level of
    the step, and the end is `x0` itself; between 0 and 1 it is a blend. `noise`: unit noise shaped like x0,
    one a step; `itertools.repeat` of one keeps it the same. (Lugmayr et al. 2022, arXiv:2201.09865, eq. 8)
    """

    mask: Tensor
    x0: Tensor
    noise: Iterable[Tensor]


def denoise(
    table: SamplerTable,
    model: Model,
    x: Tensor,
    noise: Iterable[Tensor] = (),
    *,
    known: Known | None = None,
    quantize: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[State]:
    """Run a table from x [rows, C, ...] on: the state after each of its steps, in x's dtype.

    model(x, t [rows]) → out [rows, C, ...]; guided, 2*rows, the unconditional half first; for a learned
    variance of 2C channels, which guidance does not mix. noise: unit noise shaped like x, one for each step
    that draws; `unit_noise` makes it. known: what part of x is not to be made up. quantize: moves x0 to codes
    at every step, while the noise stays as it was estimated before. Raises InvalidArgument for too little
    noise or a wrong number of channels.
    """
    drawn, again = iter(noise), iter(() if known is None else known.noise)
    state = State(x, torch.zeros_like(x))
    for step, draws in enumerate(table.draws):
        if known is not None:
            level = _levels(table)[step].tolist()
            renoised = add_noise(known.x0, _next(again, "known.noise", step, len(table.draws)), *level)
            state = state._replace(x=_blend(known.mask, renoised, state.x))
        fresh = _next(drawn, "noise", step, sum(table.draws)) if draws else None
        state = _step(table, step, model, state, fresh, quantize)
        if known is not None and step == len(table.draws) - 1:
            state = state._replace(x=_blend(known.mask, known.x0, state.x))
        yield state


def sample(
    table: SamplerTable,
    model: Model,
    x: Tensor,
    noise: Iterable[Tensor] = (),
    *,
    known: Known | None = None,
    quantize: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Where a table ends from x on; as `denoise`."""
    for state in denoise(table, model, x, noise, known=known, quantize=quantize):
        x = state.x
    return x


def predict(table: SamplerTable, step: int, model: Model, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The net's guided answer at a step, and the place of its learned log variance: both [rows, C, ...]."""
    row = table.row(step)
    out = model(x, x.new_full((len(x),), row["t"])).to(x.dtype)
    out, place = split_variance(out, x.shape[1], table.log_variances is not None or None)
    if len(out) != len(x):
        unconditional, conditional = out.chunk(2)
        out = unconditional + row["guidance"] * (conditional - unconditional)
    return out, None if place is None else place[-len(x) :]


@torch.no_grad()
def _step(
    table: SamplerTable,
    step: int,
    model: Model,
    state: State,
    noise: Tensor | None,
    quantize: Callable[[Tensor], Tensor] | None,
) -> State:
    row, x = table.row(step), state.x
    out, place = predict(table, step, model, x)
    x0 = (row["x0_x"] * x + row["x0_out"] * out).clamp(-row["clamp"], row["clamp"])
    if quantize is not None:
        codes = quantize(x0)
        x = x + float(_levels(table)[step, 0]) * (codes - x0)  # the x that has these codes and the same noise
        x0 = codes
    following = row["next_x"] * x + row["next_x0"] * x0 + row["next_prev"] * state.x0
    if noise is not None:
        scale: float | Tensor = row["noise"]
        if table.log_variances is not None and place is not None:
            scale = scale * (0.5 * log_variance(place, *table.log_variances[step].tolist())).exp()
        following = following + scale * noise
    return State(following, x0)


def _levels(table: SamplerTable) -> Tensor:
    if table.levels is None:
        raise InvalidArgument("table", "an inverse", "one of build_table with known= or quantize=")
    return table.levels


def _blend(mask: Tensor, known: Tensor, x: Tensor) -> Tensor:
    return mask * known + (1 - mask) * x


def _next(noise: Iterator[Tensor], name: str, step: int, draws: int) -> Tensor:
    found = next(noise, None)
    if found is None:
        raise InvalidArgument(name, f"too few, at step {step}", f"{draws} draws")
    return found
