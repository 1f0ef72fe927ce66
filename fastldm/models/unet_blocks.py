"""What a UNet is made of: levels of residual blocks and attention, and what their steps take from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastldm.models.layers import (
    Downsample,
    Linear,
    MapAttention,
    ResampleBlock,
    ResBlock,
    Upsample,
    repeat_rows,
)
from fastldm.models.transformer import Transformer
from fastldm.models.unet_config import UNetConfig


@dataclass
class StepState:
    """What the blocks take from as they run one step: time biases, keys and values in forward order, and
    skip connections. The rows of maps and skips may be fewer than those of the rest: see `UNet.forward`.
    """

    time_biases: Iterator[Tensor]
    keys_values: Iterator[tuple[Tensor, Tensor]]
    key_lengths: Tensor | None
    skips: list[Tensor]
    deep: Tensor | None = None  # filled with what the last residual block is given, beside the first skip

    def resnet(self, block: ResBlock, x: Tensor, *size: torch.Size) -> Tensor:
        """The next residual block of x; size: that of the result, where the block enlarges."""
        made: Tensor = block(x, next(self.time_biases)[: len(x)], *size)
        return made

    def attention(self, layer: Transformer | MapAttention, x: Tensor) -> Tensor:
        """The next attention of x."""
        if isinstance(layer, MapAttention):
            return layer(x)
        return layer(x, self.keys_values, self.key_lengths)


def attention_layer(width: int, heads: int, depth: int, config: UNetConfig) -> Transformer | MapAttention:
    """A transformer as this UNet has them; without a context, attention over the map alone."""
    if config.cross_attention_dim is None:
        return MapAttention(width, config.norm_num_groups, config.norm_eps, heads)
    return Transformer(
        width,
        heads,
        depth,
        config.cross_attention_dim,
        config.norm_num_groups,
        config.use_linear_projection,
    )


class Level(nn.Module):
    """One resolution of the way down or up: residual blocks, each with attention where the level attends,
    then a resampling.

    On the way down every output is kept as a skip; on the way up each residual block takes one back,
    concatenated.
    """

    def __init__(
        self,
        widths_in: list[int],
        width: int,
        level: int,
        config: UNetConfig,
        resample: str | None,
        goes_up: bool,
    ) -> None:
        super().__init__()
        groups, eps, time_width = config.norm_num_groups, config.norm_eps, 4 * config.block_out_channels[0]
        heads, depth = config.heads[level], config.transformer_depth[level]
        scale_shift = config.scale_shift_norm
        self.goes_up = goes_up
        self.resnets = nn.ModuleList(
            [ResBlock(w, width, groups, eps, time_width, scale_shift) for w in widths_in]
        )
        self.attentions = nn.ModuleList(
            [attention_layer(width, heads, depth, config) for _ in widths_in] if depth else []
        )

        def resampler() -> nn.Module:
            if config.resblock_updown:
                return ResampleBlock(width, groups, eps, time_width, scale_shift, enlarges=goes_up)
            return Upsample(width) if goes_up else Downsample(width, asymmetric=False)

        self.downsamplers = nn.ModuleList([resampler()] if resample == "down" else [])
        self.upsamplers = nn.ModuleList([resampler()] if resample == "up" else [])

    def forward(self, x: Tensor, state: StepState) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.block(i, x, state)
        for downsample in self.downsamplers:
            x = state.resnet(downsample, x) if isinstance(downsample, ResBlock) else downsample(x)
            state.skips.append(x)
        for upsample in self.upsamplers:
            size = state.skips[-1].shape[2:]
            x = state.resnet(upsample, x, size) if isinstance(upsample, ResBlock) else upsample(x, size)
        return x

    def block(self, i: int, x: Tensor, state: StepState) -> Tensor:
        """The i-th residual block, with its skip and its attention."""
        if self.goes_up:
            if state.deep is not None and len(state.skips) == 1:
                state.deep.copy_(x)
            x = torch.cat((x, repeat_rows(state.skips.pop(), len(x))), dim=1)
        x = state.resnet(self.resnets[i], x)  # type: ignore[arg-type]
        if self.attentions:
            x = state.attention(self.attentions[i], x)  # type: ignore[arg-type]
        if not self.goes_up:
            state.skips.append(x)
        return x


class MidBlock(nn.Module):
    """Residual block, attention, residual block on the smallest map."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width, time_width = config.block_out_channels[-1], 4 * config.block_out_channels[0]
        groups, eps, scale_shift = config.norm_num_groups, config.norm_eps, config.scale_shift_norm
        self.resnets = nn.ModuleList(
            [ResBlock(width, width, groups, eps, time_width, scale_shift) for _ in range(2)]
        )
        self.attentions = nn.ModuleList([attention_layer(width, config.heads[-1], config.mid_depth, config)])

    def forward(self, x: Tensor, state: StepState) -> Tensor:
        x = state.resnet(self.resnets[0], x)  # type: ignore[arg-type]
        x = state.attention(self.attentions[0], x)  # type: ignore[arg-type]
        return state.resnet(self.resnets[1], x)  # type: ignore[arg-type]


class TimeEmbedding(nn.Module):
    """Linear(silu(linear(sinusoid))): four times the first level's width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = Linear(width, 4 * width)
        self.linear_2 = Linear(4 * width, 4 * width)

    def forward(self, sinusoid: Tensor) -> Tensor:
        return self.linear_2(nn.functional.silu(self.linear_1(sinusoid)))
