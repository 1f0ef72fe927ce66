"""Calls of every op at the models' shapes, on PyTorch's default device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.compare import Result

Shape = tuple[int, ...]
# From float64. PyTorch's own group norm is 3e-5 off on the largest map; bfloat16: one unit in the last place.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2**-7}


@dataclass(frozen=True)
class Call:
    """Arguments of an op, the bytes that it has to read and write, and the arguments that it changes.

    operations: those of the reference, 2 a multiply-add, where they and not memory bound the op.
    """

    arguments: tuple[Any, ...]
    moved: int
    changed: tuple[Tensor, ...] = ()
    operations: int = 0

    def of(self, function: Callable[..., Tensor | None]) -> Callable[[], Result]:
        """The call of this implementation, giving what it returns or changes."""

        def run() -> Result:
            returned = function(*self.arguments)
            return self.changed if returned is None else returned

        return run

    def in_float64(self) -> Call:
        """The same values in double precision."""
        tensors = [each for each in self.arguments if isinstance(each, Tensor) and each.is_floating_point()]
        wide = {id(tensor): tensor.double() for tensor in tensors}
        arguments = tuple(wide.get(id(each), each) for each in self.arguments)
        return Call(arguments, self.moved, tuple(wide[id(tensor)] for tensor in self.changed))


def image(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype, memory_format=torch.channels_last)


def copy(moved: int) -> Callable[[], None]:
    """What memory allows: as many bytes, half read and half written."""
    source, target = torch.ones(2, moved // 8)

    def run() -> None:
        target.copy_(source)

    return run


def product(operations: int, dtype: torch.dtype) -> Callable[[], None]:
    """What the processor allows: as many operations in a product of matrices of this dtype."""
    side = round((operations / 2) ** (1 / 3))
    left, right, result = torch.randn(3, side, side).to(dtype)

    def run() -> None:
        torch.matmul(left, right, out=result)

    return run


def attention(dtype: torch.dtype, rows: int, heads: int, queries: int, keys: int, head_dim: int) -> Call:
    def tokens(count: int) -> Tensor:
        return torch.randn(rows, count, heads * head_dim).to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2)

    q, k, v = tokens(queries), tokens(keys), tokens(keys)
    return Call((q, k, v), 2 * (q.nbytes + k.nbytes), operations=4 * q.numel() * keys)


def group_norm_silu(dtype: torch.dtype, rows: int, channels: int, side: int) -> Call:
    x, (weight, bias) = image(dtype, rows, channels, side, side), torch.randn(2, channels).to(dtype)
    return Call((x, weight, bias, 32), 2 * x.nbytes)


def channel_moments(dtype: torch.dtype, rows: int, channels: int, side: int) -> Call:
    x = image(dtype, rows, channels, side, side)
    return Call((x,), x.nbytes)


def guided_step(dtype: torch.dtype, slots: int, channels: int, side: int) -> Call:
    latents, x0, noise = (image(torch.float32, slots, channels, side, side) for _ in range(3))
    model_input, out = (image(dtype, 2 * slots, channels, side, side) for _ in range(2))
    table = torch.full((1, 1, 9), 0.5)  # halves x, so that call after call stays small
    arguments = (latents, x0, model_input, out, noise, table, torch.zeros(slots, dtype=torch.long))
    return Call(arguments, 5 * latents.nbytes + 2 * out.nbytes, (latents, x0, model_input))


def geglu(dtype: torch.dtype, rows: int, tokens: int, width: int) -> Call:
    """Nearly all of it is the product; for the rest alone see `test_geglu_gate`."""
    x, bias = torch.randn(rows, tokens, width).to(dtype), torch.randn(8 * width).to(dtype)
    with torch.inference_mode(False):
        weight = (torch.randn(8 * width, width) / width**0.5).to(dtype)
    moved = 5 * x.nbytes + weight.nbytes
    return Call((x, weight, bias), moved, operations=2 * x.numel() * 8 * width)


def linear(dtype: torch.dtype, rows: int, width: int, outputs: int) -> Call:
    x, bias, residual = torch.randn(rows, width), torch.randn(outputs), torch.randn(rows, outputs)
    with torch.inference_mode(False):
        weight = (torch.randn(outputs, width) / width**0.5).to(dtype)
    moved = (x.numel() + weight.numel() + 2 * residual.numel()) * dtype.itemsize
    arguments = (x.to(dtype), weight, bias.to(dtype), residual.to(dtype))
    return Call(arguments, moved, operations=2 * x.numel() * outputs)


def layer_norm(dtype: torch.dtype, rows: int, tokens: int, width: int) -> Call:
    x, (weight, bias) = torch.randn(rows, tokens, width).to(dtype), torch.randn(2, width).to(dtype)
    return Call((x, weight, bias), 2 * x.nbytes)


def upsample_conv(dtype: torch.dtype, rows: int, channels: int, side: int) -> Call:
    x = image(dtype, rows, channels, side, side)
    bound = (1 / (9 * channels)) ** 0.5
    with torch.inference_mode(
        False
    ):  # as a model's: changes of a weight made in inference mode are not counted
        weight, bias = image(dtype, channels, channels, 3, 3) * bound, torch.randn(channels).to(dtype)
    moved, products = 5 * x.nbytes + weight.nbytes, 4 * x.numel() * weight[0].numel()
    return Call((x, weight, bias), moved, operations=2 * products)


def conv2d(dtype: torch.dtype, rows: int, channels: int, side: int) -> Call:
    x, residual = image(dtype, 2 * rows, channels, side, side).chunk(2)
    bound = (1 / (9 * channels)) ** 0.5
    with torch.inference_mode(False):
        weight, bias = image(dtype, channels, channels, 3, 3) * bound, torch.randn(channels).to(dtype)
    moved, products = 3 * x.nbytes + weight.nbytes, x.numel() * weight[0].numel()
    return Call((x, weight, bias, 1, 1, residual), moved, operations=2 * products)


# Rows, channels and side; --quick takes the first.
UNET = [(2, 1280, 8), (2, 320, 64), (2, 960, 64), (2, 640, 32), (2, 1280, 16)]  # SD1.5, a guided step
VAE = [(1, 512, 64), (1, 512, 128), (1, 256, 256), (1, 128, 512)]  # its decoder, 512 pixels
TOKENS = [(2, 256, 1280), (2, 1024, 640), (2, 4096, 320), (2, 256, 80)]  # SD1.5; the shipped model
ATTENTION = [  # rows, heads, queries, keys, head dim: the shipped model, SD1.5, SD2.1, a decoder's middle
    *[(2, 2, 64, keys, 40) for keys in (32, 64)],
    *[(2, 8, 4096, keys, 40) for keys in (4096, 77)],
    *[(2, 8, 1024, keys, 80) for keys in (1024, 77)],
    *[(2, 8, 256, keys, 160) for keys in (256, 77)],
    *[(2, 10, 1024, keys, 64) for keys in (1024, 77)],
    (1, 1, 4096, 4096, 512),
]
LINEAR = [  # rows, width, outputs: the shipped model, SD1.5, the middle of its decoder
    *[(128, 80, 80), (64, 96, 80)],
    *[(8192, 320, 320), (8192, 1280, 320), (2048, 640, 640), (2048, 2560, 640)],
    *[(512, 1280, 1280), (512, 5120, 1280), (154, 768, 1280), (2, 1280, 1280)],
    (4096, 512, 512),
]
SHAPES: dict[str, tuple[Callable[..., Call], list[Shape]]] = {
    "attention": (attention, ATTENTION),
    "channel_moments": (channel_moments, UNET + VAE),
    "group_norm_silu": (group_norm_silu, UNET + VAE),
    "guided_step": (guided_step, [(1, 4, 64), (8, 4, 64), (1, 16, 128)]),
    "conv2d": (conv2d, [(2, 128, 8), (2, 1280, 8), (2, 1280, 16), (2, 640, 32), (2, 320, 64)]),
    "geglu": (geglu, TOKENS),
    "layer_norm": (layer_norm, TOKENS),
    "linear": (linear, LINEAR),
    "upsample_conv": (
        upsample_conv,
        [(2, 1280, 8), (2, 1280, 16), (2, 640, 32), (1, 512, 64), (1, 512, 128), (1, 256, 256)],
    ),
}
