"""Which times a training step sees: uniform, logit-normal, or in proportion to their losses' second moments.

Times are drawn on the CPU, by its generators, so that they do not depend on where the model runs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastldm.errors import InvalidArgument


def uniform_times(length: int, rows: int, generator: torch.Generator) -> Tensor:
    """Times 0 … length - 1, each as likely: int64 [rows]."""
    return torch.randint(length, (rows,), generator=generator)


def uniform_sigmas(rows: int, generator: torch.Generator) -> Tensor:
    """Flow levels, uniform on 0…1: float64 [rows] (Liu et al. 2022)."""
    return torch.rand(rows, generator=generator, dtype=torch.float64)


def logit_normal_sigmas(rows: int, mean: float, deviation: float, generator: torch.Generator) -> Tensor:
    """Flow levels whose log odds are N(mean, deviation^2): float64 [rows] (Esser et al. 2024)."""
    drawn = torch.randn(rows, generator=generator, dtype=torch.float64)
    return (mean + deviation * drawn).sigmoid()


class LossSecondMoment:
    """Draws times in proportion to sqrt(E[loss^2]) of the last losses seen at each; float64, on the CPU.

    Uniform until each time was seen `history` times; a share `uniform` stays so. The draws' weights
    1/(length*p) keep the mean of the weighted losses what uniform times give. Not shared between threads;
    processes that train together update theirs with the losses of all. (Nichol & Dhariwal 2021, section 3.3)
    """

    def __init__(self, length: int, history: int = 10, uniform: float = 0.001) -> None:
        self.uniform = uniform
        self.losses = torch.zeros(length, history, dtype=torch.float64)
        self.counts = torch.zeros(length, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """Of each time to be drawn: float64 [length], sum 1."""
        length, history = self.losses.shape
        moment = self.losses.square().mean(1).sqrt()
        total = moment.sum()
        if bool((self.counts < history).any()) or total == 0:
            return torch.full_like(moment, 1 / length)
        return moment / total * (1 - self.uniform) + self.uniform / length

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(times int64, weights float64), [rows]."""
        p = self.probabilities()
        times = torch.multinomial(p, rows, replacement=True, generator=generator)
        return times, 1 / (len(p) * p[times])

    def update(self, times: Tensor, losses: Tensor) -> None:
        """Take note of losses seen, before their weights: [rows] each."""
        history = self.losses.shape[1]
        for time, loss in zip(times.tolist(), losses.tolist(), strict=True):
            if self.counts[time] == history:
                self.losses[time] = self.losses[time].roll(-1)
                self.losses[time, -1] = loss
            else:
                self.losses[time, self.counts[time]] = loss
                self.counts[time] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to draw on as if unbroken."""
        return {"losses": self.losses.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up a saved state. Raises InvalidArgument where it is of another chain."""
        for name, own in (("losses", self.losses), ("counts", self.counts)):
            given = state.get(name)
            if given is None or given.shape != own.shape:
                shown = None if given is None else f"a tensor {list(given.shape)}"
                raise InvalidArgument(name, shown, f"a tensor {list(own.shape)}")
            own.copy_(given)
