"""Perceptual distances against transcriptions, pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fastldm.errors import CheckpointError
from fastldm.training.perceptual import LPIPS, laplacian_distance


def pyramid_by_hand(x: np.ndarray, levels: int) -> float:
    """One channel [H, W], pixel by pixel."""
    taps = np.array([1, 4, 6, 4, 1]) / 16
    total = 0.0
    for _ in range(levels - 1):
        height, width = x.shape
        if min(height, width) < 2:
            break
        blurred = np.zeros_like(x)
        for i in range(height):
            for j in range(width):
                for a in range(5):
                    for b in range(5):
                        ii, jj = min(max(i + a - 2, 0), height - 1), min(max(j + b - 2, 0), width - 1)
                        blurred[i, j] += taps[a] * taps[b] * x[ii, jj]
        small = blurred[::2, ::2]
        large = np.zeros_like(x)
        for i in range(height):
            for j in range(width):
                y = max((i + 0.5) * small.shape[0] / height - 0.5, 0)
                z = max((j + 0.5) * small.shape[1] / width - 0.5, 0)
                y0, z0 = int(y), int(z)
                y1, z1 = min(y0 + 1, small.shape[0] - 1), min(z0 + 1, small.shape[1] - 1)
                up = small[y0, z0] * (1 - z + z0) + small[y0, z1] * (z - z0)
                down = small[y1, z0] * (1 - z + z0) + small[y1, z1] * (z - z0)
                large[i, j] = up * (1 - y + y0) + down * (y - y0)
        total += np.abs(x - large).mean()
        x = small
    return total + np.abs(x).mean()


def test_laplacian_distance_against_a_transcription() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.standard_normal((2, 2, 2, 12, 9))
    got = laplacian_distance(torch.from_numpy(one), torch.from_numpy(other), levels=5)
    for row in range(2):
        want = np.mean([pyramid_by_hand(one[row, c] - other[row, c], 5) for c in range(2)])
        assert float(got[row]) == pytest.approx(want, rel=1e-12)


def test_laplacian_distance_sees_detail_beneath_a_larger_error() -> None:
    board = torch.tensor([0.5, -0.5]).repeat(32)
    fine = (board[:, None] * board)[None, None] * 2
    flat = torch.full((1, 1, 64, 64), 1.0)
    none = torch.zeros_like(flat)
    assert float(laplacian_distance(flat, none)) == pytest.approx(1.0)  # all of it in the last band
    assert float(laplacian_distance(fine, none)) == pytest.approx(0.5, rel=0.05)  # nearly all in the first
    both = flat + fine
    assert float(both.abs().mean()) == pytest.approx(1.0)
    assert float(laplacian_distance(both, none)) == pytest.approx(1.5, rel=0.05)
    assert float(laplacian_distance(both, both)) == 0.0


VGG = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)


def lpips_state(prefix: str = "") -> dict[str, Tensor]:
    """Random weights under the keys of lpips.LPIPS(net='vgg')."""
    generator = torch.Generator().manual_seed(7)
    state, number, part, before = {}, 0, 1, 3
    for width in VGG:
        if isinstance(width, str):
            number, part = number + 1, part + 1
            continue
        weight = torch.randn(width, before, 3, 3, generator=generator) * (2 / (9 * before)) ** 0.5
        state[f"net.slice{part}.{number}.weight"] = weight
        state[f"net.slice{part}.{number}.bias"] = 0.1 * torch.randn(width, generator=generator)
        number, before = number + 2, width
    for i, width in enumerate((64, 128, 256, 512, 512)):
        state[f"lin{i}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    return {prefix + key: value for key, value in state.items()}


def lpips_by_hand(state: dict[str, Tensor], images: Tensor, decoded: Tensor) -> Tensor:
    """In float64, straight from the paper's formula."""
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)
    maps = []
    for x in (images, decoded):
        x = ((x.double().movedim(1, -1) - shift) / scale).movedim(-1, 1)
        number, part, found = 0, 1, []
        for width in VGG:
            if isinstance(width, str):
                found.append(x)
                x, number, part = F.max_pool2d(x, 2), number + 1, part + 1
                continue
            key = f"net.slice{part}.{number}."
            x = F.conv2d(x, state[key + "weight"].double(), state[key + "bias"].double(), padding=1).clamp(0)
            number += 2
        maps.append([*found, x])
    total = torch.zeros(len(images), dtype=torch.float64)
    for i, (one, other) in enumerate(zip(*maps, strict=True)):
        one = one / (one.square().sum(1, keepdim=True).sqrt() + 1e-10)
        other = other / (other.square().sum(1, keepdim=True).sqrt() + 1e-10)
        weight = state[f"lin{i}.model.1.weight"].double()[0]
        total += ((one - other).square() * weight).sum(1).mean(dim=(1, 2))
    return total


@pytest.mark.parametrize("prefix", ["", "first_stage_model.loss.perceptual_loss."])
def test_lpips_against_a_transcription(tmp_path: Path, prefix: str) -> None:
    file = tmp_path / "lpips.safetensors"
    save_file({**lpips_state(prefix), "other": torch.zeros(1)}, file)
    lpips = LPIPS.load(file)
    images = torch.rand(2, 3, 32, 20, generator=torch.Generator().manual_seed(1)) * 2 - 1
    decoded = (images * 0.7).requires_grad_()
    got = lpips(images, decoded)
    torch.testing.assert_close(
        got.double(), lpips_by_hand(lpips_state(), images, decoded), rtol=1e-4, atol=1e-6
    )
    (gradient,) = torch.autograd.grad(lpips(images, decoded * 0 - 1).sum(), decoded)
    assert gradient.isfinite().all()
    assert float(lpips(images, images).abs().max()) == 0.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lin2.model.1.weight": None}, "missing"),
        ({"net.slice3.12.bias": torch.zeros(255)}, "255"),
        ({"net.slice1.0.weight": torch.full((64, 3, 3, 3), float("nan"))}, "NaN"),
    ],
)
def test_lpips_weights_that_do_not_fit_are_named(
    tmp_path: Path, change: dict[str, Tensor | None], says: str
) -> None:
    state = {k: v for k, v in {**lpips_state(), **change}.items() if v is not None}
    save_file(state, tmp_path / "lpips.safetensors")
    with pytest.raises(CheckpointError, match=says) as caught:
        LPIPS.load(tmp_path / "lpips.safetensors")
    assert caught.value.key == next(iter(change))
