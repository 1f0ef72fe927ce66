"""The UNet of latent diffusion, with or without cross-attention. (Rombach et al. 2022, arXiv:2112.10752,
section 3.3)

Two phases. `condition` computes everything that does not depend on the latents, once per request: the keys
and values of every cross-attention, the time bias of every residual block at every step, the share of
concatenated channels in the first convolution. `forward` runs one step from them. Guided, the context has
two rows a picture and the latents one: what comes before the first cross-attention is computed once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastldm import ops
from fastldm.models.layers import (
    Conv2d,
    GroupNorm,
    ResBlock,
    merge_heads,
    repeat_rows,
    split_heads,
    timestep_embedding,
)
from fastldm.models.transformer import TransformerBlock
from fastldm.models.unet_blocks import Level, MidBlock, StepState, TimeEmbedding
from fastldm.models.unet_config import UNetConfig

__all__ = ["UNet", "UNetCondition", "UNetConfig"]


@dataclass(frozen=True)
class UNetCondition:
    """What the steps of B pictures share, in R rows: B, or 2B when guided, the unconditional half first."""

    context: Tensor  # [R, K]: keys, then values, of each cross-attention in forward order, each [L, width]
    time_bias: Tensor  # [B or 1, steps, sum of the residual blocks' widths, twice with scale_shift_norm]
    context_length: Tensor | None = None  # int [R]; None: every row is full
    concat_bias: Tensor | None = None  # [B, width, H, W]: the concatenated channels' share of conv_in


class UNet(nn.Module):
    """Predicts noise, velocity or clean latents from noisy latents, a timestep and, if it has
    cross-attentions, a context.
    """

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
        classes = config.num_class_embeds
        self.class_embedding = nn.Embedding(classes, 4 * widths[0]) if classes else None

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
        labels: Tensor | None = None,
    ) -> UNetCondition:
        """Everything that the steps of B pictures share.

        context [R, L, D], R = B or 2B, of any length and width where there is no cross-attention; timesteps
        float [steps], or [B, steps] where pictures stand at different ones; concat [B, C', H, W]: channels
        beside the latents (mask, masked latents, hints), zero if None; context_length int [R]: tokens of each
        row, None when all count; labels int [B]: classes, of a model that embeds them beside the timestep.
        """
        time_bias = self.time_bias(timesteps, context.dtype, labels)
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
        """The keys and values of every cross-attention: context [R, L, D] → [R, K], as in UNetCondition;
        K = 0 where there is none.
        """
        if not self._cross_attentions:
            return context.new_empty(len(context), 0)
        projected = (part for module in self._cross_attentions for part in module.keys_values(context))
        return torch.cat([merge_heads(part).flatten(1) for part in projected], dim=1)

    def time_bias(self, timesteps: Tensor, dtype: torch.dtype, labels: Tensor | None = None) -> Tensor:
        """What each timestep adds in all residual blocks: float [...] → [..., sum of their widths]; with
        labels int [B], timesteps [steps] or [B, steps] → [B, steps, …].
        """
        sinusoid = timestep_embedding(timesteps, self.config.block_out_channels[0]).to(dtype)
        embedding = self.time_embedding(sinusoid)
        if self.class_embedding is not None:
            assert labels is not None, "this UNet embeds a class beside the timestep"
            embedding = embedding + self.class_embedding(labels)[:, None]
        embedding = nn.functional.silu(embedding)
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
        return repeat_rows(self.conv_out(self.conv_norm_out(x)), len(condition.context))

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
        if not widths:
            return
        tokens = context.shape[1] // sum(widths)
        parts = iter(context.split([tokens * width for width in widths], dim=1))
        for module in self._cross_attentions:
            keys, values = (split_heads(next(parts).unflatten(1, (tokens, -1)), module.heads) for _ in "kv")
            yield keys, values
