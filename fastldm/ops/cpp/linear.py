"""linear on the CPU: torch's oneDNN product with the weight packed once and the residual in its epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.ops.cpp import extension, onednn
from fastldm.ops.cpp.extension import TYPES
from fastldm.ops.cpp.packed import packed, unpackable
from fastldm.ops.linear import linear
from fastldm.ops.raw import records

# Smaller weights gain less than it costs to ask. In float32 PyTorch's own product is MKL's.
LEAST = {torch.float32: 1 << 16, torch.bfloat16: 1 << 15}


def gains_nothing(weight: Tensor) -> str | None:
    """Why a product is no faster with this weight packed, or None; measured in docs/performance.md."""
    if weight.numel() < LEAST.get(weight.dtype, 0):
        return "so small a weight gains nothing from packing"
    if weight.dtype == torch.float32 and not extension.ISA.startswith("avx512"):
        return "float32 gains nothing from a packed weight without AVX-512"
    return None


def refuses_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> str | None:
    """Why the stand-in cannot take the call, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile packs weights by itself"
    if not x.is_cpu:
        return "x is not on the CPU"
    if why := gains_nothing(weight):  # the commonest reason first
        return why
    dtype = x.dtype
    if dtype not in TYPES or weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        return "x, weight and bias are not all float32 or all bfloat16"
    if x.dim() < 2 or x.numel() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        return "x is not [..., C], or weight not [K, C]"
    outputs = weight.shape[0]
    if outputs == 0 or (bias is not None and bias.shape != (outputs,)):
        return "weight is empty, or bias is not [K]"
    if residual is not None and (
        residual.dtype != dtype or residual.shape != (*x.shape[:-1], outputs) or not residual.is_contiguous()
    ):
        return "residual has not the result's shape and dtype in dense memory"
    if records(x, weight, bias, residual):
        return "autograd records the call"
    return unpackable(weight) or onednn.missing(dtype)


@linear.register("cpp", refuses_linear)
def _run_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    return onednn.multiply(x, packed(weight, onednn.pack_matrix), bias, residual)
