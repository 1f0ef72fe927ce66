"""The training side of the diffusion process: noising, the posterior and the plain loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastldm.diffusion.parameterization import add_noise


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, x_0) = N(mean_x0*x_0 + mean_xt*x_t, variance), a number per time: float64 [length]."""

    mean_x0: Tensor
    mean_xt: Tensor
    variance: Tensor
    log_variance: Tensor


def posterior(alphas_cumprod: Tensor) -> Posterior:
    """The posterior at every time (Ho et al. 2020, eq. 6 and 7).

    The variance at time 0 is 0; its logarithm there is the finite one of time 1 (Nichol & Dhariwal 2021).
    """
    before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    alpha = alphas_cumprod / before
    beta, noise, noise_before = 1 - alpha, 1 - alphas_cumprod, 1 - before
    variance = beta * noise_before / noise
    log_variance = torch.cat([variance[1:2], variance[1:]]).log()
    return Posterior(
        before.sqrt() * beta / noise, alpha.sqrt() * noise_before / noise, variance, log_variance
    )


def q_sample(alphas_cumprod: Tensor, x0: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    """q(x_t | x_0) = N(sqrt(alpha_bar_t)*x_0, 1 - alpha_bar_t), drawn with this noise; times int [rows]."""
    kept = alphas_cumprod[times]
    return add_noise(x0, noise, kept.sqrt(), (1 - kept).sqrt())


def simple_loss(out: Tensor, target: Tensor) -> Tensor:
    """L_simple: mean squared error per row, in float32: [rows] (Ho et al. 2020, eq. 14)."""
    return (out.float() - target.float()).square().flatten(1).mean(1)
