"""group_norm_silu on the CPU: channels-last, one pass for the moments not given, and one for the result."""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.ops.cpp import extension
from fastldm.ops.cpp.extension import _C, TAGS, TYPES, direct, library, unwritten
from fastldm.ops.cpp.group_norm_silu_backward import recorded
from fastldm.ops.norm import channel_moments, group_norm_silu
from fastldm.ops.raw import named, records, refuses_group_norm_silu

library.define(
    "cpp_group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps=1e-5, bool silu=True,"
    " Tensor? row_bias=None, Tensor? moments=None) -> Tensor",
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
    moments: Tensor | None = None,
) -> Tensor:
    result = unwritten(torch.empty_like(x))
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
        0 if moments is None else moments.data_ptr(),
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
    moments: Tensor | None = None,
) -> str | None:
    if moments is not None and records(x, weight, bias, row_bias, moments):
        return "autograd records the call, of which moments are given"
    return refuses_group_norm_silu("cpu", TYPES, x, weight, bias, groups, row_bias, moments)


_kernel = direct(_run, torch.ops.fastldm.cpp_group_norm_silu.default)


@group_norm_silu.register("cpp", _refuses)
def _call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    row_bias: Tensor | None = None,
    moments: Tensor | None = None,
) -> Tensor:
    if records(x, weight, bias, row_bias):
        return recorded(x, weight, bias, groups, eps, silu, row_bias)
    return _kernel(x, weight, bias, groups, eps, silu, row_bias, moments)


library.define("cpp_channel_moments(Tensor x) -> Tensor", tags=TAGS)


@torch.library.impl(library, "cpp_channel_moments", "CPU")
def _run_moments(x: Tensor) -> Tensor:
    result = _shape_moments(x)
    rows, channels, height, width = x.shape
    where = extension.ISA, result.data_ptr(), x.data_ptr(), TYPES[x.dtype]
    _C.channel_moments(*where, rows, height * width, channels, torch.get_num_threads())
    return result


@torch.library.impl(library, "cpp_channel_moments", "Meta")
def _shape_moments(x: Tensor) -> Tensor:
    return torch.empty((x.shape[0], 2, x.shape[1]), dtype=torch.float32, device=x.device)


def _refuses_moments(x: Tensor) -> str | None:
    if not x.is_cpu:
        return "x is not on the CPU"
    if x.dtype not in TYPES:
        return f"x is {x.dtype}, not {named(TYPES)}"
    if x.dim() != 4 or x.numel() == 0 or not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not [N, C, H, W] in channels-last memory"
    return "autograd records the call" if records(x) else None


channel_moments.register("cpp", _refuses_moments)(
    direct(_run_moments, torch.ops.fastldm.cpp_channel_moments.default)
)
