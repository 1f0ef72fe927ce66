"""The first stage of pixel diffusion, which is none: the latents are the image, f = 1.
(Ho et al. 2020, arXiv:2006.11239)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from fastldm.errors import CheckpointError
from fastldm.models.vae import AutoencoderKL, PointMass
from fastldm.models.vq import VQModel


@dataclass(frozen=True)
class PixelConfig:
    """Images of so many channels, and the scale and shift between them and what the diffusion sees."""

    latent_channels: int = 3
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    factor: ClassVar[int] = 1

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], file: str = "vae/config.json") -> PixelConfig:
        """Read what `to_dict` gave; CheckpointError for any other field."""
        fields = {name: value for name, value in fields.items() if not name.startswith("_")}
        try:
            return cls(**fields)
        except TypeError:
            raise CheckpointError(file, None, f"has fields that pixels do not have: {fields}") from None

    def to_dict(self) -> dict[str, Any]:
        """A vae/config.json in the manner of diffusers, which has no such class."""
        return {"_class_name": "PixelAutoencoder", **vars(self)}


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
