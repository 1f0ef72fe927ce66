"""Means with intervals over seeds, whether they clear a bar, and precision and recall of a set of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

# The 97.5 % quantile of Student's t, from one degree of freedom on.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_SEEDS = len(_T) + 1


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and half of its 95 % t-interval: nan for one seed."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.3g}" if math.isnan(self.half) else f"{self.mean:.3g} ± {self.half:.2g}"


def estimate(values: Sequence[float]) -> Estimate:
    """Of values of different seeds, at most MOST_SEEDS and at least one."""
    if len(values) == 1:
        return Estimate(values[0], math.nan)
    return Estimate(fmean(values), _T[len(values) - 2] * stdev(values) / math.sqrt(len(values)))


@dataclass(frozen=True)
class Bar:
    """A finding of a paper as a statement about one number a seed: at most `limit`, or at least.

    pooled: the one number is already of all seeds.
    """

    says: str
    values: tuple[float, ...]
    limit: float
    at_least: bool = False
    pooled: bool = False

    def verdict(self) -> str:
        """met or missed where the whole interval is; else that the interval covers the bar."""
        if not self.values:
            return "not run yet"
        found = estimate(self.values)
        sign = -1 if self.at_least else 1
        beyond = sign * (found.mean - self.limit)  # above 0: on the wrong side
        verdict = "met" if beyond <= 0 else "missed"
        if math.isnan(found.half):
            return verdict if self.pooled else f"{verdict}, by one seed without an interval"
        return "interval covers the bar" if abs(beyond) < found.half else verdict

    def __str__(self) -> str:
        kind = "≥" if self.at_least else "≤"
        found = f"{estimate(self.values)} " if self.values else ""
        return f"{self.says}: {found}{kind} {self.limit:.3g}: {self.verdict()}"


def precision_recall(real: Tensor, made: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """The share of samples within the manifold of real pictures, and of real pictures within theirs.

    The manifold of a set of features [N, D] is all that is as near to one of them as its k-th neighbour is.
    (Kynkäänniemi et al. 2019, arXiv:1904.06991)
    """
    real, made = real.double(), made.double()
    between = torch.cdist(real, made, compute_mode="donot_use_mm_for_euclid_dist")
    inside_real = (between <= _reach(real, neighbours)[:, None]).any(0)
    inside_made = (between <= _reach(made, neighbours)[None]).any(1)
    return float(inside_real.double().mean()), float(inside_made.double().mean())


def _reach(features: Tensor, neighbours: int) -> Tensor:
    """How far each one's k-th neighbour is; the nearest of all is the point itself."""
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.kthvalue(neighbours + 1, dim=1).values
