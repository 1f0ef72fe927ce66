"""Noise schedules: how much noise the training process adds at each time, and which times a sampler visits.

Everything here is float64 on the CPU: a table is built once per request from at most some thousand numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

SPACINGS = ("leading", "linspace", "trailing")


def linear_betas(length: int, start: float, end: float) -> Tensor:
    """beta linear in t (Ho et al. 2020, section 4; called `sqrt_linear` by CompVis): [length]."""
    return torch.linspace(start, end, length, dtype=torch.float64)


def scaled_linear_betas(length: int, start: float, end: float) -> Tensor:
    """sqrt(beta) linear in t (Rombach et al. 2022; called `linear` by CompVis): [length]."""
    return torch.linspace(math.sqrt(start), math.sqrt(end), length, dtype=torch.float64) ** 2


def cosine_betas(length: int, start: float = 0.0, end: float = 0.0) -> Tensor:
    """beta of alpha_bar = cos^2((t + 0.008)/1.008 * pi/2), at most 0.999: [length].

    Nichol & Dhariwal 2021, eq. 17. `start` and `end` are not used; they keep the other schedules' signature.
    """
    time = torch.arange(length + 1, dtype=torch.float64) / length
    alpha_bar = ((time + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


BETA_SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squaredcos_cap_v2": cosine_betas,
}


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """alpha_bar, its root shifted and scaled so that the last is 0 (Lin et al. 2024, alg. 1): [length]."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Flow-matching sigma moved towards noise: shift*s / (1 + (shift - 1)*s) (Esser et al. 2024, eq. 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def spaced_times(spacing: str, steps: int, length: int, offset: int = 0, *, past_end: bool = False) -> Tensor:
    """The `steps` times, falling, at which a sampler calls the net: [steps], fractional for linspace.

    Table 2 of Lin et al. 2024: leading = i*(length // steps) + offset, linspace = both ends and evenly
    between, trailing = from the last time down. `past_end` spaces one step more and leaves the last out, as
    DPM-Solver counts. `steps` <= `length`; an offset that would leave the schedule shrinks, so the times are
    always different and inside. Products are formed as numpy's arange and linspace form them, so that ties
    round as they do in diffusers.
    """
    count = min(steps + past_end, length)
    first = count - steps
    if spacing == "trailing":
        gap = (length - length / steps) - length
        return torch.tensor([round(length + i * gap) - 1.0 for i in range(steps)], dtype=torch.float64)
    if spacing == "leading":
        gap = length // count
        offset = min(offset, length - 1 - (count - 1) * gap)
        rising = [float(i * gap + offset) for i in range(first, count)]
    else:
        gap = (length - 1) / max(count - 1, 1)
        rising = [i * gap for i in range(first, count)]
        if count > 1:
            rising[-1] = length - 1.0
    return torch.tensor(rising[::-1], dtype=torch.float64)


def karras_sigmas(steps: int, first: float, last: float) -> Tensor:
    """`steps` sigmas from `first` down to `last`, linear in sigma^(1/7) (Karras et al. 2022, eq. 5)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return (first ** (1 / 7) + ramp * (last ** (1 / 7) - first ** (1 / 7))) ** 7


def exponential_sigmas(steps: int, first: float, last: float) -> Tensor:
    """`steps` sigmas from `first` down to `last`, linear in log sigma."""
    return torch.linspace(math.log(first), math.log(last), steps, dtype=torch.float64).exp()


def interpolate(table: Tensor, times: Tensor) -> Tensor:
    """The rising `table` [length] read at fractional indices, linearly between neighbours."""
    low = times.floor().long().clamp(0, len(table) - 2)
    return table[low] + (times - low) * (table[low + 1] - table[low])


def times_of_sigmas(table: Tensor, sigmas: Tensor) -> Tensor:
    """The fractional index in the rising `table` of each sigma, linear in log sigma, held at both ends."""
    logs, wanted = table.log(), sigmas.log()
    low = (torch.searchsorted(logs, wanted, right=True) - 1).clamp(0, len(table) - 2)
    return low + ((wanted - logs[low]) / (logs[low + 1] - logs[low])).clamp(0, 1)
