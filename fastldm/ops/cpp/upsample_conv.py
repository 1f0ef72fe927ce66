"""upsample_conv on the CPU: four 2×2 convolutions of the map itself in place of one 3×3 of its enlargement.

The enlargement shows every pixel twice. An output pixel in an even row sees the rows (i − 1, i, i) of the
map, one in an odd row (i, i, i + 1), so two of three weights add up, and likewise in columns: 16 products an
input pixel and pair of channels in place of 36.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.ops.cpp import extension, onednn, panels
from fastldm.ops.cpp.extension import _C, TAGS, TYPES, direct, library
from fastldm.ops.cpp.packed import packed, unpackable
from fastldm.ops.raw import records
from fastldm.ops.resample import upsample_conv

STRIP = 8 << 20  # bytes of the four maps, for each thread, before they are woven: small beside the result

library.define("cpp_upsample_conv(Tensor x, Tensor weight, Tensor bias) -> Tensor", tags=TAGS)


def phase_weights(weight: Tensor) -> list[Tensor]:
    """[K, C, 3, 3] → the [K, C, 2, 2] of the outputs (even, even), (even, odd), (odd, even), (odd, odd).

    Summed in float64 and rounded once to the weight's dtype.
    """

    def phases(w: Tensor, axis: int) -> list[Tensor]:
        first, second, third = w.unbind(axis)
        return [torch.stack((first, second + third), axis), torch.stack((first + second, third), axis)]

    both = [part for rows in phases(weight.detach().double(), 2) for part in phases(rows, 3)]
    return [part.to(weight.dtype, memory_format=torch.channels_last) for part in both]


def _prepare(weight: Tensor, window: torch.Size) -> list[Tensor]:
    """The phase weights, packed where oneDNN takes the dtype; `window` is the shape that they see."""
    phases = phase_weights(weight)
    if onednn.missing(weight.dtype):
        return phases
    return [onednn.pack_convolution(phase, 1, 0, window) for phase in phases]


def _panels(weight: Tensor) -> list[Tensor]:
    return [panels.pack(phase) for phase in phase_weights(weight)]


@torch.library.impl(library, "cpp_upsample_conv", "CPU")
def _run_upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows, channels, height, width = x.shape
    if panels.fits(weight, rows * height * width):
        return panels.enlarge(x, packed(weight, _panels), bias, weight.shape[0])
    phases = packed(weight, _prepare, (rows, channels, height + 1, width + 1))
    convolve = F.conv2d if onednn.missing(x.dtype) else onednn.convolve
    result = _shape_upsample_conv(x, weight)
    line = width * weight.shape[0] * x.element_size()  # bytes of a line of one phase
    lines = max(1, STRIP * torch.get_num_threads() // (4 * rows * line))
    for top in range(0, height, lines):
        bottom = min(top + lines, height)
        maps = [
            convolve(window, phase, bias, 1, 0).contiguous(memory_format=torch.channels_last)
            for window, phase in zip(_windows(x, top, bottom), phases, strict=True)
        ]
        for row in range(rows):
            _C.interleave(
                extension.ISA,
                result[row, :, 2 * top].data_ptr(),
                [each[row].data_ptr() for each in maps],
                bottom - top,
                width,
                line // width,
                torch.get_num_threads(),
            )
    return result


def _windows(x: Tensor, top: int, bottom: int) -> Iterator[Tensor]:
    """What the phases see of x where they make the lines from top to bottom, zeros around it."""
    for down in (0, 1):
        first, last = top - 1 + down, bottom + down
        lines = x[:, :, max(first, 0) : last]
        for right in (0, 1):
            yield F.pad(lines, (1 - right, right, int(first < 0), int(last > x.shape[2])))


@torch.library.impl(library, "cpp_upsample_conv", "Meta")
def _shape_upsample_conv(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    shape = x.shape[0], weight.shape[0], 2 * x.shape[2], 2 * x.shape[3]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _refuses_upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if not (x.is_cpu and weight.is_cpu and bias.is_cpu):
        return "a tensor is not on the CPU"
    if x.dtype not in TYPES or weight.dtype != x.dtype or bias.dtype != x.dtype:
        return "x, weight and bias are not all float32 or all bfloat16"
    if x.dim() != 4 or x.numel() == 0 or not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not [N, C, H, W] in channels-last memory"
    if x.is_contiguous():
        return "x has one channel or one pixel, which leaves the layout of the result open"
    if weight.dim() != 4 or weight.shape[0] == 0 or weight.shape[1:] != (x.shape[1], 3, 3):
        return "weight is not [K, C, 3, 3]"
    if bias.shape != weight.shape[:1] or not bias.is_contiguous():
        return "bias is not a dense [K]"
    if records(x, weight, bias):
        return "autograd records the call"
    return unpackable(weight)


upsample_conv.register("cpp", _refuses_upsample_conv)(
    direct(_run_upsample_conv, torch.ops.fastldm.cpp_upsample_conv.default)
)
