"""group_norm_silu on the CPU: channels-last, one pass for the moments and one for the result."""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.ops.cpp.extension import _C, ISA, TAGS, TYPES, library, need_gradients
from fastldm.ops.norm import group_norm_silu

library.define(
    "cpp_group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps=1e-5, bool silu=True,"
    " Tensor? row_bias=None) -> Tensor",
    tags=TAGS,
)


@torch.library.impl(library, "cpp_group_norm_silu", "CPU")
def _run_group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    row_bias: Tensor | None = None,
) -> Tensor:
    result = torch.empty_like(x)
    rows, channels, height, width = x.shape
    _C.group_norm_silu(
        ISA,
        result.data_ptr(),
        x.data_ptr(),
        TYPES[x.dtype],
        rows,
        height * width,
        channels,
        weight.data_ptr(),
        bias.data_ptr(),
        TYPES[weight.dtype],
        None if row_bias is None else (row_bias.data_ptr(), TYPES[row_bias.dtype], row_bias.stride(0)),
        groups,
        eps,
        silu,
        torch.get_num_threads(),
    )
    return result


@torch.library.impl(library, "cpp_group_norm_silu", "Meta")
def _shape_group_norm_silu(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _refuses_group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    row_bias: Tensor | None = None,
) -> str | None:
    if not x.is_cpu:
        return "x is not on the CPU"
    if x.dtype not in TYPES:
        return f"x is {x.dtype}, not float32 or bfloat16"
    if x.dim() != 4 or x.numel() == 0 or not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not [N, C, H, W] in channels-last memory"
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        return f"{channels} channels do not form {groups} groups"
    if weight.dtype not in (x.dtype, torch.float32) or bias.dtype != weight.dtype:
        return "weight and bias have neither x's dtype nor float32"
    if (
        weight.shape != (channels,)
        or bias.shape != (channels,)
        or weight.stride(0) != 1
        or bias.stride(0) != 1
    ):
        return "weight or bias is not contiguous"
    if row_bias is not None:
        if row_bias.dtype not in (x.dtype, torch.float32):
            return "row_bias has neither x's dtype nor float32"
        if row_bias.shape != x.shape[:2] or row_bias.stride(1) != 1:
            return "row_bias is not [N, C] with neighbouring channels"
    if torch.is_grad_enabled() and need_gradients(x, weight, bias, row_bias):
        return "autograd records the call"
    return None


group_norm_silu.register("cpp", _refuses_group_norm_silu)(torch.ops.fastldm.cpp_group_norm_silu.default)
