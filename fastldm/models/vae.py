"""The KL autoencoder: images to latents and back. (Rombach et al. 2022, arXiv:2112.10752, section 3.1)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastldm.models.config import read_config
from fastldm.models.layers import (
    Attention,
    Conv2d,
    Downsample,
    GroupNorm,
    ResBlock,
    Upsample,
    from_tokens,
    to_tokens,
)

EPS = 1e-6


@dataclass(frozen=True)
class VAEConfig:
    """An autoencoder's shape, and the scale and shift between its latents and the ones the diffusion sees."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0

    @property
    def factor(self) -> int:
        """Pixels along a side of one latent."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], file: str = "vae/config.json") -> VAEConfig:
        """Read the fields of a diffusers vae/config.json; CheckpointError for one that this network does
        not have.
        """
        levels = len(fields.get("block_out_channels", ()))
        fixed = {
            "act_fn": "silu",
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "latents_mean": None,
            "latents_std": None,
        }
        inert = {"sample_size", "force_upcast"}
        return cls(
            **read_config(cls, fields, file, fixed=fixed, inert=inert, defaults={"block_out_channels": (64,)})
        )

    def to_dict(self) -> dict[str, Any]:
        """The diffusers vae/config.json of this autoencoder."""
        levels = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            **{
                name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()
            },
            "shift_factor": self.shift_factor or None,
        }


@dataclass(frozen=True)
class DiagonalGaussian:
    """The posterior q(z | x): mean and log-variance [N, C, h, w], the latter within −30…20."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std · noise."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """Divergence from the standard normal, summed over each image: [N]."""
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))


class Block(nn.Module):
    """Residual blocks, then a change of resolution in all but the last level."""

    def __init__(self, width_in: int, width: int, layers: int, groups: int, resample: str | None) -> None:
        super().__init__()
        widths = [width_in] + [width] * (layers - 1)
        self.resnets = nn.ModuleList([ResBlock(w, width, groups, EPS) for w in widths])
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(width, asymmetric=True)])
        if resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(width)])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            for layer in part:  # type: ignore[attr-defined]
                x = layer(x)
        return x


class MidAttention(Attention):
    """Single-head self-attention over all pixels of the smallest map."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__(width, heads=1, qkv_bias=True)
        self.group_norm = GroupNorm(groups, width, EPS)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        tokens = to_tokens(self.group_norm(x, silu=False))
        return from_tokens(super().forward(tokens, residual=to_tokens(x)), like=x)


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, width: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(width, width, groups, EPS) for _ in range(2)])
        self.attentions = nn.ModuleList([MidAttention(width, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Images [N, 3, H, W] → moments of the latents [N, 2·latent_channels, H/f, W/f]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [
                Block(
                    widths[max(i - 1, 0)],
                    width,
                    config.layers_per_block,
                    groups,
                    "down" if i < last else None,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1], EPS)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class Decoder(nn.Module):
    """Latents [N, C, h, w] → images [N, 3, f·h, f·w]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            [
                Block(
                    widths[max(i - 1, 0)],
                    width,
                    config.layers_per_block + 1,
                    groups,
                    "up" if i < last else None,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], EPS)
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x))


class AutoencoderKL(nn.Module):
    """Images in −1…1 to a Gaussian over latents, and latents to images; `scaling_factor` is the caller's to
    apply.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        latent = config.latent_channels
        self.quant_conv = Conv2d(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = Conv2d(latent, latent, 1) if config.use_post_quant_conv else None

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """Images [N, 3, H, W] in −1…1 → posterior over [N, C, H/f, W/f]."""
        moments = self.encoder(images.contiguous(memory_format=torch.channels_last))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, h, w], scale and shift already removed → images [N, 3, f·h, f·w], about −1…1."""
        latents = latents.contiguous(memory_format=torch.channels_last)
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, DiagonalGaussian]:
        """One pass there and back, for training: the reconstruction and the posterior."""
        posterior = self.encode(images)
        return self.decode(posterior.sample(noise)), posterior
