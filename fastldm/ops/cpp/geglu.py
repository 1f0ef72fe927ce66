"""geglu on the CPU: the product by PyTorch, the gate in one pass over what it gives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.ops.cpp import extension
from fastldm.ops.cpp.extension import _C, TAGS, TYPES, library
from fastldm.ops.linear import geglu
from fastldm.ops.raw import records

library.define("cpp_geglu_gate(Tensor x) -> Tensor", tags=TAGS)


@torch.library.impl(library, "cpp_geglu_gate", "CPU")
def gate(x: Tensor) -> Tensor:
    """h · gelu(g) for dense x = [h, g] along the last axis."""
    result = _shape_gate(x)
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
    return result


@torch.library.impl(library, "cpp_geglu_gate", "Meta")
def _shape_gate(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _refuses_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if not x.is_cpu:
        return "x is not on the CPU"
    if x.dtype not in TYPES or weight.dtype != x.dtype:
        return "x and weight are not both float32 or both bfloat16"
    if x.numel() == 0 or weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[0] % 2:
        return "x is empty, or weight is not [2K, C]"
    if records(x, weight, bias):
        return "autograd records the call"
    return None


@geglu.register("cpp", _refuses_geglu)
def _run_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    both = F.linear(x, weight, bias).contiguous()
    if torch.compiler.is_compiling():
        return torch.ops.fastldm.cpp_geglu_gate.default(both)
    return gate(both)  # past the dispatcher, which costs more than a small gate
