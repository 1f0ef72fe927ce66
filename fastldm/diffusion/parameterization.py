"""What the net predicts: eps, v, x0 or the flow, and the linear maps between them.

A noisy latent is x = alpha*x0 + sigma*noise; diffusion: alpha^2 + sigma^2 = 1, flow: alpha = 1 - sigma.
"""

from __future__ import annotations

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")


def x0_coefficients(prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(c, d) with x0 = c*x + d*out, for one of PREDICTIONS.

    eps: Ho et al. 2020; v = alpha*noise - sigma*x0: Salimans & Ho 2022; flow = noise - x0: Liu et al. 2022.
    """
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "v_prediction":
        return alpha, -sigma
    if prediction == "sample":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    return torch.ones_like(alpha), -sigma


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """alpha*x0 + sigma*noise, the forward process q(x_t | x_0); alpha and sigma: numbers or [rows]."""
    return _per_row(alpha, x0) * x0 + _per_row(sigma, x0) * noise


def target(
    prediction: str, x0: Tensor, noise: Tensor, alpha: Tensor | float, sigma: Tensor | float
) -> Tensor:
    """What a net of this kind should answer at alpha*x0 + sigma*noise; alpha and sigma: numbers or [rows]."""
    if prediction == "epsilon":
        return noise
    if prediction == "v_prediction":
        return _per_row(alpha, x0) * noise - _per_row(sigma, x0) * x0
    if prediction == "sample":
        return x0
    return noise - x0


def to_x0(prediction: str, x: Tensor, out: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """The x0 that the net's answer `out` at x stands for; alpha and sigma: numbers or [rows]."""
    of_x, of_out = x0_coefficients(prediction, _per_row(alpha, x), _per_row(sigma, x))
    return of_x * x + of_out * out


def _per_row(value: Tensor | float, like: Tensor) -> Tensor:
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return value.reshape(value.shape + (1,) * (like.dim() - value.dim()))
