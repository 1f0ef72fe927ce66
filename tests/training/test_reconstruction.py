"""The report of reconstructions against transcriptions and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastldm.errors import InvalidArgument
from fastldm.models.pixels import PixelAutoencoder, PixelConfig
from fastldm.models.vq import VQConfig, VQModel
from fastldm.training.data import to_model
from fastldm.training.reconstruction import (
    codebook_use,
    frechet_distance,
    psnr,
    reconstruction_report,
    ssim,
    to_pixels,
)


def pictures(count: int, height: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def ssim_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """One channel [H, W], window by window."""
    at = np.arange(11) - 5
    window = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            both = (window * (p - mp) * (q - mq)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append((2 * mp * mq + c1) * (2 * both + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


def test_ssim_against_a_transcription() -> None:
    one = pictures(2, 14, 17, 1)
    other = (one.float() * 0.6 + 0.4 * pictures(2, 14, 17, 2).float()).to(torch.uint8)
    got = ssim(one, other)
    for row in range(2):
        x, y = one[row].double().numpy(), other[row].double().numpy()
        want = np.mean([ssim_by_hand(x[:, :, c], y[:, :, c]) for c in range(3)])
        assert float(got[row]) == pytest.approx(want, rel=1e-10)
    assert ssim(one, one).tolist() == [pytest.approx(1.0, rel=1e-12)] * 2
    with pytest.raises(InvalidArgument, match="11 pixels"):
        ssim(one[:, :10], other[:, :10])


def test_psnr_against_its_formula() -> None:
    one = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    other = one.clone()
    other[0, :2] += 10  # half of the pixels: a mean squared error of 50
    assert psnr(one, other).tolist() == [
        pytest.approx(10 * math.log10(255**2 / 50)),
        pytest.approx(78.13, abs=0.01),
    ]


def test_frechet_distance_against_closed_forms() -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    assert frechet_distance(base, base) == pytest.approx(0.0, abs=1e-10)
    assert frechet_distance(base, base + 2.0) == pytest.approx(6 * 4.0, rel=1e-9)
    # The same features scaled: covariances commute, so it is |(s − 1) μ|² + (s − 1)² tr Σ.
    trace, mean = float(base.T.cov().trace()), float(base.mean(0).square().sum())
    assert frechet_distance(base, 3 * base) == pytest.approx(4 * (mean + trace), rel=1e-9)
    # Covariances that do not commute, against the eigenvalues of their plain product.
    other = base.flip(1) @ torch.randn(6, 6, generator=generator, dtype=torch.float64) + 0.3
    one_cov, other_cov = np.cov(base.numpy().T), np.cov(other.numpy().T)
    shared = np.sqrt(np.linalg.eigvals(one_cov @ other_cov).real.clip(0)).sum()
    apart = float((base.mean(0) - other.mean(0)).square().sum())
    want = apart + np.trace(one_cov) + np.trace(other_cov) - 2 * shared
    assert frechet_distance(base, other) == pytest.approx(want, rel=1e-9)
    # Fewer pictures than dimensions: the covariance is singular.
    few = base[:4]
    assert frechet_distance(few, few + 1.0) == pytest.approx(6.0, rel=1e-6)
    with pytest.raises(InvalidArgument, match="2 pictures"):
        frechet_distance(base[:1], base)


def test_codebook_use_counts_codes_and_how_evenly_they_are_chosen() -> None:
    assert codebook_use(torch.arange(8).repeat(5), 32) == (8, pytest.approx(8.0))
    assert codebook_use(torch.zeros(9, dtype=torch.int64), 32) == (1, pytest.approx(1.0))


def test_the_report_of_pixels_is_perfect() -> None:
    images = pictures(5, 16, 12, 4)
    stage = PixelAutoencoder(PixelConfig())
    report = reconstruction_report(stage, images, lambda part: part.flatten(1)[:, :7].double(), batch=2)
    assert report.psnr == pytest.approx(78.13, abs=0.01) and report.ssim == pytest.approx(1.0)
    assert report.frechet == pytest.approx(0.0, abs=1e-6)
    assert report.codes is None and report.perplexity is None
    assert str(report) == "PSNR 78.13 dB, SSIM 1.0000, Fréchet distance 0.000"


def test_the_report_of_a_quantising_autoencoder_is_that_of_its_parts() -> None:
    torch.manual_seed(6)
    vae = VQModel(
        VQConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2, num_vq_embeddings=16)
    ).eval()
    images = pictures(5, 16, 12, 4)
    report = reconstruction_report(vae, images, batch=2)
    with torch.no_grad():
        latents = vae.encode(to_model(images)).mean
        shown = to_pixels(vae.decode(latents))
    assert report.psnr == pytest.approx(float(psnr(images, shown).mean()), rel=1e-3)
    assert report.ssim == pytest.approx(float(ssim(images, shown).mean()), rel=1e-2)
    assert report.frechet is None
    codes, perplexity = codebook_use(vae.quantize.indices(latents), 16)
    assert (report.codes, report.perplexity) == (codes, pytest.approx(perplexity))
    assert 1 < codes <= 16
