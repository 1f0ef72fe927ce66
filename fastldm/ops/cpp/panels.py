"""float32 convolutions and products on weights packed in panels, by csrc/cpu/convolve.cpp.

For few pixels or rows and weights that stay in cache: there PyTorch's own take as long to get going.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.ops.cpp import extension
from fastldm.ops.cpp.extension import _C

PANEL = 32  # Convolve::PANEL
MOST = 512  # pixels or rows of the result
MOST_WEIGHTS = 1 << 20
SETS = ("avx2", "avx512", "avx512_bf16")  # the plain kernel takes twice PyTorch's time


def fits(weight: Tensor, pixels: int) -> bool:
    """Whether such a call is made here."""
    if weight.dtype != torch.float32 or extension.ISA not in SETS:
        return False
    return pixels <= MOST and weight.numel() <= MOST_WEIGHTS


def pack(weight: Tensor) -> Tensor:
    """[K, C] or [K, C, h, w] → [panels, h·w·C, PANEL], zeros beyond the last output."""
    weight = weight if weight.dim() == 4 else weight[:, :, None, None]
    (outputs, channels, height, width), (output, channel, line, column) = weight.shape, weight.stride()
    packed = weight.new_empty(-(-outputs // PANEL), height * width * channels, PANEL)
    _C.pack_panels(
        packed.data_ptr(),
        weight.data_ptr(),
        outputs,
        channels,
        (height, width),
        (output, channel, line, column),
        torch.get_num_threads(),
    )
    return packed


def multiply(x: Tensor, weight: Tensor, pack: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """F.linear(x, weight, bias) + residual, all dense."""
    outputs, width = weight.shape
    result = x.new_empty((*x.shape[:-1], outputs))
    rows = x.numel() // width
    _C.convolve(
        extension.ISA,
        (result.data_ptr(), 0, 0, outputs),
        x.data_ptr(),
        pack.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        1,
        (1, rows),
        width,
        outputs,
        (1, 1),
        1,
        (0, 0),
        (1, rows),
        torch.get_num_threads(),
    )
    return result


def convolve(
    x: Tensor,
    weight: Tensor,
    pack: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    residual: Tensor | None,
    size: tuple[int, int],
) -> Tensor:
    """F.conv2d(x, weight, bias, stride, padding) + residual, all channels-last; `size` of the result."""
    outputs, channels, *window = weight.shape
    maps, _, *sides = x.shape
    height, width = size
    result = _unwritten(x, maps, outputs, height, width)
    _C.convolve(
        extension.ISA,
        (result.data_ptr(), height * width * outputs, width * outputs, outputs),
        x.data_ptr(),
        pack.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        maps,
        sides,
        channels,
        outputs,
        window,
        stride,
        (padding, padding),
        size,
        torch.get_num_threads(),
    )
    return result


def _unwritten(x: Tensor, *shape: int) -> Tensor:
    """Channels-last memory of x's type, whatever the process's default is."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def enlarge(x: Tensor, packs: list[Tensor], bias: Tensor, outputs: int) -> Tensor:
    """upsample_conv from the packs of its four phases: each writes a quarter of the pixels."""
    maps, channels, height, width = x.shape
    result = _unwritten(x, maps, outputs, 2 * height, 2 * width)
    address, pixel = result.data_ptr(), outputs
    for phase, packed in enumerate(packs):
        down, right = divmod(phase, 2)
        _C.convolve(
            extension.ISA,
            (
                address + (down * 2 * width + right) * pixel * result.itemsize,
                4 * height * width * pixel,
                4 * width * pixel,
                2 * pixel,
            ),
            x.data_ptr(),
            packed.data_ptr(),
            bias.data_ptr(),
            0,
            maps,
            (height, width),
            channels,
            outputs,
            (2, 2),
            1,
            (1 - down, 1 - right),
            (height, width),
            torch.get_num_threads(),
        )
    return result
