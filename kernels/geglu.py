"""geglu in one launch: both halves of the product in registers, the gate applied before anything is written.

A linear layer and a gate of their own write 2K columns, read them again and write K; here K are written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastldm.kernels.launch import INTERPRETED, TYPES, device_of, implement, kernel, on_device
from fastldm.kernels.tuned import beaten, choose
from fastldm.ops.linear import geglu
from fastldm.ops.raw import records


@dataclass(frozen=True)
class Tiles:
    """A program's share: rows × columns of the result, `depth` channels at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    tma: bool = False  # tiles are fetched by tensor maps, from compute capability 9.0 on


LARGE = Tiles(rows=128, columns=64, depth=64, warps=8, stages=3)
SMALL = Tiles(rows=64, columns=32, depth=64, warps=4, stages=3)  # few rows: more programs
WIDE_TYPE = Tiles(rows=64, columns=32, depth=32, warps=8, stages=2)  # float32
GROUP = 8  # tiles of rows that share columns of the weight while they are in the cache


@kernel("rows")
def geglu_kernel(
    x,
    weight,
    bias,
    result,
    rows,
    width,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    TMA: tl.constexpr,
):
    """result [rows, width] = h · gelu(g), [h, g] = x weightᵀ + bias; x [rows, channels], weight [2 width,
    channels], all contiguous. WHOLE: the channels are a multiple of DEPTH. TMA: x and weight are tensor
    descriptors of tiles [ROWS, DEPTH] and [COLUMNS, DEPTH], with zeros around the matrices.
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

    hidden = tl.zeros((ROWS, COLUMNS), tl.float32)
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    if TMA:
        top, left_edge = (first + within % height) * ROWS, within // height * COLUMNS
        for done in range(0, channels, DEPTH):
            left = x.load([top, done])
            hidden = tl.dot(left, weight.load([left_edge, done]).T, hidden, input_precision="ieee")
            gate = tl.dot(left, weight.load([width + left_edge, done]).T, gate, input_precision="ieee")
    else:
        at_x = x + row.to(tl.int64)[:, None] * channels + depth[None, :]
        at_hidden = weight + column.to(tl.int64)[None, :] * channels + depth[:, None]
        at_gate = at_hidden + tl.full((), width, tl.int64) * channels  # a width of 1 is a constant
        for done in range(0, channels, DEPTH):
            if WHOLE:
                left = tl.load(at_x, mask=row_inside[:, None], other=0.0)
                first_half = tl.load(at_hidden, mask=column_inside[None, :], other=0.0)
                second_half = tl.load(at_gate, mask=column_inside[None, :], other=0.0)
            else:
                inside = depth < channels - done
                left = tl.load(at_x, mask=row_inside[:, None] & inside[None, :], other=0.0)
                first_half = tl.load(at_hidden, mask=column_inside[None, :] & inside[:, None], other=0.0)
                second_half = tl.load(at_gate, mask=column_inside[None, :] & inside[:, None], other=0.0)
            hidden = tl.dot(left, first_half, hidden, input_precision="ieee")
            gate = tl.dot(left, second_half, gate, input_precision="ieee")
            at_x += DEPTH
            at_hidden += DEPTH
            at_gate += DEPTH

    hidden += tl.load(bias + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    gate += tl.load(bias + width + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    value = hidden * gate * 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    to = result + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(to, value.to(result.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


def tiles(dtype: torch.dtype, rows: int) -> Tiles:
    """How a call is divided."""
    if dtype == torch.float32:
        return WIDE_TYPE
    return LARGE if rows >= 1024 else SMALL


def shape_of(x: Tensor, weight: Tensor) -> tuple[object, ...]:
    """What a call's line in the table of measurements goes by."""
    return x.dtype, x.numel() // x.shape[-1], *weight.shape


def _run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    result = _shape(x, weight, bias)
    launch(x, weight, bias, result)
    return result


def launch(x: Tensor, weight: Tensor, bias: Tensor, result: Tensor) -> None:
    """Fill the result."""
    channels, width = x.shape[-1], result.shape[-1]
    rows = x.numel() // channels
    share = choose("geglu", x.device, shape_of(x, weight), tiles(x.dtype, rows))
    grid = (triton.cdiv(rows, share.rows) * triton.cdiv(width, share.columns),)
    tma = share.tma and not INTERPRETED and channels % 8 == 0 and (x.data_ptr() | weight.data_ptr()) % 16 == 0
    with device_of(x):
        geglu_kernel[grid](
            tiled(x.view(rows, channels), share.rows, share.depth) if tma else x,
            tiled(weight, share.columns, share.depth) if tma else weight,
            bias,
            result,
            rows,
            width,
            channels,
            ROWS=share.rows,
            COLUMNS=share.columns,
            DEPTH=share.depth,
            GROUP=GROUP,
            WHOLE=channels % share.depth == 0,
            TMA=tma,
            num_warps=share.warps,
            num_stages=share.stages,
        )


def tiled(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A contiguous matrix, fetched in tiles."""
    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def _shape(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


def _refuses(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if why := on_device(x, weight, bias):
        return why
    if x.dtype not in TYPES or weight.dtype != x.dtype or bias.dtype != x.dtype:
        return f"x, weight and bias are not of one type of {TYPES}"
    if x.dim() < 1 or x.numel() == 0 or weight.dim() != 2 or weight.shape[0] % 2 or weight.numel() == 0:
        return "x is empty, or weight is not [2K, C]"
    if weight.shape[1] != x.shape[-1] or bias.shape != weight.shape[:1]:
        return "x, weight and bias do not fit together"
    if not (x.is_contiguous() and weight.is_contiguous() and bias.is_contiguous()):
        return "x, weight or bias is not contiguous"
    if records(x, weight, bias):
        return "autograd records the call"
    return beaten("geglu", x.device, shape_of(x, weight))


geglu.register("triton", _refuses)(
    implement("triton_geglu(Tensor x, Tensor weight, Tensor bias) -> Tensor", _run, _shape)
)
