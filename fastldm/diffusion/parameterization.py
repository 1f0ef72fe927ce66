"""What the net predicts: eps, v, x0 or the flow, the linear maps between them, and a variance beside them.

A noisy latent is x = alpha*x0 + sigma*noise; diffusion: alpha^2 + sigma^2 = 1, flow: alpha = 1 - sigma.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.errors import InvalidArgument

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")
# Of the reverse step: fixed ones are beta-tilde or beta, learned ones come from as many channels again.
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


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
    return per_row(alpha, x0) * x0 + per_row(sigma, x0) * noise


def target(
    prediction: str, x0: Tensor, noise: Tensor, alpha: Tensor | float, sigma: Tensor | float
) -> Tensor:
    """What a net of this kind should answer at alpha*x0 + sigma*noise; alpha and sigma: numbers or [rows]."""
    if prediction == "epsilon":
        return noise
    if prediction == "v_prediction":
        return per_row(alpha, x0) * noise - per_row(sigma, x0) * x0
    if prediction == "sample":
        return x0
    return noise - x0


def to_x0(prediction: str, x: Tensor, out: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """The x0 that the net's answer `out` at x stands for; alpha and sigma: numbers or [rows]."""
    of_x, of_out = x0_coefficients(prediction, per_row(alpha, x), per_row(sigma, x))
    return of_x * x + of_out * out


def variance_bounds(variance: str, log_small: Tensor, log_large: Tensor) -> tuple[Tensor, Tensor]:
    """(low, high) between which a net places the log variance, for one of VARIANCES; equal where it is fixed.

    log_small, log_large: those of beta-tilde and beta, between which learned_range lies (Nichol & Dhariwal
    2021, eq. 15). A `learned` one is the log variance itself, a place between -1 and 1.
    """
    if variance == "learned":
        return -torch.ones_like(log_small), torch.ones_like(log_large)
    if variance == "learned_range":
        return log_small, log_large
    fixed = log_large if variance.startswith("fixed_large") else log_small
    return fixed, fixed


def log_variance(place: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """The log variance at this place, -1…1 from low to high, which are numbers or [rows]."""
    low, high = per_row(low, place), per_row(high, place)
    return low + (place + 1) / 2 * (high - low)


def split_variance(out: Tensor, channels: int, learned: bool | None) -> tuple[Tensor, Tensor | None]:
    """A net's answer [rows, C or 2C, ...] as (prediction, place of the log variance), each of C channels.

    learned: whether there are to be 2C; None: either. Raises InvalidArgument for another number.
    """
    if out.shape[1] == channels and not learned:
        return out, None
    if out.shape[1] == 2 * channels and learned is not False:
        prediction, place = out.chunk(2, 1)
        return prediction, place
    wanted = {True: f"{2 * channels}: the variance is learned", False: f"{channels}: the variance is fixed"}
    allowed = wanted[learned] if learned is not None else f"{channels} or {2 * channels}"
    raise InvalidArgument("model", f"an answer of {out.shape[1]} channels", allowed)


def per_row(value: Tensor | float, like: Tensor) -> Tensor:
    """A number, or one a row, in the dtype and on the device of `like`, shaped to multiply it."""
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return value.reshape(value.shape + (1,) * (like.dim() - value.dim()))
