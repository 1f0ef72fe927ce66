"""Convolutions by torch's own oneDNN operators, on weights that were packed beforehand."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def missing(dtype: torch.dtype) -> str | None:
    """Why these operators cannot serve the dtype here, or None: each is tried once, against plain PyTorch."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, weight, bias, residual = normal(1, 16, 5, 6), normal(24, 16, 3, 3), normal(24), normal(1, 24, 5, 6)
    try:
        pack = pack_convolution(weight, 1, 1, x.shape)
        made = [convolve(x, pack, bias, 1, 1), convolve(x, pack, bias, 1, 1, residual)]
    except (
        AttributeError,
        RuntimeError,
        TypeError,
    ) as error:  # another torch: no such operator, or another one
        return f"torch's oneDNN operators on packed weights do not serve {dtype} here ({error})"
    expected = F.conv2d(x, weight, bias, 1, 1)
    if not torch.allclose(
        torch.stack(made), torch.stack((expected, expected + residual)), rtol=0.02, atol=0.1
    ):
        return f"torch's oneDNN operators on packed weights give wrong results in {dtype}"
    return None


def pack_convolution(weight: Tensor, stride: int, padding: int, input_shape: torch.Size) -> Tensor:
    """The weight in oneDNN's order for such a call; other shapes stay correct."""
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight.detach(), [padding] * 2, [stride] * 2, [1, 1], 1, input_shape
    )


def convolve(
    x: Tensor, pack: Tensor, bias: Tensor | None, stride: int, padding: int, residual: Tensor | None = None
) -> Tensor:
    """F.conv2d(x, weight, bias, stride, padding) + residual with the weight packed."""
    sizes = [padding] * 2, [stride] * 2, [1, 1], 1
    if residual is None:
        return torch.ops.mkldnn._convolution_pointwise.default(x, pack, bias, *sizes, "none", [], "")
    return torch.ops.mkldnn._convolution_pointwise.binary(
        x, residual, pack, bias, *sizes, "add", None, None, [], None
    )
