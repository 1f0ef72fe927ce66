"""What `fastldm tune` may try: for each kernel the sizes to begin from and their limits, and its rivals.

From the best of the sizes so far one field at a time is halved and doubled, or turned on and off, until that
gains no more; so fields that a kernel gets later are tried without a word here, if they are on or off.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastldm import ops
from fastldm.kernels import attention, conv2d, geglu, group_norm_silu, guided_step, layer_norm
from fastldm.kernels.measuring import Run

SERVES = "PyTorch"  # the rival that serves the call where the kernel does not


@dataclass(frozen=True)
class Kernel:
    """shape, sizes: of a call's arguments, its line in the table and the sizes to begin from, the kernel's
    own first. limits: of each size that is varied.
    """

    shape: Callable[..., tuple[object, ...]]
    sizes: Callable[..., list[Any]]
    limits: dict[str, tuple[int, int]]


def _attention(q: Any, k: Any, v: Any, key_lengths: Any = None, causal: bool = False) -> list[Any]:
    default, blocks = attention.blocks(q.shape[3], k.shape[2], causal), attention.Blocks
    if q.shape[3] == attention.WIDE:
        return [default, blocks(64, 64, 8, 1), blocks(128, 32, 8, 1)]
    return [default, blocks(128, 64, 8, 3), blocks(128, 128, 8, 2), blocks(64, 64, 4, 3)]


def _group_norm_silu(x: Any, weight: Any, bias: Any, groups: int, *_: Any) -> list[Any]:
    rows, channels, height, width = x.shape
    default, blocks = group_norm_silu.blocks(rows, height * width, channels, groups), group_norm_silu.Blocks
    if default.tiles:
        return [default, replace(default, tiles=1)]
    together = max(1, min(groups, 128 // (channels // groups)))
    return [default, blocks(together, 32, 1, 4)]


def _conv2d(x: Any, *_: Any) -> list[Any]:
    tiles = conv2d.Tiles
    if x.dtype == torch.float32:
        return [tiles(64, 64, 32, 1, 4, 2), tiles(64, 64, 32, 8, 4, 2)]
    return [
        conv2d.TILES,
        tiles(128, 64, 64, 1, 4, 4),
        tiles(64, 64, 64, 8, 4, 4),
        tiles(128, 128, 64, 4, 8, 3),
    ]


def _geglu(x: Any, *_: Any) -> list[Any]:
    return [geglu.tiles(x.dtype, x.numel() // x.shape[-1]), geglu.LARGE, geglu.SMALL]


PRODUCT = {"rows": (16, 256), "columns": (16, 256), "depth": (16, 128), "warps": (4, 8), "stages": (1, 8)}
KERNELS = {
    "attention": Kernel(
        attention.shape_of,
        _attention,
        {"queries": (16, 256), "keys": (16, 256), "warps": (2, 8), "stages": (1, 4)},
    ),
    "conv2d": Kernel(
        lambda x, weight, bias, stride, padding, residual: conv2d.shape_of(x, weight, stride, padding),
        _conv2d,
        PRODUCT | {"splits": (1, 32)},
    ),
    "geglu": Kernel(lambda x, weight, bias: geglu.shape_of(x, weight), _geglu, PRODUCT),
    "group_norm_silu": Kernel(
        lambda x, weight, bias, groups, *_: group_norm_silu.shape_of(x, groups),
        _group_norm_silu,
        {"groups": (1, 32), "pixels": (1, 1024), "tiles": (1, 64), "warps": (1, 16)},
    ),
    "guided_step": Kernel(
        lambda latents, x0, model_input, out, *_: guided_step.shape_of(latents, out),
        lambda *_: [guided_step.BLOCKS],
        {"elements": (128, 4096), "warps": (1, 8)},
    ),
    "layer_norm": Kernel(
        lambda x, *_: layer_norm.shape_of(x),
        lambda x, *_: [layer_norm.blocks(x.shape[-1])],
        {"rows": (1, 16), "warps": (1, 16)},
    ),
}


def neighbours(sizes: Any, limits: dict[str, tuple[int, int]]) -> Iterator[Any]:
    """These sizes with one field halved, doubled or turned over, within the limits."""
    for field in fields(sizes):
        value = getattr(sizes, field.name)
        if isinstance(value, bool):
            yield replace(sizes, **{field.name: not value})
        elif field.name in limits and value:  # 0 tiles: a group norm in one pass, whose pixels are given
            low, high = limits[field.name]
            around = (value - 1, value + 1) if field.name == "stages" else (value // 2, 2 * value)
            if field.name == "pixels" and not getattr(sizes, "tiles", 1):
                continue
            yield from (replace(sizes, **{field.name: each}) for each in around if low <= each <= high)


def rivals(op: str, arguments: tuple[Any, ...]) -> dict[str, Run]:
    """What PyTorch has for the call, those that can take it: the reference as torch runs it, and beside it
    every backend of its attention, or cuDNN after its own search.
    """
    reference = ops.OPS[op].reference

    def within(setting: Callable[[], contextlib.AbstractContextManager[Any]]) -> Run:
        def run() -> object:
            with setting():
                return reference(*arguments)

        return run

    found = {SERVES: within(contextlib.nullcontext)}
    if op == "attention":
        for backend in (
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
        ):
            name = "SDPA " + backend.name.lower().removesuffix("_attention")
            found[name] = within(lambda backend=backend: sdpa_kernel(backend))  # type: ignore[misc]
    if op in ("conv2d", "upsample_conv"):
        found["cuDNN benchmark"] = within(lambda: torch.backends.cudnn.flags(enabled=True, benchmark=True))
    return {name: run for name, run in found.items() if name == SERVES or _runs(run)}


def _runs(run: Run) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells at length why a backend cannot take a call
        try:
            run()
        except RuntimeError:
            return False
    return True
