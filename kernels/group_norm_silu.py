"""group_norm_silu on channels-last images, with float32 statistics.

One pass: a program holds all pixels of some groups in registers. Two passes, for larger maps: many programs
share the pixels of a row, each leaves the moments of its part, and the programs of the second launch merge
them. (Chan, Golub & LeVeque 1983, doi:10.1080/00031305.1983.10483115; Welford 1962,
doi:10.1080/00401706.1962.10490022)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastldm.kernels.launch import TYPES, device_of, implement, kernel, on_device
from fastldm.kernels.overlap import after_the_kernel_in_front
from fastldm.kernels.tuned import beaten, choose
from fastldm.ops.norm import group_norm_silu
from fastldm.ops.raw import records

MOST_CHANNELS = 2**16


@dataclass(frozen=True)
class Blocks:
    """A program takes whole `groups`, `pixels` at a time; `tiles` of them, or 0: one tile, in one pass."""

    groups: int
    pixels: int
    tiles: int
    warps: int
    pdl: bool = False  # kernels/overlap.py


def blocks(rows: int, pixels: int, channels: int, groups: int) -> Blocks:
    """One pass where a group fits into 16384 elements; else tiles of 8192, in 264 programs or one a tile."""
    width, side = channels // groups, triton.next_power_of_2(pixels)
    if side * triton.next_power_of_2(width) <= 16384:
        together = 1
        while together < groups and side * triton.next_power_of_2(2 * together * width) <= 2048:
            together *= 2
        elements = side * triton.next_power_of_2(together * width)
        return Blocks(together, side, 0, 2 if elements <= 2048 else 4 if elements <= 4096 else 8)
    together = max(1, min(groups, 128 // width))
    tile = max(1, 8192 // triton.next_power_of_2(together * width))
    count = triton.cdiv(pixels, tile) * rows * triton.cdiv(groups, together)
    return Blocks(together, tile, max(1, count // 264), 8)


def shape_of(x: Tensor, groups: int) -> tuple[object, ...]:
    """What a call's line in the table of measurements goes by."""
    return x.dtype, x.shape[0], x.shape[2] * x.shape[3], x.shape[1], groups


@triton.jit
def normalise(x, mean, scale, shift, SILU: tl.constexpr):
    """(x − mean) · scale + shift, and SiLU of that."""
    y = (x - mean[None, :]) * scale[None, :] + shift[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def to_groups(of_channels, member):
    """Sums over the channels of each group: [channels] → [groups]."""
    return tl.sum(tl.where(member, of_channels[:, None], 0.0), axis=0)


@triton.jit
def to_channels(of_groups, member):
    """What belongs to the group of each channel: [groups] → [channels]."""
    return tl.sum(tl.where(member, of_groups[None, :], 0.0), axis=1)


@kernel()
def one_pass_kernel(
    result,
    x,
    weight,
    bias,
    row_bias,
    row_bias_stride,
    pixels,
    channels,
    eps,
    CHANNELS_A_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr,
    BIASED: tl.constexpr,
    SILU: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (block of groups, row)."""
    after_the_kernel_in_front(PDL)
    row = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    channel = tl.program_id(0) * (GROUPS * CHANNELS_A_GROUP) + column
    known = (column < GROUPS * CHANNELS_A_GROUP) & (channel < channels)
    member = (column // CHANNELS_A_GROUP)[:, None] == tl.arange(0, GROUP_COLUMNS)[None, :]
    pixel = tl.arange(0, PIXELS)
    inside = (pixel < pixels)[:, None] & known[None, :]
    at = row * pixels * channels + pixel[:, None] * channels + channel[None, :]

    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        added = tl.load(row_bias + row * row_bias_stride + channel, mask=known, other=0.0).to(tl.float32)
        values = tl.where(inside, values + added[None, :], 0.0)
    count = 1.0 * pixels * CHANNELS_A_GROUP
    mean = to_channels(to_groups(tl.sum(values, axis=0), member) / count, member)
    apart = tl.where(inside, values - mean[None, :], 0.0)
    left = to_groups(tl.sum(apart, axis=0), member) / count  # what rounding kept out of the mean
    variance = to_groups(tl.sum(apart * apart, axis=0), member) / count - left * left
    scale = to_channels(tl.rsqrt(variance + eps), member)
    scale *= tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    y = normalise(apart, to_channels(left, member), scale, shift, SILU)
    tl.store(result + at, y.to(result.dtype.element_ty), mask=inside)


@kernel("pixels", "part")
def moments_kernel(
    moments,
    x,
    row_bias,
    row_bias_stride,
    pixels,
    channels,
    part,
    CHANNELS_A_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr,
    BIASED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (part, block of groups, row): mean and sum of squares about it, of the part's pixels.

    moments float32 [rows, 2, groups, parts]. Each place of a tile follows its own pixels by Welford's rule;
    then places, and then the channels of a group, are merged by Chan's.
    """
    after_the_kernel_in_front(PDL)
    parts = tl.num_programs(0)
    block, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    channel = block * (GROUPS * CHANNELS_A_GROUP) + column
    known = (column < GROUPS * CHANNELS_A_GROUP) & (channel < channels)
    place = tl.arange(0, PIXELS)
    added = tl.zeros((COLUMNS,), tl.float32)
    if BIASED:
        added += tl.load(row_bias + row * row_bias_stride + channel, mask=known, other=0.0).to(tl.float32)

    begin = tl.program_id(0) * part
    end = tl.minimum(begin + part, pixels)
    mean = tl.zeros((PIXELS, COLUMNS), tl.float32)
    squares = tl.zeros((PIXELS, COLUMNS), tl.float32)
    seen = 0.0
    for start in range(begin, end, PIXELS):
        seen += 1.0
        valid = (start + place < end)[:, None]
        at = x + (row * pixels + start) * channels + place[:, None] * channels + channel[None, :]
        values = tl.load(at, mask=valid & known[None, :], other=0.0).to(tl.float32) + added[None, :]
        apart = tl.where(valid, values - mean, 0.0)
        mean += apart * (1.0 / seen)
        squares += apart * tl.where(valid, values - mean, 0.0)

    # The last tile may have left some places out.
    size = (end - begin).to(tl.float32)
    counts = (end - begin - place + PIXELS - 1) // PIXELS
    counts = counts.to(tl.float32)[:, None]
    first = tl.sum(tl.where(place[:, None] == 0, mean, 0.0), axis=0)
    of_channel = first + tl.sum(tl.where(counts > 0, counts * (mean - first[None, :]), 0.0), axis=0) / size
    apart = mean - of_channel[None, :]
    squares = tl.sum(squares + tl.where(counts > 0, counts * apart * apart, 0.0), axis=0)

    group = tl.arange(0, GROUP_COLUMNS)
    member = (column // CHANNELS_A_GROUP)[:, None] == group[None, :]
    of_group = to_groups(of_channel, member) / CHANNELS_A_GROUP
    apart = of_channel - to_channels(of_group, member)
    squares = to_groups(squares + size * apart * apart, member)
    groups = channels // CHANNELS_A_GROUP
    ours = (group < GROUPS) & (block * GROUPS + group < groups)
    at = moments + ((row * 2 * groups + block * GROUPS + group) * parts + tl.program_id(0))
    tl.store(at, of_group, mask=ours)
    tl.store(at + groups * parts, squares, mask=ours)


@kernel("pixels", "part")
def apply_kernel(
    result,
    moments,
    x,
    weight,
    bias,
    row_bias,
    row_bias_stride,
    pixels,
    channels,
    part,
    eps,
    CHANNELS_A_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr,
    BIASED: tl.constexpr,
    SILU: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (part, block of groups, row): merge the moments of all parts, then normalise this part."""
    after_the_kernel_in_front(PDL)
    parts = tl.num_programs(0)
    block, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    groups = channels // CHANNELS_A_GROUP
    group = tl.arange(0, GROUP_COLUMNS)
    ours = ((group < GROUPS) & (block * GROUPS + group < groups))[None, :]
    means = moments + (row * 2 * groups + block * GROUPS + group) * parts
    first = tl.load(means, mask=(group < GROUPS) & (block * GROUPS + group < groups), other=0.0)

    some = tl.arange(0, 32)[:, None]
    total = tl.zeros((32, GROUP_COLUMNS), tl.float32)
    for start in range(0, parts, 32):
        size = tl.minimum(part, pixels - (start + some) * part).to(tl.float32)
        use = ours & (start + some < parts)
        mean = tl.load(means[None, :] + start + some, mask=use, other=0.0)
        total += tl.where(use, size * (mean - first[None, :]), 0.0)
    of_group = first + tl.sum(total, axis=0) / pixels
    total = tl.zeros((32, GROUP_COLUMNS), tl.float32)
    for start in range(0, parts, 32):
        size = tl.minimum(part, pixels - (start + some) * part).to(tl.float32) * CHANNELS_A_GROUP
        use = ours & (start + some < parts)
        apart = tl.load(means[None, :] + start + some, mask=use, other=0.0) - of_group[None, :]
        squares = tl.load(means[None, :] + groups * parts + start + some, mask=use, other=0.0)
        total += tl.where(use, squares + size * apart * apart, 0.0)
    count = 1.0 * pixels * CHANNELS_A_GROUP
    of_scale = tl.rsqrt(tl.sum(total, axis=0) / count + eps)

    column = tl.arange(0, COLUMNS)
    channel = block * (GROUPS * CHANNELS_A_GROUP) + column
    known = (column < GROUPS * CHANNELS_A_GROUP) & (channel < channels)
    member = (column // CHANNELS_A_GROUP)[:, None] == group[None, :]
    mean, scale = to_channels(of_group, member), to_channels(of_scale, member)
    if BIASED:
        mean -= tl.load(row_bias + row * row_bias_stride + channel, mask=known, other=0.0).to(tl.float32)
    scale *= tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)

    place = tl.arange(0, PIXELS)
    begin = tl.program_id(0) * part
    end = tl.minimum(begin + part, pixels)
    for start in range(begin, end, PIXELS):
        inside = (start + place < end)[:, None] & known[None, :]
        at = (row * pixels + start) * channels + place[:, None] * channels + channel[None, :]
        y = normalise(tl.load(x + at, mask=inside, other=0.0).to(tl.float32), mean, scale, shift, SILU)
        tl.store(result + at, y.to(result.dtype.element_ty), mask=inside)


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
    rows, channels, height, width = x.shape
    pixels, width = height * width, channels // groups
    default = blocks(rows, pixels, channels, groups)
    chosen = choose("group_norm_silu", x.device, shape_of(x, groups), default)
    result, over_groups = torch.empty_like(x), triton.cdiv(groups, chosen.groups)
    added, stride = (x, 0) if row_bias is None else (row_bias, row_bias.stride(0))
    options = {
        "CHANNELS_A_GROUP": width,
        "GROUPS": chosen.groups,
        "GROUP_COLUMNS": triton.next_power_of_2(chosen.groups),
        "COLUMNS": triton.next_power_of_2(chosen.groups * width),
        "PIXELS": chosen.pixels,
        "BIASED": row_bias is not None,
        "PDL": chosen.pdl,
        "num_warps": chosen.warps,
    }
    with device_of(x):
        if chosen.tiles == 0:
            one_pass_kernel[(over_groups, rows)](
                result, x, weight, bias, added, stride, pixels, channels, eps, SILU=silu, **options
            )
            return result
        part = chosen.tiles * chosen.pixels
        grid = triton.cdiv(pixels, part), over_groups, rows
        moments = torch.empty((rows, 2, groups, grid[0]), dtype=torch.float32, device=x.device)
        moments_kernel[grid](moments, x, added, stride, pixels, channels, part, **options)
        parameters = weight, bias, added, stride, pixels, channels, part, eps
        apply_kernel[grid](result, moments, x, *parameters, SILU=silu, **options)
    return result


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
    if moments is not None:
        return "the kernel takes its own moments"
    if why := on_device(x, weight, bias, row_bias):
        return why
    if x.dtype not in TYPES:
        return f"x is {x.dtype}, not one of {TYPES}"
    if x.dim() != 4 or x.numel() == 0 or not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not [N, C, H, W] in channels-last memory"
    rows, channels, height, width = x.shape
    if groups < 1 or channels % groups:
        return f"{channels} channels do not form {groups} groups"
    if rows > 65535 or channels > MOST_CHANNELS or channels > 2048 * groups or height * width >= 2**30:
        return "more than 65535 rows, 65536 channels, 2048 channels a group or 2^30 pixels"
    if weight.dtype not in TYPES or bias.dtype != weight.dtype:
        return f"weight and bias are not both of one type of {TYPES}"
    if weight.shape != (channels,) or bias.shape != (channels,):
        return "weight or bias is not [C]"
    if channels > 1 and (weight.stride(0) != 1 or bias.stride(0) != 1):
        return "weight or bias is not contiguous"
    if row_bias is not None:
        if row_bias.dtype not in TYPES:
            return f"row_bias is {row_bias.dtype}, not one of {TYPES}"
        if row_bias.shape != x.shape[:2] or (channels > 1 and row_bias.stride(1) != 1):
            return "row_bias is not [N, C] with neighbouring channels"
    if records(x, weight, bias, row_bias):
        return "autograd records the call"
    return beaten("group_norm_silu", x.device, shape_of(x, groups))


group_norm_silu.register("triton", _refuses)(
    implement(
        "triton_group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps=1e-5,"
        " bool silu=True, Tensor? row_bias=None, Tensor? moments=None) -> Tensor",
        _run,
        _shape,
    )
)
