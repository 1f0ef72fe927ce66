"""Inversion: the noise from which a deterministic sampler makes given latents, as a sampler table of its own.

One step of a sampler without fresh noise or memory is x' = a*x + b*net(x, t). Its inverse solves
x = (x' - b*net(x, t))/a by fixed-point iteration, from x = x' on: x' is close, as steps are short. Each
iteration is a table row, so whatever runs a sampler runs its inverse:

    first        e1 = net(x', t)    x1 = x'/a - (b/a)*e1
    refinement   e2 = net(x1, t)    x2 = x1 - (b/a)*(e2 - e1)

The rows keep e where a sampler's rows keep x0. (DDIM inversion: Song et al. 2021, section 4.3; iterated: Pan
et al. 2023, arXiv:2309.04907)
"""

from __future__ import annotations

import math

import torch

from fastldm.diffusion.samplers import COLUMNS, SamplerTable
from fastldm.errors import InvalidArgument

# Samplers whose step, with eta 0, is a function of x alone.
INVERTIBLE = ("ddim", "ddim_compvis", "euler", "flow_euler")


def inverse_table(table: SamplerTable, refinements: int = 1) -> SamplerTable:
    """The table that leads from what `table` ends with back to the unit noise it started from.

    It has 1 + refinements rows a step; the identity row is last. Its start is the clean latents as they are.
    `table` is one of `build_table`, of a sampler that is a function of x alone: one of INVERTIBLE, with eta
    0. Bounds on x0 are left out. Raises InvalidArgument for another sampler, and for a net that predicts x0
    where the last step keeps nothing of x.
    """
    rows = table.rows64[:-1].flip(0)
    column = dict(zip(COLUMNS, rows.T, strict=True))
    if any(table.draws) or bool(column["next_prev"].any()):
        raise InvalidArgument("sampler", "random or multistep", f"one of {', '.join(INVERTIBLE)}, with eta 0")
    a = column["next_x"] + column["next_x0"] * column["x0_x"]
    if bool((a == 0).any()):
        raise InvalidArgument("prediction_type", "sample", "a net that predicts noise, velocity or flow")
    share = column["next_x0"] * column["x0_out"] / a
    none = torch.zeros_like(a)
    common = {**column, "x0_x": none, "x0_out": none + 1, "next_x0": -share, "noise": none}
    common["clamp"] = none + math.inf
    first = {**common, "next_x": 1 / a, "next_prev": none}
    again = {**common, "next_x": none + 1, "next_prev": share}
    iterations = [torch.stack([c[name] for name in COLUMNS], 1) for c in (first, *[again] * refinements)]
    stacked = torch.stack(iterations, 1).flatten(0, 1)
    for name in ("next_x", "next_x0", "next_prev"):  # what leaves the last row is the noise itself
        stacked[-1, COLUMNS.index(name)] /= table.initial_scale
    rows64 = torch.cat([stacked, table.rows64[-1:]])
    return SamplerTable(
        rows=rows64.float(),
        rows64=rows64,
        timesteps=stacked[:, 0],
        initial_scale=1.0,
        start_alpha=1.0,
        start_sigma=0.0,
        draws=(False,) * len(stacked),
    )
