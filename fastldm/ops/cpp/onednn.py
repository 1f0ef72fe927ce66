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

    x, weight, bias = normal(1, 16, 5, 6), normal(24, 16, 3, 3), normal(24)
    try:
        made = convolve(x, pack_convolution(weight, 1, 1, x.shape), bias, 1, 1)
    except (
        AttributeError,
        RuntimeError,
        TypeError,
    ) as error:  # another torch: no such operator, or another one
        return f"torch's oneDNN operators on packed weights do not serve {dtype} here ({error})"
    if not torch.allclose(made, F.conv2d(x, weight, bias, 1, 1), rtol=0.02, atol=0.1):
        return f"torch's oneDNN operators on packed weights give wrong results in {dtype}"
    return None


def pack_convolution(weight: Tensor, stride: int, padding: int, input_shape: torch.Size) -> Tensor:
    """The weight in oneDNN's order for such a call; other shapes stay correct."""
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight.detach(), [padding] * 2, [stride] * 2, [1, 1], 1, input_shape
    )


def convolve(x: Tensor, pack: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """F.conv2d(x, weight, bias, stride, padding) with the weight packed."""
    return torch.ops.mkldnn._convolution_pointwise(
        x, pack, bias, [padding] * 2, [stride] * 2, [1, 1], 1, "none", [], ""
    )
