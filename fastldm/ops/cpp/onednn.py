"""Products and convolutions by torch's own oneDNN operators, on weights that were packed beforehand."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers of a residual that a sum of its own adds up to 7 % faster than the product's epilogue.
LARGE = 1 << 20


@functools.cache
def missing(dtype: torch.dtype) -> str | None:
    """Why these operators cannot serve the dtype here, or None: each is tried once, against plain PyTorch."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    x, weight, bias, residual = normal(1, 16, 5, 6), normal(24, 16, 3, 3), normal(24), normal(1, 24, 5, 6)
    tokens, matrix, added = normal(5, 16), normal(24, 16), normal(5, 24)

    def convolutions() -> list[Tensor]:
        pack = pack_convolution(weight, 1, 1, x.shape)
        return [convolve(x, pack, bias, 1, 1), convolve(x, pack, bias, 1, 1, residual)]

    def products() -> list[Tensor]:
        pack = pack_matrix(matrix)
        return [multiply(tokens, pack, bias), multiply(tokens, pack, bias, added)]

    convolved, multiplied = F.conv2d(x, weight, bias, 1, 1), F.linear(tokens, matrix, bias)
    return _fault(dtype, convolutions, [convolved, convolved + residual]) or _fault(
        dtype, products, [multiplied, multiplied + added]
    )


def _fault(dtype: torch.dtype, make: Callable[[], list[Tensor]], expected: list[Tensor]) -> str | None:
    try:
        made = make()
    except (
        AttributeError,
        RuntimeError,
        TypeError,
    ) as error:  # another torch: no such operator, or another one
        return f"torch's oneDNN operators on packed weights do not serve {dtype} here ({error})"
    if not torch.allclose(torch.stack(made), torch.stack(expected), rtol=0.02, atol=0.1):
        return f"torch's oneDNN operators on packed weights give wrong results in {dtype}"
    return None


def pack_matrix(weight: Tensor) -> Tensor:
    """The weight [K, C] or [K, C, 1, 1] in oneDNN's order for `multiply` of few rows or many."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().flatten(1), None)


def multiply(x: Tensor, pack: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias) + residual with the weight packed."""
    if residual is not None and residual.numel() < LARGE:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, pack, bias, "add")
    product = torch.ops.mkldnn._linear_pointwise.default(x, pack, bias, "none", [], "")
    return product if residual is None else product.add_(residual)


def pack_convolution(weight: Tensor, stride: int, padding: int, input_shape: torch.Size) -> Tensor:
    """The weight in oneDNN's order for such a call; other shapes stay correct, and fast unless 1×1."""
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
