"""linear on the CPU, with the weight packed once: in bfloat16 torch's oneDNN product, in float32 our own.

oneDNN's is none for float32, for it adds a product up in one go where PyTorch's MKL takes blocks: the RMS
error is 1.4 times as large over 320 numbers and 2.2 times over 5120. Ours takes blocks, for few rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.ops.cpp import onednn, panels
from fastldm.ops.cpp.extension import TYPES
from fastldm.ops.cpp.packed import packed, unpackable
from fastldm.ops.linear import linear
from fastldm.ops.raw import on_cpu, records

LEAST = 1 << 15  # weights: fewer gain less than it costs to ask


def unfit(weight: Tensor, rows: int) -> str | None:
    """Why no product of so many rows should have this weight packed, or None; measured in
    docs/performance.md.
    """
    if weight.dtype == torch.float32:
        return None if panels.fits(weight, rows) else "float32 products so large gain nothing from packing"
    if weight.numel() < LEAST:
        return "so small a weight gains nothing from packing"
    return None


def refuses_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> str | None:
    """Why the stand-in cannot take the call, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile packs weights by itself"
    if not on_cpu(x, weight, bias, residual):
        return "a tensor is not on the CPU"
    if weight.dim() != 2:
        return "weight is not [K, C]"
    outputs, width = weight.shape
    if x.dim() < 2 or x.numel() == 0 or width != x.shape[-1]:
        return "x is not [..., C] as weight is [K, C]"
    if why := unfit(weight, x.numel() // width):
        return why
    dtype = x.dtype
    if dtype not in TYPES or weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        return "x, weight and bias are not all float32 or all bfloat16"
    if dtype == torch.float32 and not (x.is_contiguous() and (bias is None or bias.is_contiguous())):
        return "x or bias is not in dense memory"
    if outputs == 0 or (bias is not None and bias.shape != (outputs,)):
        return "weight is empty, or bias is not [K]"
    if residual is not None and (
        residual.dtype != dtype or residual.shape != (*x.shape[:-1], outputs) or not residual.is_contiguous()
    ):
        return "residual has not the result's shape and dtype in dense memory"
    if records(x, weight, bias, residual):
        return "autograd records the call"
    return unpackable(weight) or (onednn.missing(dtype) if dtype == torch.bfloat16 else None)


@linear.register("cpp", refuses_linear)
def _run_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    return product(x, weight, bias, residual)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """As ops.linear, for calls that `refuses_linear` does not refuse."""
    if x.dtype == torch.float32:
        return panels.multiply(x, weight, packed(weight, panels.pack), bias, residual)
    return onednn.multiply(x, packed(weight, onednn.pack_matrix), bias, residual)
