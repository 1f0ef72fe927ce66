"""geglu on the CPU: the product by oneDNN or PyTorch, and the gate on it while it is in cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.ops.cpp import extension
from fastldm.ops.cpp.extension import _C, TAGS, TYPES, library, unwritten
from fastldm.ops.cpp.linear import product, refuses_linear
from fastldm.ops.linear import geglu
from fastldm.ops.raw import on_cpu, records

STRIP = 4 << 20  # bytes of the product, for each thread, before it is gated: half of them stay in cache
ROWS = 512  # at least: a product of fewer goes through its weight too often

library.define("cpp_geglu_gate(Tensor x) -> Tensor", tags=TAGS)


@torch.library.impl(library, "cpp_geglu_gate", "CPU")
def gate(x: Tensor) -> Tensor:
    """h · gelu(g) for dense x = [h, g] along the last axis."""
    result = _shape_gate(x)
    _gate_into(result, x)
    return result


def _gate_into(result: Tensor, x: Tensor) -> None:
    channels = result.shape[-1]
    _C.geglu(
        extension.ISA,
        result.data_ptr(),
        x.data_ptr(),
        TYPES[x.dtype],
        result.numel() // channels,
        channels,
        torch.get_num_threads(),
    )


@torch.library.impl(library, "cpp_geglu_gate", "Meta")
def _shape_gate(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _refuses_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if not on_cpu(x, weight, bias):
        return "a tensor is not on the CPU"
    if x.dtype not in TYPES or weight.dtype != x.dtype:
        return "x and weight are not both float32 or both bfloat16"
    if x.numel() == 0 or weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[0] % 2:
        return "x is empty, or weight is not [2K, C]"
    if records(x, weight, bias):
        return "autograd records the call"
    return None


def strip_of(x: Tensor, weight: Tensor) -> int:
    """Rows of the product that are made, and gated, at a time."""
    return max(ROWS, STRIP * torch.get_num_threads() // (weight.shape[0] * x.element_size()))


@geglu.register("cpp", _refuses_geglu)
def _run_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.fastldm.cpp_geglu_gate.default(F.linear(x, weight, bias).contiguous())
    multiply = F.linear if refuses_linear(x, weight, bias) else product
    outputs, width = weight.shape
    strip = strip_of(x, weight)
    if x.numel() <= strip * width:
        return gate(multiply(x, weight, bias).contiguous())
    result = unwritten(x.new_empty((*x.shape[:-1], outputs // 2)))
    parts = x.reshape(-1, width).split(strip), result.view(-1, outputs // 2).split(strip)
    for part, gated in zip(*parts, strict=True):
        _gate_into(gated, multiply(part, weight, bias))
    return result
