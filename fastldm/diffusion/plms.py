"""PLMS: the multistep sampler of the latent diffusion paper's code, over the steps of a table.

It keeps the noise of up to three steps before, more than a table's row reads and a slot holds, so it is a
loop of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastldm.diffusion.loop import Model, State, predict
from fastldm.diffusion.samplers import COLUMNS, SamplerTable
from fastldm.errors import InvalidArgument

# Adams-Bashforth: the weights of this step's noise and of that of one, two or three steps before.
_WEIGHTS = ((3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@torch.no_grad()
def plms(table: SamplerTable, model: Model, x: Tensor) -> Iterator[State]:
    """Pseudo linear multistep from x [rows, C, ...] on: the state after each step; model as in `denoise`.

    `table`: one of `build_table` with sampler ddim_compvis, as in the original, or ddim, and eta 0. The first
    step calls the model twice, an improved Euler step. Raises InvalidArgument for a table that draws noise,
    remembers x0, or starts without signal. (Liu et al. 2022, arXiv:2202.09778, eq. 9 to 12)
    """
    levels, last = table.levels, len(table.draws) - 1
    if levels is None or any(table.draws) or bool(table.rows64[:, COLUMNS.index("next_prev")].any()):
        raise InvalidArgument("table", "random or multistep", "one of ddim_compvis or ddim with eta 0")
    if bool((levels[:, 0] == 0).any()):
        raise InvalidArgument("table", "one that starts without signal", "one with signal at its first time")

    def noise_in(x: Tensor, step: int) -> Tensor:
        """As the net estimates it."""
        (alpha, sigma), row = levels[step].tolist(), table.row(step)
        out, _ = predict(table, step, model, x)
        return (x - alpha * (row["x0_x"] * x + row["x0_out"] * out)) / sigma

    def move(x: Tensor, step: int, noise: Tensor) -> State:
        """The table's step, if this is the noise in x."""
        (alpha, sigma), row = levels[step].tolist(), table.row(step)
        x0 = ((x - sigma * noise) / alpha).clamp(-row["clamp"], row["clamp"])
        return State(row["next_x"] * x + row["next_x0"] * x0, x0)

    noises: list[Tensor] = []  # of this step and of up to three before it
    for step in range(last + 1):
        noises = [noise_in(x, step), *noises[:3]]
        if step == 0:
            mean = (noises[0] + noise_in(move(x, 0, noises[0]).x, min(1, last))) / 2
        else:
            mean = torch.stack([w * e for w, e in zip(_WEIGHTS[len(noises) - 2], noises, strict=True)]).sum(0)
        state = move(x, step, mean)
        x = state.x
        yield state
