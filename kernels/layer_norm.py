"""layer_norm with the modulation of an adaptive norm, in one pass over memory: a row stays in registers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastldm.kernels.launch import TYPES, device_of, implement, kernel, on_device
from fastldm.kernels.overlap import after_the_kernel_in_front
from fastldm.kernels.tuned import beaten, choose
from fastldm.ops.norm import layer_norm
from fastldm.ops.raw import records

WIDEST = 16384  # channels that one program can hold


@dataclass(frozen=True)
class Blocks:
    """Rows of a program, and its warps."""

    rows: int
    warps: int
    pdl: bool = False  # kernels/overlap.py


def blocks(channels: int) -> Blocks:
    """2048 elements in four warps; one row where it is longer."""
    width = triton.next_power_of_2(channels)
    return Blocks(max(1, 2048 // width), max(4, width // 1024))


def shape_of(x: Tensor) -> tuple[object, ...]:
    """What a call's line in the table of measurements goes by."""
    return x.dtype, x.numel() // x.shape[-1], x.shape[-1]


@kernel("rows", "tokens")
def layer_norm_kernel(
    x,
    weight,
    bias,
    scale,
    shift,
    result,
    rows,
    tokens,
    scale_stride,
    shift_stride,
    channels,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    SCALED: tl.constexpr,
    SHIFTED: tl.constexpr,
    PDL: tl.constexpr,
):
    """x, result [rows, channels]; weight, bias [channels]; scale, shift [rows / tokens, channels]. First the
    mean, then the squares of what lies around it: a large mean costs no digits.
    """
    after_the_kernel_in_front(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    known = channel < channels
    inside = (row < rows)[:, None] & known[None, :]
    place = row[:, None] * channels + channel[None, :]
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=1) / channels
    values = tl.where(known[None, :], values - mean[:, None], 0.0)
    variance = tl.sum(values * values, axis=1) / channels
    values *= tl.rsqrt(variance + eps)[:, None]
    if WEIGHTED:
        values *= tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    if BIASED:
        values += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    image = (row // tokens)[:, None]
    if SCALED:
        factor = tl.load(scale + image * scale_stride + channel[None, :], mask=inside, other=0.0)
        values *= 1 + factor.to(tl.float32)
    if SHIFTED:
        summand = tl.load(shift + image * shift_stride + channel[None, :], mask=inside, other=0.0)
        values += summand.to(tl.float32)
    tl.store(result + place, values.to(result.dtype.element_ty), mask=inside)


def _run(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    result = torch.empty_like(x)
    launch(x, weight, bias, eps, scale, shift, result)
    return result


def launch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    result: Tensor,
) -> None:
    """Fill the result."""
    channels = x.shape[-1]
    rows, width = x.numel() // channels, triton.next_power_of_2(channels)
    chosen = choose("layer_norm", x.device, shape_of(x), blocks(channels))
    with device_of(x):
        layer_norm_kernel[(triton.cdiv(rows, chosen.rows),)](
            x,
            x if weight is None else weight,  # a pointer that is not read
            x if bias is None else bias,
            x if scale is None else scale,
            x if shift is None else shift,
            result,
            rows,
            x.shape[1] if x.dim() == 3 else 1,
            0 if scale is None else scale.stride(0),
            0 if shift is None else shift.stride(0),
            channels,
            eps,
            ROWS=chosen.rows,
            WIDTH=width,
            WEIGHTED=weight is not None,
            BIASED=bias is not None,
            SCALED=scale is not None,
            SHIFTED=shift is not None,
            PDL=chosen.pdl,
            num_warps=chosen.warps,
        )


def _shape(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _refuses(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> str | None:
    if why := on_device(x, weight, bias, scale, shift):
        return why
    if x.dtype not in TYPES:
        return f"x is {x.dtype}, not one of {TYPES}"
    if x.dim() < 1 or x.numel() == 0 or not x.is_contiguous():
        return "x is empty or not contiguous"
    channels = x.shape[-1]
    if channels > WIDEST:
        return f"x has more than {WIDEST} channels"
    for tensor in (weight, bias):
        if tensor is not None and (tensor.shape != (channels,) or not tensor.is_contiguous()):
            return "weight or bias is not contiguous [C]"
    for tensor in (scale, shift):
        if tensor is None:
            continue
        if x.dim() != 3 or tensor.shape != (x.shape[0], channels) or tensor.stride(1) != 1:
            return "scale or shift is not [N, C] with neighbouring channels, for x [N, L, C]"
    for tensor in (weight, bias, scale, shift):
        if tensor is not None and tensor.dtype not in (x.dtype, torch.float32):
            return "weight, bias, scale or shift has neither x's dtype nor float32"
    if records(x, weight, bias, scale, shift):
        return "autograd records the call"
    return beaten("layer_norm", x.device, shape_of(x))


layer_norm.register("triton", _refuses)(
    implement(
        "triton_layer_norm(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-5,"
        " Tensor? scale=None, Tensor? shift=None) -> Tensor",
        _run,
        _shape,
    )
)
