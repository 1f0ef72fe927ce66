"""The layers that the UNet and the autoencoder share; tensors are channels-last, tokens are [rows, H·W, C]
views of them.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from fastldm import ops


class Linear(nn.Linear):
    """x Wᵀ + bias (+ residual)."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.linear(x, self.weight, self.bias, residual)


class Conv2d(nn.Conv2d):
    """Convolution + bias (+ residual); square kernel, stride and padding."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.conv2d(x, self.weight, self.bias, int(self.stride[0]), int(self.padding[0]), residual)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the channels of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class GroupNorm(nn.GroupNorm):
    """Group norm, with SiLU unless told otherwise, of x plus a bias for each row; `moments` are those of the
    map of which x is a part.
    """

    def forward(
        self, x: Tensor, silu: bool = True, row_bias: Tensor | None = None, moments: Tensor | None = None
    ) -> Tensor:
        return ops.group_norm_silu(
            x, self.weight, self.bias, self.num_groups, self.eps, silu, row_bias, moments
        )

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """silu(norm(x) · (1 + scale) + shift) with scale and shift [N, C] of each row, in the same single
        pass: a row's modulation is an affine map of its own.
        """
        weights, biases = self.weight * (1 + scale), torch.addcmul(shift, self.bias, 1 + scale)
        rows = [
            ops.group_norm_silu(row, weight, bias, self.num_groups, self.eps)
            for row, weight, bias in zip(x.split(1), weights, biases, strict=True)
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


Network = TypeVar("Network", bound=nn.Module)


def channels_last(network: Network) -> Network:
    """The network with its convolutions' weights laid out channels-last, in place."""
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def to_tokens(x: Tensor) -> Tensor:
    """[N, C, H, W] → [N, H·W, C]: a view when x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def from_tokens(tokens: Tensor, like: Tensor) -> Tensor:
    """[N, H·W, C] → [N, C, H, W], channels-last, with the height and width of `like`."""
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """[N, L, heads·d] → [N, heads, L, d], a view."""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[N, heads, L, d] → [N, L, heads·d]."""
    return x.transpose(1, 2).flatten(2)


def repeat_rows(x: Tensor, rows: int) -> Tensor:
    """x, or copies of it one after the other along the first axis, `rows` long; keeps the memory format."""
    return x if len(x) == rows else torch.cat([x] * (rows // len(x)))


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time bias))), with a 1×1 shortcut where the width changes.

    The time bias [rows, C] is `time_emb_proj(silu(time embedding))`, computed ahead by the UNet's
    `condition`; the autoencoder has none. With `scale_shift` it is [rows, 2C]: what the second norm's result
    is scaled by, and then shifted by. (Dhariwal & Nichol 2021, arXiv:2105.05233, section 3.1)
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        groups: int,
        eps: float,
        time_width: int | None = None,
        scale_shift: bool = False,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = GroupNorm(groups, width_in, eps)
        self.conv1 = Conv2d(width_in, width, 3, padding=1)
        if time_width is not None:
            self.time_emb_proj = Linear(time_width, width * (1 + scale_shift))
        self.norm2 = GroupNorm(groups, width, eps)
        self.conv2 = Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = Conv2d(width_in, width, 1) if width_in != width else None

    def forward(self, x: Tensor, time_bias: Tensor | None = None) -> Tensor:
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return self.second_half(self.conv1(self.norm1(x)), time_bias, residual)

    def second_half(self, hidden: Tensor, time_bias: Tensor | None, residual: Tensor) -> Tensor:
        """From the first convolution's result to the block's."""
        if time_bias is not None and self.scale_shift:
            return self.conv2(self.norm2.modulated(hidden, *time_bias.chunk(2, dim=1)), residual)
        return self.conv2(self.norm2(hidden, row_bias=time_bias), residual)


class ResampleBlock(ResBlock):
    """A residual block that changes the resolution between its first norm and convolution, and its shortcut
    with it: enlarged 2×, or to the size given, by repetition; or the mean of 2×2 pixels, of those there are
    at an odd edge.
    """

    def __init__(
        self, width: int, groups: int, eps: float, time_width: int, scale_shift: bool, enlarges: bool
    ) -> None:
        super().__init__(width, width, groups, eps, time_width, scale_shift)
        self.enlarges = enlarges

    def forward(self, x: Tensor, time_bias: Tensor | None = None, size: torch.Size | None = None) -> Tensor:
        hidden = self.norm1(x)
        if self.enlarges:
            hidden = convolve_enlarged(self.conv1, hidden, size)
            residual = nn.functional.interpolate(x, hidden.shape[2:], mode="nearest")
        else:
            hidden = self.conv1(nn.functional.avg_pool2d(hidden, 2, ceil_mode=True))
            residual = nn.functional.avg_pool2d(x, 2, ceil_mode=True)
        return self.second_half(hidden, time_bias, residual)


class Downsample(nn.Module):
    """3×3 convolution with stride 2; the autoencoder pads right and below only, the UNet all round."""

    def __init__(self, width: int, asymmetric: bool) -> None:
        super().__init__()
        self.conv = Conv2d(width, width, 3, stride=2, padding=0 if asymmetric else 1)
        self.asymmetric = asymmetric

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest-neighbour 2× enlargement, or to the size given, and a 3×3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        return convolve_enlarged(self.conv, x, size)


def convolve_enlarged(conv: Conv2d, x: Tensor, size: torch.Size | None) -> Tensor:
    """The 3×3 convolution of x enlarged by repetition: 2×, or to the size given."""
    assert conv.bias is not None
    if size is not None and size != torch.Size(2 * side for side in x.shape[2:]):
        return conv(nn.functional.interpolate(x, size, mode="nearest"))
    return ops.upsample_conv(x, conv.weight, conv.bias)


class Attention(nn.Module):
    """Multi-head attention over tokens, added to the residual.

    The keys and values come from the tokens themselves, or ready made from `keys_values(context)`: a
    prompt's are computed once. Tokens of fewer rows than ready-made keys stand for several rows each:
    rows i, i + n, … of the keys meet row i of n.
    """

    def __init__(
        self, width: int, heads: int, context_width: int | None = None, qkv_bias: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width, bias=qkv_bias)
        self.to_k = Linear(context_width or width, width, bias=qkv_bias)
        self.to_v = Linear(context_width or width, width, bias=qkv_bias)
        self.to_out = nn.ModuleList([Linear(width, width)])

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context [rows, L, D] → keys and values [rows, heads, L, d]."""
        return split_heads(self.to_k(context), self.heads), split_heads(self.to_v(context), self.heads)

    def forward(
        self,
        tokens: Tensor,
        residual: Tensor,
        keys_values: tuple[Tensor, Tensor] | None = None,
        key_lengths: Tensor | None = None,
    ) -> Tensor:
        keys, values = self.keys_values(tokens) if keys_values is None else keys_values
        queries = repeat_rows(split_heads(self.to_q(tokens), self.heads), len(keys))
        mixed = ops.attention(queries, keys, values, key_lengths)
        return self.to_out[0](merge_heads(mixed), repeat_rows(residual, len(keys)))


class MapAttention(Attention):
    """Self-attention over all pixels of a map, group-normed before it."""

    def __init__(self, width: int, groups: int, eps: float, heads: int = 1) -> None:
        super().__init__(width, heads, qkv_bias=True)
        self.group_norm = GroupNorm(groups, width, eps)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        tokens = to_tokens(self.group_norm(x, silu=False))
        return from_tokens(super().forward(tokens, residual=to_tokens(x)), like=x)


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """[cos(t ω), sin(t ω)] with ω = 10000^(−i / (width/2)); float timesteps [...] → [..., width], at least
    float32.

    (Vaswani et al. 2017, arXiv:1706.03762; cosine first, as in latent diffusion)
    """
    dtype = torch.promote_types(timesteps.dtype, torch.float32)
    half = width // 2
    exponent = torch.arange(half, dtype=dtype, device=timesteps.device) * (
        -9.210340371976184 / half
    )  # −ln 10000
    angles = timesteps.to(dtype)[..., None] * torch.exp(exponent)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
