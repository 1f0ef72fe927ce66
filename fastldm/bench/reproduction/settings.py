"""How large the reproduction is: pictures, nets, budgets of computation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from fastldm.models.unet import UNetConfig
from fastldm.models.vae import AutoencoderConfig, VAEConfig
from fastldm.models.vq import VQConfig

FACTORS = (1, 4, 8, 32)
"""Pixels along a side of one latent; 1 is diffusion in pixels."""


@dataclass(frozen=True)
class Shape:
    """Of the latents at one factor, and of the net that learns them."""

    channels: int
    widths: tuple[int, ...]
    depth: tuple[int, ...]  # of the transformers, level by level
    batch: int


@dataclass(frozen=True)
class FirstStage:
    """An autoencoder: its factor, whether it has a codebook, its latents' channels, None: as many as Shape
    says.
    """

    factor: int
    quantised: bool = False
    channels: int | None = None

    @property
    def name(self) -> str:
        said = f"{'vq' if self.quantised else 'kl'}-f{self.factor}"
        return said if self.channels is None else f"{said}-c{self.channels}"


@dataclass(frozen=True)
class Settings:
    """One reproduction; rows of different settings are never compared. Budgets are of one training run."""

    side: int = 64
    world: int = 2  # counts up when the pictures change
    pictures: int = 8192  # to learn from
    samples: int = 2000  # of each measurement, and as many renders to compare with
    sample_batch: int = 100
    bound_pictures: int = 16
    bound_batch: int = 16
    timesteps: int = 1000
    diffusion_flops: float = 12e12
    autoencoder_flops: float = 10e12
    autoencoder_batch: int = 16
    autoencoder_width: int = 8
    learning_rate: float = 1e-3
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    context_width: int = 64
    codes: int = 512
    shapes: tuple[tuple[int, Shape], ...] = (
        (1, Shape(3, (8, 16, 32, 64), (0, 0, 1, 1), 8)),
        (4, Shape(3, (16, 32, 64), (0, 1, 1), 16)),
        (8, Shape(4, (32, 64), (1, 1), 32)),
        (32, Shape(16, (64,), (1,), 128)),
    )

    def digest(self) -> str:
        """A short name of all these numbers."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]

    def shape(self, factor: int) -> Shape:
        return dict(self.shapes)[factor]

    def unet(self, factor: int, learned: bool) -> UNetConfig:
        """The net at a factor; of twice as many output channels where it learns the variance."""
        shape = self.shape(factor)
        return UNetConfig(
            in_channels=shape.channels,
            out_channels=shape.channels * (2 if learned else 1),
            block_out_channels=shape.widths,
            layers_per_block=1,
            heads=tuple(max(width // 32, 1) for width in shape.widths),
            transformer_depth=shape.depth,
            cross_attention_dim=self.context_width,
            norm_num_groups=4,
            sample_size=self.side // factor,
        )

    def autoencoder(self, stage: FirstStage) -> AutoencoderConfig:
        """A first stage; widths double up to four times the first one."""
        levels = stage.factor.bit_length()
        widths = tuple(self.autoencoder_width * min(2**level, 4) for level in range(levels))
        shared = {
            "block_out_channels": widths,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "latent_channels": stage.channels or self.shape(stage.factor).channels,
            "mid_block_add_attention": False,
        }
        if stage.quantised:
            return VQConfig(num_vq_embeddings=self.codes, **shared)  # type: ignore[arg-type]
        return VAEConfig(scaling_factor=1.0, **shared)  # type: ignore[arg-type]
