"""The first stage of pixel diffusion, which is none: the latents are the image, f = 1.
(Ho et al. 2020, arXiv:2006.11239)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fastldm.models.vae import AutoencoderKL, PointMass
from fastldm.models.vq import VQModel


@dataclass(frozen=True)
class PixelConfig:
    """Images of so many channels, and the scale and shift between them and what the diffusion sees."""

    latent_channels: int = 3
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    factor: ClassVar[int] = 1


class PixelAutoencoder(nn.Module):
    """Images to themselves and back, with the methods of an autoencoder."""

    def __init__(self, config: PixelConfig) -> None:
        super().__init__()
        self.config = config

    def encode(self, images: Tensor) -> PointMass:
        """The images [N, C, H, W] in −1…1."""
        return PointMass(images)

    def decode(self, latents: Tensor) -> Tensor:
        """The latents [N, C, H, W]."""
        return latents


Autoencoder = AutoencoderKL | VQModel | PixelAutoencoder
