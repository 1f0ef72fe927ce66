"""group_norm_silu on the CPU: channels-last, one pass for the moments and one for the result."""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.ops.cpp import extension
from fastldm.ops.cpp.extension import _C, TAGS, TYPES, library
from fastldm.ops.norm import group_norm_silu
from fastldm.ops.raw import refuses_group_norm_silu

library.define(
    "cpp_group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps=1e-5, bool silu=True,"
    " Tensor? row_bias=None) -> Tensor",
    tags=TAGS,
)


@torch.library.impl(library, "cpp_group_norm_silu", "CPU")
def _run(
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
        extension.ISA,
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
def _shape(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _refuses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    row_bias: Tensor | None = None,
) -> str | None:
    return refuses_group_norm_silu("cpu", TYPES, x, weight, bias, groups, row_bias)


group_norm_silu.register("cpp", _refuses)(torch.ops.fastldm.cpp_group_norm_silu.default)
