"""conv2d on the CPU: torch's oneDNN convolution with the weight packed once and the residual in its epilogue.

Called plainly, oneDNN puts the weight in its own order at each call. That is as much work as a few hundred
pixels of the convolution, so that packing pays for small maps: measured in docs/performance.md. A 1×1
convolution is the product of `linear`, whose pack serves maps of any size; the convolution's own does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.ops.cpp import onednn
from fastldm.ops.cpp.extension import TYPES
from fastldm.ops.cpp.linear import unfit
from fastldm.ops.cpp.packed import packed, unpackable
from fastldm.ops.linear import conv2d
from fastldm.ops.raw import records

MOST_PIXELS = 512  # of the result, over all its maps


def _refuses_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    residual: Tensor | None = None,
) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile packs weights by itself"
    if not x.is_cpu:
        return "x is not on the CPU"
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1]:
        return "x is not [N, C, H, W], or weight not [K, C, h, w]"
    rows, _, height, width = x.shape
    outputs, _, *window = weight.shape
    shape = (
        rows,
        outputs,
        *((n + 2 * padding - w) // stride + 1 for n, w in zip((height, width), window, strict=True)),
    )
    pixels = rows * shape[2] * shape[3]
    product = _is_product(weight, stride, padding)
    if not product and window == [1, 1]:
        return "a 1×1 convolution with stride or padding is no product"
    if product and (why := unfit(weight)):
        return why
    if pixels > MOST_PIXELS:
        return f"{pixels} pixels gain nothing from a packed weight"
    if x.dtype not in TYPES or weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return "x, weight and bias are not all float32 or all bfloat16"
    if x.numel() == 0 or min(shape) < 1 or x.is_contiguous():
        return "x or the result is empty, or x has one channel or one pixel"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not in channels-last memory"
    if bias is not None and bias.shape != (outputs,):
        return "bias is not [K]"
    if residual is not None and (
        residual.dtype != x.dtype
        or residual.shape != shape
        or not residual.is_contiguous(memory_format=torch.channels_last)
    ):
        return "residual has not the result's shape and dtype in channels-last memory"
    if records(x, weight, bias, residual):
        return "autograd records the call"
    return unpackable(weight) or onednn.missing(x.dtype)


@conv2d.register("cpp", _refuses_conv2d)
def _run_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    if not _is_product(weight, stride, padding):
        pack = packed(weight, onednn.pack_convolution, stride, padding, x.shape)
        return onednn.convolve(x, pack, bias, stride, padding, residual)
    added = None if residual is None else residual.permute(0, 2, 3, 1)
    result = onednn.multiply(x.permute(0, 2, 3, 1), packed(weight, onednn.pack_matrix), bias, added)
    return result.permute(0, 3, 1, 2)


def _is_product(weight: Tensor, stride: int, padding: int) -> bool:
    return weight.shape[2] == weight.shape[3] == stride == 1 and padding == 0
