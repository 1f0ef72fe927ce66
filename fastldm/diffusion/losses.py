"""The training side of the diffusion process: noising, the posterior, the plain loss and its weights."""

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


def absolute_loss(out: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error per row, in float32: [rows] (some models of Rombach et al. 2022)."""
    return (out.float() - target.float()).abs().flatten(1).mean(1)


def min_snr_weight(prediction: str, alpha: Tensor, sigma: Tensor, gamma: float = 5.0) -> Tensor:
    """What `simple_loss` is times at this level so that the loss of x0 weighs min(SNR, gamma): like alpha.

    SNR = alpha^2/sigma^2. The error of x0 is that of the net's answer times sigma/alpha for eps, sigma for v
    and flow, 1 for x0. (Hang et al. 2023) In pure noise, where sampling begins if the schedule ends there,
    that weight would be 0 and the answer never learned: it is 1 there, as for eps. (Such schedules: Lin et
    al. 2023, arXiv:2305.08891)
    """
    snr = (alpha / sigma) ** 2
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1)
    weight = snr.clamp(max=gamma) * (1 if prediction == "sample" else sigma**2)
    return torch.where(snr == 0, 1.0, weight)
