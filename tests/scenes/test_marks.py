"""Marks of readings, and the Fréchet distance against closed forms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastldm.scenes import Scene, SceneObject
from fastldm.scenes.judge import Reading, Seen
from fastldm.scenes.marks import frechet_distance, is_exact, objects_right

RED = SceneObject("fish", "red", "medium", (10, 10, 60, 50))
BLUE = SceneObject("star", "blue", "medium", (70, 60, 120, 110))
SCENE = Scene((RED, BLUE), "white")


def read(*objects: Seen) -> Reading:
    return Reading(objects, "white", None, "flat")


def seen(thing: SceneObject, **facts: object) -> Seen:
    return replace(Seen(thing.kind, thing.colour, thing.box, 1.0), **facts)


@pytest.mark.parametrize(
    ("reading", "right", "exact"),
    [
        (read(seen(BLUE), seen(RED)), 2, True),
        (read(seen(RED)), 1, False),
        (read(seen(RED), seen(BLUE), seen(BLUE)), 2, False),
        (read(seen(RED), seen(BLUE, colour="red")), 1, False),
        (read(seen(RED), seen(BLUE, kind=None)), 1, False),
        (read(seen(RED), seen(BLUE, box=(20, 60, 70, 110))), 1, True),
        (read(seen(RED, colour="blue"), seen(BLUE, colour="red")), 0, False),
        (read(), 0, False),
    ],
    ids=["all", "one", "one too many", "colour", "unreadable", "elsewhere", "swapped", "nothing"],
)
def test_marks(reading: Reading, right: int, exact: bool) -> None:
    assert objects_right(reading, SCENE) == right
    assert is_exact(reading, SCENE) == exact


def features(mean: torch.Tensor, root: torch.Tensor, n: int = 60) -> torch.Tensor:
    """Rows whose mean and covariance are these exactly: mean, root · rootᵀ."""
    white = torch.randn(n, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    white -= white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T.cov())).T
    return white @ root.T + mean


def test_frechet_distance_of_gaussians() -> None:
    rng = np.random.default_rng(0)
    mean = torch.from_numpy(rng.standard_normal(5))
    a, b = torch.diag(torch.arange(1.0, 6.0).double()), torch.diag(torch.tensor([3.0, 1, 0, 2, 5]).double())
    first, second = features(mean, a), features(mean + 2, b, 70)
    # For covariances that commute the trace is the squared distance of their roots.
    wanted = 5 * 4 + float((a - b).square().sum())
    assert frechet_distance(first, second) == pytest.approx(wanted, rel=1e-9)
    turn = torch.linalg.qr(torch.from_numpy(rng.standard_normal((5, 5))))[0]
    # One variance is 0: where rounding leaves 1e-15 of it, its root is 3e-8.
    assert frechet_distance(first @ turn, second @ turn) == pytest.approx(wanted, abs=1e-6)
    assert frechet_distance(second, first) == pytest.approx(wanted, abs=1e-6)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_where_covariances_do_not_commute() -> None:
    a = torch.tensor([[2.0, 0], [0, 1]]).double()
    b = torch.tensor([[1.0, 1], [0, 1]]).double()
    # tr (AB)^½ of two by two matrices is √(tr AB + 2 √det AB).
    product = a @ a.T @ b @ b.T
    common = (product.trace() + 2 * product.det().sqrt()).sqrt()
    wanted = float((a @ a.T).trace() + (b @ b.T).trace() - 2 * common)
    zero = torch.zeros(2).double()
    assert frechet_distance(features(zero, a), features(zero, b)) == pytest.approx(wanted, rel=1e-9)
