"""Gaussian likelihoods in nats, number by number, with any shapes that broadcast and in the inputs' dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2))."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (ratio.exp() - 1 - ratio + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def normal_cdf(x: Tensor) -> Tensor:
    """The standard normal's distribution function to 3e-4, by a tanh (Page 1977)."""
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """log P(x) of 8-bit pixels x, scaled to -1…1, under N(mean, exp(log_deviation)^2).

    A pixel's share is the Gaussian's mass within 1/255 of it; the two extreme values take the tails. At
    least log(1e-12). (Ho et al. 2020, section 3.3)
    """
    precision = (-log_deviation).exp()
    below, above = (normal_cdf(precision * (x - mean + edge)) for edge in (-1 / 255, 1 / 255))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()
