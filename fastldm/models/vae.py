"""The KL autoencoder, and what it shares with the quantising one: images to latents and back.
(Rombach et al. 2022, arXiv:2112.10752, section 3.1)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from fastldm.models.config import read_config
from fastldm.models.layers import (
    Conv2d,
    Downsample,
    GroupNorm,
    MapAttention,
    ResBlock,
    Upsample,
)

EPS = 1e-6


@dataclass(frozen=True)
class AutoencoderConfig:
    """The shape that convolutional autoencoders share, level by level from the image to the latents."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    attention_levels: tuple[int, ...] = ()  # where attention follows each residual block; 0: at full size
    scaling_factor: float = 1.0  # between the latents and those that the diffusion sees, and the shift
    shift_factor: float = 0.0

    @property
    def factor(self) -> int:
        """Pixels along a side of one latent."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def block_types(self) -> dict[str, list[str]]:
        """The names of the levels in a diffusers config.json."""
        kinds = ["Attn" if i in self.attention_levels else "" for i in range(len(self.block_out_channels))]
        return {
            "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in kinds],
            "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in kinds[::-1]],
        }

    @classmethod
    def read(cls, fields: Mapping[str, Any], file: str, fixed: Mapping[str, Any]) -> dict[str, Any]:
        """The dataclass fields in a diffusers config.json, beside `fixed` ones; CheckpointError for one that
        this network does not have.
        """
        fields = {"block_out_channels": (64,), "layers_per_block": 1, **fields}
        down = fields.get("down_block_types") or ()
        attention = tuple(i for i, kind in enumerate(down) if kind == "AttnDownEncoderBlock2D")
        widths = tuple(fields["block_out_channels"])
        kinds = AutoencoderConfig(block_out_channels=widths, attention_levels=attention).block_types
        read = read_config(
            cls,
            fields,
            file,
            fixed={"act_fn": "silu", **kinds, **fixed},
            inert={"sample_size", "force_upcast"},
            derived=("attention_levels",),
        )
        return {**read, "attention_levels": attention}

    def fields(self) -> dict[str, Any]:
        """The fields of a diffusers config.json of this autoencoder."""
        own = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        del own["attention_levels"]
        return {"act_fn": "silu", **self.block_types, **own, "shift_factor": self.shift_factor or None}


@dataclass(frozen=True)
class VAEConfig(AutoencoderConfig):
    """The shape of a KL autoencoder."""

    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], file: str = "vae/config.json") -> VAEConfig:
        """Read the fields of a diffusers vae/config.json; CheckpointError for one that this network does
        not have.
        """
        return cls(**cls.read(fields, file, {"latents_mean": None, "latents_std": None}))

    def to_dict(self) -> dict[str, Any]:
        """The diffusers vae/config.json of this autoencoder."""
        return {"_class_name": "AutoencoderKL", **self.fields()}


@dataclass(frozen=True)
class DiagonalGaussian:
    """The posterior q(z | x): mean and log-variance [N, C, h, w], the latter within −30…20."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> DiagonalGaussian:
        """From an encoder's output [N, 2C, h, w]: means, then log-variances."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    @property
    def std(self) -> Tensor:
        """Standard deviation of each latent."""
        return torch.exp(0.5 * self.logvar)

    def to(self, dtype: torch.dtype) -> DiagonalGaussian:
        """The same in another dtype."""
        return DiagonalGaussian(self.mean.to(dtype), self.logvar.to(dtype))

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std · noise."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """Divergence from the standard normal, summed over each image: [N]."""
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))


@dataclass(frozen=True)
class PointMass:
    """The posterior of an encoder that leaves nothing to chance: latents [N, C, h, w]."""

    mean: Tensor

    @property
    def std(self) -> Tensor:
        """Zeros."""
        return torch.zeros_like(self.mean)

    def to(self, dtype: torch.dtype) -> PointMass:
        """The same in another dtype."""
        return PointMass(self.mean.to(dtype))

    def sample(self, noise: Tensor) -> Tensor:
        """The latents themselves."""
        return self.mean


class Block(nn.Module):
    """Residual blocks, each followed by attention if asked for, then a change of resolution in all but the
    last level.
    """

    def __init__(
        self, width_in: int, width: int, layers: int, groups: int, attention: bool, resample: str | None
    ) -> None:
        super().__init__()
        widths = [width_in] + [width] * (layers - 1)
        self.resnets = nn.ModuleList([ResBlock(w, width, groups, EPS) for w in widths])
        self.attentions = nn.ModuleList([MapAttention(width, groups, EPS) for _ in range(layers * attention)])
        self.downsamplers = nn.ModuleList([Downsample(width, asymmetric=True)] if resample == "down" else [])
        self.upsamplers = nn.ModuleList([Upsample(width)] if resample == "up" else [])

    def layers(self) -> Iterator[nn.Module]:
        """The layers in the order in which they are applied."""
        for pair in zip_longest(self.resnets, self.attentions):
            yield from filter(None, pair)
        yield from self.downsamplers
        yield from self.upsamplers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers():
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, width: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(width, width, groups, EPS) for _ in range(2)])
        self.attentions = nn.ModuleList([MapAttention(width, groups, EPS)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Images [N, 3, H, W] → what the latents are made from [N, channels, H/f, W/f]."""

    def __init__(self, config: AutoencoderConfig, channels: int) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [
                Block(
                    widths[max(level - 1, 0)],
                    width,
                    config.layers_per_block,
                    groups,
                    level in config.attention_levels,
                    "down" if level < len(widths) - 1 else None,
                )
                for level, width in enumerate(widths)
            ]
        )
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1], EPS)
        self.conv_out = Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class Decoder(nn.Module):
    """What was made of the latents [N, channels, h, w] → images [N, 3, f·h, f·w]."""

    def __init__(self, config: AutoencoderConfig, channels: int) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = Conv2d(channels, widths[-1], 3, padding=1)
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            [
                Block(
                    widths[min(level + 1, last)],
                    widths[level],
                    config.layers_per_block + 1,
                    groups,
                    level in config.attention_levels,
                    "up" if level > 0 else None,
                )
                for level in range(last, -1, -1)
            ]
        )
        self.conv_norm_out = GroupNorm(groups, widths[0], EPS)
        self.conv_out = Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x.contiguous(memory_format=torch.channels_last)))
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
        latent = config.latent_channels
        self.encoder = Encoder(config, 2 * latent)
        self.decoder = Decoder(config, latent)
        self.quant_conv = Conv2d(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = Conv2d(latent, latent, 1) if config.use_post_quant_conv else None

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """Images [N, 3, H, W] in −1…1 → posterior over [N, C, H/f, W/f]."""
        moments = self.encoder(images)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return DiagonalGaussian.of(moments)

    def before_decoder(self, latents: Tensor) -> Tensor:
        """What the decoder reads: the latents [N, C, h, w] through the 1×1 convolution, if there is one."""
        return latents if self.post_quant_conv is None else self.post_quant_conv(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, h, w], scale and shift already removed → images [N, 3, f·h, f·w], about −1…1."""
        return self.decoder(self.before_decoder(latents.contiguous(memory_format=torch.channels_last)))

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, DiagonalGaussian]:
        """One pass there and back, for training: the reconstruction and the posterior."""
        posterior = self.encode(images)
        return self.decode(posterior.sample(noise)), posterior
