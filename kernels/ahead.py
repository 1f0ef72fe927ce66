"""The kernels that fastldm ships, compiled before they are needed: `fastldm tune --compile-only`.

They are those of the networks in NETWORKS, with the sizes that stand beside each kernel. What another model,
map or measurement needs is compiled at its first use, and kept too.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from fastldm.kernels import attention, cubins, geglu, group_norm_silu, guided_step, layer_norm
from fastldm.kernels.cubins import Variant
from fastldm.kernels.launch import recording

__all__ = ["NETWORKS", "Network", "compile_all", "variants"]

Report = Callable[[str], None]
DTYPES = (torch.bfloat16, torch.float16)
MOST_PROCESSES = 16  # each of them imports torch


@dataclass(frozen=True)
class Network:
    """What the kernels see of a latent diffusion model, level by level from the largest map to the smallest.

    side, channels: of the latents. widths, head_dims: of the UNet. decoder: widths of the autoencoder, whose
    attention has one head. text: width and head dim of the text encoder. tokens: of a short prompt.
    """

    side: int
    channels: int
    widths: tuple[int, ...]
    head_dims: tuple[int, ...]  # 0: no transformers on this level
    groups: int
    decoder: tuple[int, ...]
    text: tuple[int, int]
    tokens: int


def _stable(side: int, head_dims: tuple[int, ...], text: tuple[int, int]) -> Network:
    return Network(side, 4, (320, 640, 1280, 1280), head_dims, 32, (128, 256, 512, 512), text, 77)


NETWORKS = {
    "sd15": _stable(64, (40, 80, 160, 160), (768, 64)),
    "sd21": _stable(96, (64, 64, 64, 64), (1024, 64)),
    "sd21-base": _stable(64, (64, 64, 64, 64), (1024, 64)),
    "default": Network(16, 8, (48, 96, 160), (0, 32, 32), 8, (16, 32, 64, 112), (128, 32), 32),
}


def compile_all(capabilities: Sequence[int], report: Report) -> int:
    """Compile every shipped kernel for GPUs of these compute capabilities, 90 for 9.0, in parallel and
    without a GPU; how many of them the cache now has.
    """
    wanted = [(variant, capability) for capability in capabilities for variant in sorted(variants(), key=str)]
    missing = [each for each in wanted if cubins.read(*each) is None]
    report(f"{len(wanted)} kernels, {len(wanted) - len(missing)} of them compiled before")
    done = len(wanted) - len(missing)
    # Triton keeps its own cache of every stage; here the last one is enough.
    with tempfile.TemporaryDirectory() as folder:
        pool = ProcessPoolExecutor(
            max(1, min(len(missing), len(os.sched_getaffinity(0)), MOST_PROCESSES)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_keep_stages_in,
            initargs=(folder,),
        )
        with pool:
            running = {pool.submit(_compile, *each): each for each in missing}
            for future in as_completed(running):
                variant, capability = running[future]
                future.result()
                done += 1
                report(f"{done}/{len(wanted)} sm_{capability} {variant.kernel.__name__} {_told(variant)}")
    return done


def _keep_stages_in(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


def _compile(variant: Variant, capability: int) -> None:
    made = cubins.make(variant, capability)
    assert made is not None  # of the kernels here
    cubins.store(variant, capability, made)


def _told(variant: Variant) -> str:
    names = variant.kernel.arg_names
    return " ".join(f"{names[index]}={value}" for index, value in variant.constants)


def variants() -> set[Variant]:
    """All that the networks launch."""
    with recording() as launches:
        for dtype in DTYPES:
            for network in NETWORKS.values():
                _unet(network, dtype)
                _autoencoder(network, dtype)
                _text(network, dtype)
                _step(network, dtype)
    return {launch.variant for launch in launches}


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def _norm(
    dtype: torch.dtype,
    rows: int,
    channels: int,
    side: int,
    groups: int,
    silu: bool = True,
    biased: bool = False,
) -> None:
    affine, row_bias = _empty(channels, dtype=dtype), _empty(rows, channels, dtype=dtype) if biased else None
    x = _empty(rows, channels, side, side, dtype=dtype)
    group_norm_silu._run(x, affine, affine, groups, 1e-5, silu, row_bias)


def _attend(
    dtype: torch.dtype,
    heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    lengths: bool = False,
    causal: bool = False,
) -> None:
    q, k = (
        _empty(2, n, heads * head_dim, dtype=dtype).unflatten(2, (heads, -1)).transpose(1, 2)
        for n in (queries, keys)
    )
    attention._run(q, k, k, _empty(2, dtype=torch.int64) if lengths else None, causal)


def _unet(net: Network, dtype: torch.dtype) -> None:
    """On the way down a level begins with the width above it; on the way up, with that below it or its own
    beside what was kept on the way down.
    """
    for level, width in enumerate(net.widths):
        side = net.side >> level
        above, below = net.widths[max(level - 1, 0)], net.widths[min(level + 1, len(net.widths) - 1)]
        for channels in {above, width, width + above, 2 * width, below + width}:
            _norm(dtype, 2, channels, side, net.groups)
        _norm(dtype, 2, width, side, net.groups, biased=True)
        head_dim = net.head_dims[level]
        if not head_dim:
            continue
        _norm(dtype, 2, width, side, net.groups, silu=False)
        tokens, heads = side * side, width // head_dim
        _attend(dtype, heads, tokens, tokens, head_dim)
        for keys, lengths in product((net.tokens, 2 * net.tokens), (False, True)):
            _attend(dtype, heads, tokens, keys, head_dim, lengths)
        affine = _empty(width, dtype=dtype)
        layer_norm._run(_empty(2, tokens, width, dtype=dtype), affine, affine)
        gate = _empty(8 * width, width, dtype=dtype), _empty(8 * width, dtype=dtype)
        geglu._run(_empty(2, tokens, width, dtype=dtype), *gate)


def _autoencoder(net: Network, dtype: torch.dtype) -> None:
    """Encoder and decoder: every width on maps of its own size and the next ones."""
    last, widest = len(net.decoder) - 1, net.decoder[-1]
    for level, width in enumerate(net.decoder):
        for nearby in range(max(level - 1, 0), min(level + 1, last) + 1):
            _norm(dtype, 1, width, net.side << (last - nearby), net.groups)
    _norm(dtype, 1, widest, net.side, net.groups, silu=False)
    _attend(dtype, 1, net.side**2, net.side**2, widest)


def _text(net: Network, dtype: torch.dtype) -> None:
    width, head_dim = net.text
    affine = _empty(width, dtype=dtype)
    layer_norm._run(_empty(1, net.tokens, width, dtype=dtype), affine, affine)
    _attend(dtype, width // head_dim, net.tokens, net.tokens, head_dim, causal=True)


def _step(net: Network, dtype: torch.dtype) -> None:
    """Of one slot or several, guided or not, by a model that keeps the memory layout or does not."""
    side, channels = net.side, net.channels
    for slots, halves, turned in product((1, 2), (1, 2), (False, True)):
        latents = _empty(slots, channels, side, side, dtype=torch.float32)
        images = _empty(slots, channels, side, side, dtype=dtype)
        out = _empty(halves * slots, channels, side, side, dtype=dtype)
        # A window of 32 steps and the identity row: fastldm.runtime.slots.
        table, step = _empty(slots, 33, 9, dtype=torch.float32), _empty(slots, dtype=torch.int64)
        out = out if turned else out.contiguous()
        guided_step._run(latents, latents, images, out, latents, table, step)
