"""conv2d on the CPU with the weight packed once and the residual added into the sums.

Called plainly, oneDNN puts the weight in its own order at each call. That is as much work as a few hundred
pixels of the convolution, so that packing pays for small maps: measured in docs/performance.md. A small
float32 weight goes to our own kernel. Else a 3×3 convolution is torch's oneDNN operator, and a 1×1 one the
product of `linear`, whose pack serves maps of any size; the convolution's own does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.ops.cpp import onednn, panels
from fastldm.ops.cpp.extension import TYPES
from fastldm.ops.cpp.linear import unfit
from fastldm.ops.cpp.packed import packed, unpackable
from fastldm.ops.linear import conv2d
from fastldm.ops.raw import on_cpu, records

MOST_PIXELS = 512  # of the result, over all its maps


def _result_size(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[int, int]:
    (*_, height, width), (*_, down, across) = x.shape, weight.shape
    return (height + 2 * padding - down) // stride + 1, (width + 2 * padding - across) // stride + 1


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
    if not on_cpu(x, weight, bias, residual):
        return "a tensor is not on the CPU"
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1]:
        return "x is not [N, C, H, W], or weight not [K, C, h, w]"
    rows, outputs = x.shape[0], weight.shape[0]
    height, width = _result_size(x, weight, stride, padding)
    pixels = rows * height * width
    if pixels > MOST_PIXELS:
        return f"{pixels} pixels gain nothing from a packed weight"
    dtype = x.dtype
    if dtype not in TYPES or weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        return "x, weight and bias are not all float32 or all bfloat16"
    if x.numel() == 0 or outputs == 0 or height < 1 or width < 1 or x.is_contiguous():
        return "x or the result is empty, or x has one channel or one pixel"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not in channels-last memory"
    if bias is not None and (bias.shape != (outputs,) or not bias.is_contiguous()):
        return "bias is not a dense [K]"
    if residual is not None and (
        residual.dtype != dtype
        or residual.shape != (rows, outputs, height, width)
        or not residual.is_contiguous(memory_format=torch.channels_last)
    ):
        return "residual has not the result's shape and dtype in channels-last memory"
    if records(x, weight, bias, residual):
        return "autograd records the call"
    if panels.fits(weight, pixels):
        return unpackable(weight)
    if weight.shape[2] == weight.shape[3] == 1:
        if stride != 1 or padding:
            return "a 1×1 convolution with stride or padding is no product"
        if why := unfit(weight, pixels):
            return why
    return unpackable(weight) or onednn.missing(dtype)


@conv2d.register("cpp", _refuses_conv2d)
def _run_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    height, width = size = _result_size(x, weight, stride, padding)
    if panels.fits(weight, len(x) * height * width):
        pack = packed(weight, panels.pack)
        return panels.convolve(x, weight, pack, bias, stride, padding, residual, size)
    if weight.shape[2] > 1 or weight.shape[3] > 1:
        pack = packed(weight, onednn.pack_convolution, stride, padding, x.shape)
        return onednn.convolve(x, pack, bias, stride, padding, residual)
    added = None if residual is None else residual.permute(0, 2, 3, 1)
    result = onednn.multiply(x.permute(0, 2, 3, 1), packed(weight, onednn.pack_matrix), bias, added)
    return result.permute(0, 3, 1, 2)
