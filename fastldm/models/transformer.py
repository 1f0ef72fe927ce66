"""Transformers over the pixels of a map, with cross-attention to a context: the UNet's second kind of block.

A guided batch is the same latents twice, beside two contexts, so both halves are equal up to the first
cross-attention. `x` therefore has a row a picture until then; where it meets keys and values of more rows,
its rows are repeated to match. (Rombach et al. 2022, arXiv:2112.10752, section 3.3)
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn

from fastldm import ops
from fastldm.models.layers import (
    Attention,
    Conv2d,
    GroupNorm,
    LayerNorm,
    Linear,
    from_tokens,
    repeat_rows,
    to_tokens,
)

NORM_EPS = 1e-6


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, GEGLU feed-forward, each after a layer norm and added to its input."""

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm2 = LayerNorm(width)
        self.attn2 = Attention(width, heads, context_width)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(
        self, tokens: Tensor, keys_values: tuple[Tensor, Tensor], key_lengths: Tensor | None
    ) -> Tensor:
        tokens = self.attn1(self.norm1(tokens), residual=tokens)
        tokens = self.attn2(self.norm2(tokens), tokens, keys_values, key_lengths)
        return self.ff(self.norm3(tokens), residual=tokens)


class Gate(nn.Module):
    """h · gelu(g) of one projection to twice the width."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.proj = Linear(width_in, 2 * width)

    def forward(self, tokens: Tensor) -> Tensor:
        return ops.geglu(tokens, self.proj.weight, self.proj.bias)


class FeedForward(nn.Module):
    """Linear(gate(x)) + residual, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([Gate(width, 4 * width), nn.Identity(), Linear(4 * width, width)])

    def forward(self, tokens: Tensor, residual: Tensor) -> Tensor:
        return self.net[2](self.net[0](tokens), residual)


class Transformer(nn.Module):
    """Group norm, projection, transformer blocks over all pixels, projection, added to the input."""

    def __init__(
        self, width: int, heads: int, depth: int, context_width: int, groups: int, linear_projection: bool
    ) -> None:
        super().__init__()

        # The same product either way; checkpoints store it as a matrix or as a 1×1 convolution.
        projection = partial(Linear, width, width) if linear_projection else partial(Conv2d, width, width, 1)
        self.norm = GroupNorm(groups, width, NORM_EPS)
        self.proj_in: Linear | Conv2d = projection()
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(width, heads, context_width) for _ in range(depth)]
        )
        self.proj_out: Linear | Conv2d = projection()

    def forward(
        self, x: Tensor, keys_values: Iterator[tuple[Tensor, Tensor]], key_lengths: Tensor | None
    ) -> Tensor:
        tokens = to_tokens(self.norm(x, silu=False))
        tokens = ops.linear(tokens, self.proj_in.weight.flatten(1), self.proj_in.bias)
        for block in self.transformer_blocks:
            tokens = block(tokens, next(keys_values), key_lengths)
        residual = repeat_rows(to_tokens(x), len(tokens))
        tokens = ops.linear(tokens, self.proj_out.weight.flatten(1), self.proj_out.bias, residual)
        return from_tokens(tokens, like=x)
