"""conv2d as an implicit product of matrices, with bias and residual; the depth is split where maps are small.

cuDNN is the default. This kernel serves only shapes for which the table of measurements of the device at hand
holds a division of the work (`fastldm.kernels.tuned`): those where it was the faster of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastldm.kernels.launch import TYPES, device_of, implement, kernel, on_device
from fastldm.kernels.tuned import beaten, choose
from fastldm.ops.linear import conv2d
from fastldm.ops.raw import records


@dataclass(frozen=True)
class Tiles:
    """A program's share: pixels × channels of the result, `depth` input channels at a time; `splits` programs
    share the depth of one tile and add up in float32.
    """

    rows: int
    columns: int
    depth: int
    splits: int
    warps: int
    stages: int


TILES = Tiles(rows=128, columns=128, depth=64, splits=1, warps=8, stages=3)
GROUP = 8  # tiles of pixels that share columns of the weight while they are in the cache
REDUCED = 1024  # elements that one program of the second launch adds up


@kernel("rows", "share")
def conv2d_kernel(
    x,
    weight,
    bias,
    residual,
    result,
    rows,
    width,
    channels,
    in_height,
    in_width,
    out_height,
    out_width,
    stride,
    padding,
    share,
    KERNEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    SPLIT: tl.constexpr,
    BIASED: tl.constexpr,
    ADDS: tl.constexpr,
):
    """x [N, H, W, C], weight [K, h, w, C], residual and result [N, H', W', K], rows = N H' W'. Program (tile,
    split) goes `share` steps through the depth, which is h · w · ⌈C / DEPTH⌉ steps long. SPLIT: the result is
    float32 [splits, rows, K], without bias and residual. WHOLE: C is a multiple of DEPTH.
    """
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(width, COLUMNS)
    program = tl.program_id(0)
    first = program // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    within = program % (GROUP * across)
    row = (first + within % height) * ROWS + tl.arange(0, ROWS)
    column = within // height * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    row_inside, column_inside = row < rows, column < width

    image = row // (out_height * out_width)
    top = row // out_width % out_height * stride - padding
    left = row % out_width * stride - padding
    steps = tl.cdiv(channels, DEPTH)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, KERNEL * KERNEL * steps)
    at_weight = weight + column.to(tl.int64)[None, :] * (KERNEL * KERNEL * channels)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(begin, end):
        tap = step // steps
        channel = step % steps * DEPTH + depth
        y, across_x = top + tap // KERNEL, left + tap % KERNEL
        seen = row_inside & (y >= 0) & (y < in_height) & (across_x >= 0) & (across_x < in_width)
        pixel = (image.to(tl.int64) * in_height + y) * in_width + across_x
        from_x = x + pixel[:, None] * channels + channel[None, :]
        from_weight = at_weight + (tap * channels + channel)[:, None]
        if WHOLE:
            pixels = tl.load(from_x, mask=seen[:, None], other=0.0)
            weights = tl.load(from_weight, mask=column_inside[None, :], other=0.0)
        else:
            inside = channel < channels
            pixels = tl.load(from_x, mask=seen[:, None] & inside[None, :], other=0.0)
            weights = tl.load(from_weight, mask=column_inside[None, :] & inside[:, None], other=0.0)
        total = tl.dot(pixels, weights, total, input_precision="ieee")

    both = row_inside[:, None] & column_inside[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    if SPLIT:
        slab = tl.program_id(1).to(tl.int64) * rows * width
        tl.store(result + slab + place, total, mask=both)
    else:
        if BIASED:
            total += tl.load(bias + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
        if ADDS:
            total += tl.load(residual + place, mask=both, other=0.0).to(tl.float32)
        tl.store(result + place, total.to(result.dtype.element_ty), mask=both)


@kernel("elements", "splits")
def reduce_kernel(
    parts,
    bias,
    residual,
    result,
    elements,
    width,
    splits,
    BLOCK: tl.constexpr,
    BIASED: tl.constexpr,
    ADDS: tl.constexpr,
):
    """result [elements] = Σ parts [splits, elements] + bias + residual, always in the order of the splits."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(parts + split * elements.to(tl.int64) + element, mask=inside, other=0.0)
    if BIASED:
        total += tl.load(bias + element % width, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        total += tl.load(residual + element, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + element, total.to(result.dtype.element_ty), mask=inside)


def shape_of(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[object, ...]:
    """What a call's line in the table of measurements goes by."""
    return x.dtype, *x.shape, *weight.shape, stride, padding


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    tiles = choose("conv2d", x.device, shape_of(x, weight, stride, padding), TILES)
    result = _shape(x, weight, bias, stride, padding, residual)
    launch(tiles, x, weight, bias, stride, padding, residual, result)
    return result


def launch(
    tiles: Tiles,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    residual: Tensor | None,
    result: Tensor,
) -> None:
    """Fill the result, dividing the work so."""
    images, channels, in_height, in_width = x.shape
    width, kernel = weight.shape[0], weight.shape[2]
    out_height, out_width = result.shape[2:]
    rows = images * out_height * out_width
    steps = kernel * kernel * triton.cdiv(channels, tiles.depth)
    share = triton.cdiv(steps, tiles.splits)
    splits = triton.cdiv(steps, share)  # none without work
    split = splits > 1
    target = x.new_empty(splits, rows, width, dtype=torch.float32) if split else result
    grid = triton.cdiv(rows, tiles.rows) * triton.cdiv(width, tiles.columns), splits
    nothing = weight  # a pointer that is not read
    biases, residuals = nothing if bias is None else bias, nothing if residual is None else residual
    epilogue = {"BIASED": bias is not None, "ADDS": residual is not None}
    with device_of(x):
        conv2d_kernel[grid](
            x,
            weight,
            biases,
            residuals,
            target,
            rows,
            width,
            channels,
            in_height,
            in_width,
            out_height,
            out_width,
            stride,
            padding,
            share,
            KERNEL=kernel,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            DEPTH=tiles.depth,
            GROUP=GROUP,
            WHOLE=channels % tiles.depth == 0,
            SPLIT=split,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **epilogue,
        )
        if split:
            elements = rows * width
            reduce_kernel[(triton.cdiv(elements, REDUCED),)](
                target, biases, residuals, result, elements, width, splits, BLOCK=REDUCED, **epilogue
            )


def _shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    size = _size(x, weight, stride, padding)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _refuses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    residual: Tensor | None = None,
) -> str | None:
    tensors = [tensor for tensor in (x, weight, bias, residual) if tensor is not None]
    if why := on_device(*tensors):
        return why
    if x.dtype not in TYPES or any(tensor.dtype != x.dtype for tensor in tensors):
        return f"the tensors are not of one type of {TYPES}"
    if x.dim() != 4 or weight.dim() != 4 or x.numel() == 0 or weight.numel() == 0:
        return "x or weight is empty, or not [N, C, H, W] and [K, C, h, w]"
    if weight.shape[1] != x.shape[1] or weight.shape[2] != weight.shape[3]:
        return "weight is not [K, C, k, k] for the channels of x"
    if stride < 1 or padding < 0 or min(x.shape[2:]) + 2 * padding < weight.shape[2]:
        return "the kernel does not fit into the padded map"
    images = (x, weight) if residual is None else (x, weight, residual)
    if not all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in images):
        return "x, weight or residual is not in channels-last memory"
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        return "bias is not contiguous [K]"
    if residual is not None and residual.shape != _size(x, weight, stride, padding):
        return "residual has not the shape of the result"
    if records(*tensors):
        return "autograd records the call"
    unknown = "no measurement on this device says that it beats cuDNN at this shape"
    return beaten("conv2d", x.device, shape_of(x, weight, stride, padding), unknown)


def _size(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[int, ...]:
    height, width = ((size + 2 * padding - weight.shape[2]) // stride + 1 for size in x.shape[2:])
    return x.shape[0], weight.shape[0], height, width


conv2d.register("triton", _refuses)(
    implement(
        "triton_conv2d(Tensor x, Tensor weight, Tensor? bias=None, int stride=1, int padding=0,"
        " Tensor? residual=None) -> Tensor",
        _run,
        _shape,
    )
)
