"""How well an autoencoder gives pictures back: PSNR, SSIM, Fréchet distance, and how much of a codebook it
uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.errors import InvalidArgument
from fastldm.models.pixels import Autoencoder
from fastldm.models.vq import VQModel
from fastldm.training.data import to_model

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03

Features = Callable[[Tensor], Tensor]
"""Pictures uint8 [N, H, W, 3] → a vector for each [N, D]."""


@dataclass(frozen=True)
class ReconstructionReport:
    """Means over pictures; None where there is no feature function, or no codebook."""

    psnr: float  # dB
    ssim: float
    frechet: float | None  # distance between the features of the pictures and those of their reconstructions
    codes: int | None  # how many entries of the codebook were chosen at all
    perplexity: float | None  # how many there would be, were all chosen equally often

    def __str__(self) -> str:
        said = [f"PSNR {self.psnr:.2f} dB", f"SSIM {self.ssim:.4f}"]
        if self.frechet is not None:
            said.append(f"Fréchet distance {self.frechet:.3f}")
        if self.codes is not None:
            said.append(f"{self.codes} codes used, perplexity {self.perplexity:.1f}")
        return ", ".join(said)


@torch.inference_mode()
def reconstruction_report(
    vae: Autoencoder, images: Tensor, features: Features | None = None, batch: int = 16
) -> ReconstructionReport:
    """Give pictures uint8 [N, H, W, 3] to the autoencoder and back, and compare.

    Latents are the posterior's mean; the result is rounded to bytes first, as a user would see it.
    """
    signal, structure, chosen = [], [], []
    real: list[Tensor] = []
    seen: list[Tensor] = []
    device = next((parameter.device for parameter in vae.parameters()), images.device)
    for part in images.to(device).split(batch):
        latents = vae.encode(to_model(part)).mean
        shown = to_pixels(vae.decode(latents))
        signal.append(psnr(part, shown))
        structure.append(ssim(part, shown))
        if isinstance(vae, VQModel):
            chosen.append(vae.quantize.indices(latents).flatten())
        if features is not None:
            real.append(features(part))
            seen.append(features(shown))
    codes, perplexity = None, None
    if isinstance(vae, VQModel):
        codes, perplexity = codebook_use(torch.cat(chosen), vae.config.num_vq_embeddings)
    return ReconstructionReport(
        psnr=float(torch.cat(signal).mean()),
        ssim=float(torch.cat(structure).mean()),
        frechet=frechet_distance(torch.cat(real), torch.cat(seen)) if features is not None else None,
        codes=codes,
        perplexity=perplexity,
    )


@torch.inference_mode()
def given_back(
    vae: Autoencoder,
    images: Tensor,
    batch: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Pictures uint8 [N, H, W, 3] encoded to the posterior's mean and decoded; dtype and device are those of
    the autoencoder. On the CPU.
    """
    made = []
    for part in images.split(batch):
        decoded = vae.decode(vae.encode(to_model(part).to(device, dtype)).mean)
        made.append(to_pixels(decoded.float().cpu()))
    return torch.cat(made)


def to_pixels(decoded: Tensor) -> Tensor:
    """[N, 3, H, W], about −1…1 → uint8 [N, H, W, 3]."""
    levels = (decoded.float() * 127.5 + 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1)


def psnr(images: Tensor, shown: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, uint8 [N, H, W, 3], in dB: float64 [N].

    A perfect one counts as one with an error of a thousandth of a squared grey level: 78.1 dB.
    """
    error = (images.double() - shown.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error.clamp_min(1e-3))


def ssim(images: Tensor, shown: Tensor) -> Tensor:
    """Structural similarity of each picture, uint8 [N, H, W, 3], the mean of its channels': float64 [N].

    Gaussian windows of 11 × 11 pixels, σ 1.5, at every place where one fits; the variances are biased.
    (Wang et al. 2004, doi:10.1109/TIP.2003.819861)
    """
    if min(images.shape[1:3]) < WINDOW:
        raise InvalidArgument("images", tuple(images.shape), f"sides of at least {WINDOW} pixels")
    x, y = images.permute(0, 3, 1, 2).double(), shown.permute(0, 3, 1, 2).double()
    # One filtering for the five moments of every channel.
    moments = _windowed(torch.stack((x, y, x * x, y * y, x * y)).flatten(0, 2)[:, None])
    mean_x, mean_y, xx, yy, xy = moments.view(5, *x.shape[:2], *moments.shape[2:])
    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    spread = (xx - mean_x**2) + (yy - mean_y**2)
    structure = (2 * (xy - mean_x * mean_y) + c2) / (spread + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _windowed(maps: Tensor) -> Tensor:
    """Gaussian-weighted means around each place: [M, 1, H, W] → [M, 1, H − 10, W − 10]."""
    offsets = torch.arange(WINDOW, dtype=maps.dtype, device=maps.device) - WINDOW // 2
    line = torch.exp(-0.5 * (offsets / SIGMA) ** 2)
    line = line / line.sum()
    return F.conv2d(F.conv2d(maps, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Between the Gaussians of two sets of features [N, D], [M, D], in float64:
    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½). (Heusel et al. 2017, arXiv:1706.08500)
    """
    for name, features in (("one", one), ("other", other)):
        if features.ndim != 2 or len(features) < 2:
            raise InvalidArgument(name, tuple(features.shape), "features [N, D] of at least 2 pictures")
    one, other = one.double(), other.double()
    first, second = torch.atleast_2d(one.T.cov()), torch.atleast_2d(other.T.cov())
    # (Σ₁Σ₂)^½ has the trace of (Σ₁^½ Σ₂ Σ₁^½)^½, which is symmetric: its eigenvalues are real.
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    apart = (one.mean(0) - other.mean(0)).square().sum()
    return max(0.0, float(apart + first.trace() + second.trace() - 2 * shared))


def codebook_use(indices: Tensor, size: int) -> tuple[int, float]:
    """How many of a codebook's entries occur among the indices, and the perplexity of their shares."""
    shares = torch.bincount(indices.flatten(), minlength=size).double() / indices.numel()
    return int((shares > 0).sum()), math.exp(float(torch.special.entr(shares).sum()))
