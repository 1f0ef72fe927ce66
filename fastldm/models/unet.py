"""The cross-attention UNet of latent diffusion, SD1 and SD2. (Rombach et al. 2022, arXiv:2112.10752,
section 3.3)

Two phases. `condition` computes everything that does not depend on the latents, once per request: the keys
and values of every cross-attention, the time bias of every residual block at every step, the share of
concatenated channels in the first convolution. `forward` runs one step from them. Guided, the context has
two rows a picture and the latents one: what comes before the first cross-attention is computed once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastldm import ops
from fastldm.errors import CheckpointError
from fastldm.models.config import per_level, read_config
from fastldm.models.layers import (
    Conv2d,
    Downsample,
    GroupNorm,
    Linear,
    ResBlock,
    Upsample,
    merge_heads,
    repeat_rows,
    split_heads,
    timestep_embedding,
)
from fastldm.models.transformer import Transformer, TransformerBlock


@dataclass(frozen=True)
class UNetConfig:
    """A UNet's shape, level by level from the largest map to the smallest."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    heads: tuple[int, ...] = (8, 8, 8, 8)
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0)  # 0: no transformers on this level
    mid_depth: int = 1
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int = 64  # side of the latents it was trained on

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, without concatenated ones (masks, masked latents)."""
        return self.out_channels

    @property
    def inpaints(self) -> bool:
        """Whether a mask and masked latents stand beside the latents, as in SD's inpainting models."""
        return self.in_channels == 2 * self.latent_channels + 1

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], file: str = "unet/config.json") -> UNetConfig:
        """Read the fields of a diffusers unet/config.json; CheckpointError for one that this network does
        not have.
        """
        fields = {"sample_size": 64, "cross_attention_dim": 1280, **fields}
        widths = fields.get("block_out_channels", (320, 640, 1280, 1280))
        levels = len(widths) if isinstance(widths, list | tuple) else 0
        down = fields.get("down_block_types", ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"])
        up = fields.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1))
        kinds = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}
        if [kinds.get(kind) for kind in down] != list(up)[::-1] or len(down) != levels:
            raise CheckpointError(
                file, "down_block_types", f"{down} with {up} is not a UNet that fastldm knows"
            )
        # In these files `attention_head_dim` means the number of heads, unless `num_attention_heads` is
        # given.
        heads = per_level(fields, "num_attention_heads", levels, file) or per_level(
            fields, "attention_head_dim", levels, file
        )
        depth = per_level(fields, "transformer_layers_per_block", levels, file) or (1,) * levels
        fixed = {
            "down_block_types": down,
            "up_block_types": up,
            "act_fn": "silu",
            "center_input_sample": False,
            "conv_in_kernel": 3,
            "conv_out_kernel": 3,
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "mid_block_scale_factor": 1,
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "resnet_time_scale_shift": "default",
            "resnet_out_scale_factor": 1.0,
            "time_embedding_type": "positional",
            "attention_type": "default",
        }
        inert = {
            *("num_attention_heads", "attention_head_dim", "transformer_layers_per_block"),  # read above
            "upcast_attention",  # attention scores are always accumulated in float32
            *("dropout", "addition_embed_type_num_heads"),
        }
        derived = ("heads", "transformer_depth", "mid_depth")
        read = read_config(cls, fields, file, fixed=fixed, inert=inert, derived=derived)
        return cls(
            **read,
            heads=heads or (8,) * levels,
            transformer_depth=tuple(
                d if kind == "CrossAttnDownBlock2D" else 0 for d, kind in zip(depth, down, strict=True)
            ),
            mid_depth=depth[-1],
        )

    def to_dict(self) -> dict[str, Any]:
        """The diffusers unet/config.json of this UNet."""
        attends = [depth > 0 for depth in self.transformer_depth]
        depths = [depth or self.mid_depth for depth in self.transformer_depth]
        depths[-1] = self.mid_depth
        return {
            "_class_name": "UNet2DConditionModel",
            "sample_size": self.sample_size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": list(self.block_out_channels),
            "layers_per_block": self.layers_per_block,
            "down_block_types": ["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in attends],
            "up_block_types": ["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in attends[::-1]],
            "attention_head_dim": list(self.heads),
            "transformer_layers_per_block": depths if len(set(depths)) > 1 else depths[0],
            "cross_attention_dim": self.cross_attention_dim,
            "use_linear_projection": self.use_linear_projection,
            "norm_num_groups": self.norm_num_groups,
            "norm_eps": self.norm_eps,
        }


@dataclass(frozen=True)
class UNetCondition:
    """What the steps of B pictures share, in R rows: B, or 2B when guided, the unconditional half first."""

    context: Tensor  # [R, K]: keys, then values, of each cross-attention in forward order, each [L, width]
    time_bias: Tensor  # [B or 1, steps, sum of the residual blocks' widths]
    context_length: Tensor | None = None  # int [R]; None: every row is full
    concat_bias: Tensor | None = None  # [B, width, H, W]: the concatenated channels' share of conv_in


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


def transformer(width: int, heads: int, depth: int, config: UNetConfig) -> Transformer:
    """A transformer as this UNet has them."""
    return Transformer(
        width,
        heads,
        depth,
        config.cross_attention_dim,
        config.norm_num_groups,
        config.use_linear_projection,
    )


class Level(nn.Module):
    """One resolution of the way down or up: residual blocks, each with a transformer where the level
    attends, then a resampling.

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
        self.goes_up = goes_up
        self.resnets = nn.ModuleList([ResBlock(w, width, groups, eps, time_width) for w in widths_in])
        self.attentions = nn.ModuleList(
            [transformer(width, heads, depth, config) for _ in widths_in] if depth else []
        )
        self.downsamplers = nn.ModuleList([Downsample(width, asymmetric=False)] if resample == "down" else [])
        self.upsamplers = nn.ModuleList([Upsample(width)] if resample == "up" else [])

    def forward(self, x: Tensor, state: StepState) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.block(i, x, state)
        for downsample in self.downsamplers:
            x = downsample(x)
            state.skips.append(x)
        for upsample in self.upsamplers:
            x = upsample(x, state.skips[-1].shape[2:])
        return x

    def block(self, i: int, x: Tensor, state: StepState) -> Tensor:
        """The i-th residual block, with its skip and its transformer."""
        if self.goes_up:
            if state.deep is not None and len(state.skips) == 1:
                state.deep.copy_(x)
            x = torch.cat((x, repeat_rows(state.skips.pop(), len(x))), dim=1)
        x = self.resnets[i](x, next(state.time_biases)[: len(x)])
        if self.attentions:
            x = self.attentions[i](x, state.keys_values, state.key_lengths)
        if not self.goes_up:
            state.skips.append(x)
        return x


class MidBlock(nn.Module):
    """Residual block, transformer, residual block on the smallest map."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width, time_width = config.block_out_channels[-1], 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(
            [ResBlock(width, width, config.norm_num_groups, config.norm_eps, time_width) for _ in range(2)]
        )
        self.attentions = nn.ModuleList([transformer(width, config.heads[-1], config.mid_depth, config)])

    def forward(self, x: Tensor, state: StepState) -> Tensor:
        x = self.resnets[0](x, next(state.time_biases)[: len(x)])
        x = self.attentions[0](x, state.keys_values, state.key_lengths)
        return self.resnets[1](x, next(state.time_biases))


class TimeEmbedding(nn.Module):
    """Linear(silu(linear(sinusoid))): four times the first level's width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = Linear(width, 4 * width)
        self.linear_2 = Linear(4 * width, 4 * width)

    def forward(self, sinusoid: Tensor) -> Tensor:
        return self.linear_2(nn.functional.silu(self.linear_1(sinusoid)))


class UNet(nn.Module):
    """Predicts noise, velocity or clean latents from noisy latents, a timestep and a context."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, layers, last = (
            config.block_out_channels,
            config.layers_per_block,
            len(config.block_out_channels) - 1,
        )
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0])

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]
        for i, width in enumerate(widths):
            widths_in = [skips[-1]] + [width] * (layers - 1)
            self.down_blocks.append(
                Level(widths_in, width, i, config, "down" if i < last else None, goes_up=False)
            )
            skips += [width] * (layers + (i < last))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            widths_in = [before + skips.pop() for before in [below] + [width] * layers]
            self.up_blocks.append(Level(widths_in, width, i, config, "up" if i > 0 else None, goes_up=True))
            below = width

        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = Conv2d(widths[0], config.out_channels, 3, padding=1)
        # Modules register in the order in which they run, so these lists are in forward order.
        self._time_projections = [
            module.time_emb_proj for module in self.modules() if isinstance(module, ResBlock)
        ]
        self._cross_attentions = [
            module.attn2 for module in self.modules() if isinstance(module, TransformerBlock)
        ]

    def condition(
        self,
        context: Tensor,
        timesteps: Tensor,
        concat: Tensor | None = None,
        context_length: Tensor | None = None,
    ) -> UNetCondition:
        """Everything that the steps of B pictures share.

        context [R, L, D], R = B or 2B; timesteps float [steps], or [B, steps] where pictures stand at
        different ones; concat [B, C', H, W]: channels beside the latents (mask, masked latents, hints), zero
        if None; context_length int [R]: tokens of each row, None when all count.
        """
        time_bias = self.time_bias(timesteps, context.dtype)
        return UNetCondition(
            self.keys_values(context),
            time_bias if time_bias.dim() == 3 else time_bias[None],
            context_length,
            None if concat is None else self.concat_bias(concat),
        )

    def concat_bias(self, concat: Tensor) -> Tensor:
        """The share in conv_in, its bias included, of channels beside the latents: [B, C', H, W] → [B, width,
        H, W].
        """
        share = self.conv_in.weight[:, self.config.latent_channels :]
        concat = concat.contiguous(memory_format=torch.channels_last)
        return ops.conv2d(concat, share, self.conv_in.bias, padding=1)

    def keys_values(self, context: Tensor) -> Tensor:
        """The keys and values of every cross-attention: context [R, L, D] → [R, K], as in UNetCondition."""
        projected = (part for module in self._cross_attentions for part in module.keys_values(context))
        return torch.cat([merge_heads(part).flatten(1) for part in projected], dim=1)

    def time_bias(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """What each timestep adds in all residual blocks: float [...] → [..., sum of their widths]."""
        sinusoid = timestep_embedding(timesteps, self.config.block_out_channels[0]).to(dtype)
        embedding = nn.functional.silu(self.time_embedding(sinusoid))
        return torch.cat([projection(embedding) for projection in self._time_projections], dim=-1)

    def forward(
        self, latents: Tensor, condition: UNetCondition, step: Tensor, deep: Tensor | None = None
    ) -> Tensor:
        """Predict [R, C, H, W] from latents [B, C, H, W] at `step` int [B], an index into the condition's
        steps; rows i and B + i belong to latents i. `deep` [R, first level's width, H, W], if given, is
        filled with the features that `shallow` takes.
        """
        x, state = self._begin(latents, condition, step)
        state.deep = deep
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            x = block(x, state)
        return self.conv_out(self.conv_norm_out(x))

    def shallow(self, latents: Tensor, condition: UNetCondition, step: Tensor, deep: Tensor) -> Tensor:
        """About what `forward` predicts, by its first convolution and its last block alone: what lies
        between them is taken from `deep`, as a step before left it. (Ma et al. 2023, arXiv:2312.00858)
        """
        _, state = self._begin(latents, condition, step)
        last = self.up_blocks[-1]
        assert isinstance(last, Level)
        state.time_biases = iter(deque(state.time_biases, maxlen=1))
        state.keys_values = iter(deque(state.keys_values, maxlen=self.config.transformer_depth[0]))
        x = last.block(-1, deep, state)
        return self.conv_out(self.conv_norm_out(x))

    def _begin(self, latents: Tensor, condition: UNetCondition, step: Tensor) -> tuple[Tensor, StepState]:
        """The first convolution's output, and what the blocks after it take from."""
        count, rows = len(latents), len(condition.context)
        bias = condition.time_bias.expand(count, -1, -1)[torch.arange(count, device=step.device), step]
        widths = [projection.out_features for projection in self._time_projections]
        latents = latents.contiguous(memory_format=torch.channels_last)
        if self.config.in_channels == self.config.latent_channels:
            x = self.conv_in(latents)
        else:  # channels that no condition told of are zero
            share = self.conv_in.weight[:, : self.config.latent_channels]
            own_bias = self.conv_in.bias if condition.concat_bias is None else None
            x = ops.conv2d(latents, share, own_bias, padding=1, residual=condition.concat_bias)
        return x, StepState(
            time_biases=iter(repeat_rows(bias, rows).split(widths, dim=1)),
            keys_values=self._split(condition.context),
            key_lengths=condition.context_length,
            skips=[x],
        )

    def _split(self, context: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The packed keys and values of each cross-attention, views [R, heads, L, d]."""
        widths = [module.to_q.out_features for module in self._cross_attentions for _ in "kv"]
        tokens = context.shape[1] // sum(widths)
        parts = iter(context.split([tokens * width for width in widths], dim=1))
        for module in self._cross_attentions:
            keys, values = (split_heads(next(parts).unflatten(1, (tokens, -1)), module.heads) for _ in "kv")
            yield keys, values
