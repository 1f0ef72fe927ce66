"""The first stage of pixel diffusion, which is none: the latents are the image, f = 1.
(Ho et al. 2020, arXiv:2006.11239)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from fastldm.models.config import read_config
from fastldm.models.vae import AutoencoderKL, PointMass
from fastldm.models.vq import VQModel

PIXELS = "PixelAutoencoder"


@dataclass(frozen=True)
class PixelConfig:
    """The scale and shift between images and what the diffusion sees."""

    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    latent_channels: ClassVar[int] = 3
    factor: ClassVar[int] = 1

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], file: str = "vae/config.json") -> PixelConfig:
        """Read the fields of a vae/config.json, beside which there are no weights; CheckpointError for one
        that is none of them.
        """
        return cls(**read_config(cls, fields, file, fixed={}))

    def to_dict(self) -> dict[str, Any]:
        """The vae/config.json that says so; diffusers has no such class."""
        return {"_class_name": PIXELS, **vars(self)}


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
