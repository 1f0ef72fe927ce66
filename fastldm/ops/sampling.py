"""The sampler's step: guidance, update and the next input in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.ops.registry import op

# The columns of a sampler table that the step reads, in order; `diffusion.samplers` builds the same.
T, X0_X, X0_OUT, NEXT_X, NEXT_X0, NEXT_PREV, NOISE, GUIDANCE, CLAMP = range(9)


def learned_noise(noise: Tensor, place: Tensor, log_variances: Tensor, step: Tensor) -> Tensor:
    """ε · exp(½ (low + (place + 1)/2 · (high − low))): the noise of steps whose log variance the model places
    between two bounds.

    noise: ε float32 [B, C, H, W]; place, the same shape: what the model answered beside its prediction;
    log_variances float32 [B, rows, 2]; step int64 [B]: the row to use. (Nichol & Dhariwal 2021,
    arXiv:2102.09672, eq. 15)
    """
    slots = torch.arange(len(step), device=step.device)
    low, high = log_variances[slots, step][:, :, None, None, None].unbind(1)
    return noise * (0.5 * torch.lerp(low, high, (place.to(noise.dtype) + 1) / 2)).exp()


@op
def guided_step(
    latents: Tensor,
    x0: Tensor,
    model_input: Tensor,
    out: Tensor,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
) -> None:
    """Advance every slot by one row of its sampler table, in place.

    e  = e_u + guidance (e_c − e_u)                            guided: out holds [e_u; e_c]; else e = out
    x₀ = clamp(x0_x · x + x0_out · e)
    x' = next_x · x + next_x0 · x₀ + next_prev · x₀_previous + noise · ε

    latents [B, C, H, W] float32: x, becomes x'. x0, the same: x₀ of the step before, becomes x₀ of this
    step. model_input [B or 2B, C, H, W]: becomes x' in its own dtype, once or twice. out [B or, guided, 2B,
    C, H, W]: what the model predicted. noise: ε float32 [B, C, H, W], or None for zero. table float32
    [B or 1, rows, 9]; step int64 [B]: the row to use. All arithmetic is float32. (Ho & Salimans 2022,
    arXiv:2207.12598; Song et al. 2020, arXiv:2010.02502)
    """
    slots = latents.shape[0]
    row = table.expand(slots, -1, -1)[torch.arange(slots, device=table.device), step]
    column = row.T[:, :, None, None, None]
    predicted = out.to(latents.dtype)
    if out.shape[0] != slots:
        unconditional, conditional = predicted.chunk(2)
        predicted = unconditional + column[GUIDANCE] * (conditional - unconditional)
    clean = column[X0_X] * latents + column[X0_OUT] * predicted
    clean = clean.clamp(-column[CLAMP], column[CLAMP])
    following = column[NEXT_X] * latents + column[NEXT_X0] * clean + column[NEXT_PREV] * x0
    if noise is not None:
        following = following + column[NOISE] * noise
    latents.copy_(following)
    x0.copy_(clean)
    model_input.copy_(following.repeat(model_input.shape[0] // slots, 1, 1, 1))
