"""layer_norm on the CPU, with its affine map and modulation, in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.ops.cpp import extension
from fastldm.ops.cpp.extension import _C, TAGS, TYPES, direct, library
from fastldm.ops.norm import layer_norm
from fastldm.ops.raw import on_cpu, records

library.define(
    "cpp_layer_norm(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-5, Tensor? scale=None,"
    " Tensor? shift=None) -> Tensor",
    tags=TAGS,
)


@torch.library.impl(library, "cpp_layer_norm", "CPU")
def run(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """As ops.layer_norm, for calls that the stand-in does not refuse."""
    result = torch.empty_like(x)
    channels = x.shape[-1]
    rows = x.numel() // channels
    affine = weight if weight is not None else bias
    _C.layer_norm(
        extension.ISA,
        result.data_ptr(),
        x.data_ptr(),
        TYPES[x.dtype],
        rows,
        channels,
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        TYPES[torch.float32 if affine is None else affine.dtype],
        eps,
        0 if scale is None else scale.data_ptr(),
        0 if scale is None else scale.stride(0),
        0 if shift is None else shift.data_ptr(),
        0 if shift is None else shift.stride(0),
        rows // x.shape[0],
        torch.get_num_threads(),
    )
    return result


@torch.library.impl(library, "cpp_layer_norm", "Meta")
def _shape_layer_norm(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _refuses_layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> str | None:
    if not on_cpu(x, weight, bias, scale, shift):
        return "a tensor is not on the CPU"
    if x.dtype not in TYPES:
        return f"x is {x.dtype}, not float32 or bfloat16"
    if x.dim() < 2 or x.numel() == 0 or not x.is_contiguous():
        return "x is not rows [..., C] in dense memory"
    channels = x.shape[-1:]
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        return "weight and bias differ in dtype"
    for affine in (weight, bias):
        if affine is not None:
            if affine.dtype not in (x.dtype, torch.float32):
                return "weight or bias has neither x's dtype nor float32"
            if affine.shape != channels or affine.stride(0) != 1:
                return "weight or bias is not a contiguous [C]"
    for modulation in (scale, shift):
        if modulation is not None:
            if modulation.dtype != x.dtype:
                return "scale or shift has not x's dtype"
            if x.dim() != 3 or modulation.shape != (x.shape[0], *channels) or modulation.stride(1) != 1:
                return "scale or shift is not [N, C] with neighbouring channels"
    if records(x, weight, bias, scale, shift):
        return "autograd records the call"
    return None


layer_norm.register("cpp", _refuses_layer_norm)(direct(run, torch.ops.fastldm.cpp_layer_norm.default))
