"""The launches of the Triton kernels at the models' shapes, compiled ahead of time for GPUs not here.

A launch is recorded from the stand-in itself, on tensors without memory; it must compile for each
architecture without spilling (STACK is 0), within the shared memory of one program. `-rP` prints the figures.
"""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from fastldm.kernels import attention, conv2d, geglu, group_norm_silu, guided_step, layer_norm, tuned
from fastldm.kernels.launch import Launch, recording

# Bytes of shared memory that one program may have. (CUDA C++ programming guide, compute capabilities)
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def record(module: Any, *arguments: Any, function: str = "_run", **named: Any) -> list[Launch]:
    """The launches that the module's stand-in makes for these arguments."""
    with recording() as launches:
        getattr(module, function)(*arguments, **named)
    return launches


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, nhwc: bool = True) -> Tensor:
    layout = torch.channels_last if nhwc and len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def step(dtype: torch.dtype, slots: int, mixed: bool) -> list[Launch]:
    latents, x0, noise = (empty(slots, 4, 64, 64, dtype=torch.float32, nhwc=False) for _ in range(3))
    images = (empty(2 * slots, 4, 64, 64, dtype=dtype, nhwc=mixed) for _ in range(2))
    table, at = empty(slots, 26, 9, dtype=torch.float32), empty(slots, dtype=torch.int64)
    return record(guided_step, latents, x0, *images, noise, table, at)


def norm(dtype: torch.dtype, rows: int, channels: int, side: int, biased: bool = False) -> list[Launch]:
    x, row_bias = empty(rows, channels, side, side, dtype=dtype), empty(rows, channels, dtype=dtype)
    weight = bias = empty(channels, dtype=dtype)
    return record(group_norm_silu, x, weight, bias, 32, row_bias=row_bias if biased else None)


def heads(dtype: torch.dtype, head_dim: int, keys: int, queries: int = 4096, **named: Any) -> list[Launch]:
    """The queries, keys and values of two rows with 8 heads, each a part of what one projection made."""
    q = empty(2, queries, 3, 8, head_dim, dtype=dtype)[:, :, 0].transpose(1, 2)
    k, v = (empty(2, keys, 3, 8, head_dim, dtype=dtype)[:, :, i].transpose(1, 2) for i in (1, 2))
    return record(attention, q, k, v, **named)


def gated(dtype: torch.dtype, tokens: int, channels: int) -> list[Launch]:
    width = 4 * channels
    shapes = (2, tokens, channels), (2 * width, channels), (2 * width,)
    return record(geglu, *(empty(*shape, dtype=dtype) for shape in shapes))


def modulated(dtype: torch.dtype, channels: int) -> list[Launch]:
    x, affine = empty(2, 4096, channels, dtype=dtype), empty(channels, dtype=dtype)
    scale = shift = empty(2, channels, dtype=dtype)
    return record(layer_norm, x, affine, affine, 1e-5, scale, shift)


def convolution(dtype: torch.dtype, channels: int, side: int, tiles: conv2d.Tiles) -> list[Launch]:
    x, weight, bias = (
        empty(2, channels, side, side, dtype=dtype),
        empty(channels, channels, 3, 3, dtype=dtype),
        None,
    )
    return record(conv2d, tiles, x, weight, bias, 1, 1, x, x, function="launch")


# What a table of measurements may hold: a whole tile a program, and the depth split for the smallest maps.
TILES = [conv2d.Tiles(128, 128, 64, 1, 8, 3), conv2d.Tiles(64, 64, 64, 8, 4, 4)]
# Rows, channels and side of SD1.5's UNet in a guided step, and of the decoder at 512 pixels.
UNET = [(2, 1280, 8), (2, 1280, 16), (2, 640, 32), (2, 320, 64), (2, 960, 64)]
DECODER = [(1, 512, 64), (1, 512, 128), (1, 256, 256), (1, 128, 512)]
HALF = torch.bfloat16


def variants() -> Iterator[Any]:
    """Name, launches, and whether `make test` compiles them, or only `make test-long`."""
    for dtype in (HALF, torch.float16, torch.float32):
        kind = str(dtype)[6:]
        for mixed in (False, True):
            name = f"guided_step-{kind}-{'mixed' if mixed else 'alike'}"
            yield name, step(dtype, 8, mixed), dtype == HALF and not mixed
        for shape in UNET + DECODER:
            name = f"group_norm_silu-{kind}-{'x'.join(map(str, shape))}"
            yield name, norm(dtype, *shape, biased=shape in UNET), dtype == HALF and shape in UNET[1:4:2]
        for head_dim in (*attention.PIECES, attention.WIDE) if dtype in attention.SERVED else ():
            short = dtype == HALF and head_dim in (40, 160, attention.WIDE)
            yield f"attention-{kind}-{head_dim}", heads(dtype, head_dim, 4096), short
            if head_dim != attention.WIDE:
                yield f"attention-{kind}-{head_dim}-77", heads(dtype, head_dim, 77), short and head_dim == 40
        for tokens, channels in ((4096, 320), (64, 1280)):
            yield f"geglu-{kind}-{channels}", gated(dtype, tokens, channels), dtype == HALF and tokens == 4096
        for channels in (320, 1280, 10240):
            short = dtype == HALF and channels == 1280
            yield f"layer_norm-{kind}-{channels}", modulated(dtype, channels), short
        for tiles in TILES if dtype != torch.float32 else ():
            name = f"conv2d-{kind}-{tiles.rows}x{tiles.columns}x{tiles.depth}/{tiles.splits}"
            yield name, convolution(dtype, 1280, 8, tiles), dtype == HALF and tiles.splits > 1
    causal = heads(torch.float16, 64, 1024, 1024, causal=True, key_lengths=empty(2, dtype=torch.int64))
    yield "attention-float16-64-causal-lengths", causal, False


VARIANTS = [
    pytest.param(
        launch, id=f"{name}-{launch.variant.kernel.__name__}", marks=[] if short else [pytest.mark.long]
    )
    for name, launches, short in variants()
    for launch in launches
]


def usage(kernel: CompiledKernel, folder: Path) -> dict[str, int]:
    """Registers, bytes of stack and of static shared memory, as the machine code states them."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    dump = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    )
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", dump.stdout)}


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("launch", VARIANTS)
def test_no_spill_and_no_more_memory_than_there_is(launch: Launch, architecture: int, tmp_path: Path) -> None:
    kernel = launch.variant.compile(architecture)
    used = usage(kernel, tmp_path)
    print(
        f"sm_{architecture}: {used['REG']} registers, stack {used['STACK']}, {kernel.metadata.shared} bytes"
    )
    assert used["STACK"] == 0 and used["REG"] <= 255
    assert kernel.metadata.shared + used["SHARED"] <= SHARED[architecture]


def flagged() -> Iterator[Any]:
    """Launches with the flags that a measurement may switch on, for GPUs from 9.0 on."""
    early = {
        op: {tuned.ANY: {"sizes": {"pdl": True}}}
        for op in ("attention", "group_norm_silu", "guided_step", "layer_norm")
    }
    with tuned.using({**early, "geglu": {tuned.ANY: {"sizes": {"tma": True}}}}):
        launches = [
            *step(HALF, 8, False),
            *norm(HALF, *UNET[1], biased=True),
            *norm(HALF, *UNET[3], biased=True),
        ]
        launches += [*heads(HALF, 40, 77), *modulated(HALF, 1280), *gated(HALF, 4096, 320)]
        long = [each for dim in (40, 160, attention.WIDE) for each in heads(HALF, dim, 4096)]
        long += gated(torch.float16, 64, 1280)
    for launch in launches + long:
        name = launch.variant.kernel.__name__
        yield pytest.param(launch, id=name, marks=[pytest.mark.long] if launch in long else [])


@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("launch", list(flagged()))
def test_flags_spill_nothing_and_do_what_they_say(launch: Launch, architecture: int, tmp_path: Path) -> None:
    test_no_spill_and_no_more_memory_than_there_is(launch, architecture, tmp_path)
    ptx = launch.variant.compile(architecture).asm["ptx"]
    if launch.variant.kernel is geglu.geglu_kernel:
        assert ptx.count("cp.async.bulk.tensor") >= 3 and "cp.async.c" not in ptx
        return
    waits = ptx.index("griddepcontrol.wait")
    assert launch.variant.pdl and "griddepcontrol.launch_dependents" in ptx
    touched = re.compile(r"\b(?:(?:ld|st|atom|red)\.(?:\w+\.)*global|cp\.async)").search(ptx)
    assert touched and waits < touched.start()  # nothing is read or written before


def test_tensor_maps_keep_float32_exact() -> None:
    """No TF32 in the products, fetched this way or that."""
    for tma in (False, True):
        with tuned.using({"geglu": {tuned.ANY: {"sizes": {"tma": tma}}}}):
            (launch,) = gated(torch.float32, 64, 320)
        assert any(name.startswith("tensordesc") for name in launch.variant.types) == tma
        assert "tf32" not in launch.variant.compile(90).asm["ptx"]


def test_flags_are_off_by_default() -> None:
    for launch in (*step(HALF, 8, False), *norm(HALF, *UNET[3]), *heads(HALF, 40, 77), *modulated(HALF, 320)):
        assert not launch.variant.pdl and "griddepcontrol" not in launch.variant.compile(90).asm["ptx"]
    assert not any(name.startswith("tensordesc") for name in gated(HALF, 4096, 320)[0].variant.types)


def test_guided_step_is_one_launch_and_moves_16_bytes_at_a_time() -> None:
    (launch,) = step(torch.bfloat16, 8, mixed=False)
    ptx = launch.variant.compile(90).asm["ptx"]
    assert launch.grid == (32, 8)
    assert ptx.count("ld.global.v4.b32") == 3 and ptx.count("st.global.v4.b32") == 2


def test_guided_step_counts_slots_in_64_bits() -> None:
    """As does the reference where 2³¹ elements and more are in one batch."""
    (launch,) = step(torch.bfloat16, 2**18, mixed=False)
    ttir = launch.variant.compile(90).asm["ttir"]
    products = re.findall(r"arith\.muli .* : (\S+)", ttir)
    assert products and set(products) <= {"i64", "tensor<512xi64>"}


def test_group_norm_fills_the_chip_and_moves_16_bytes_at_a_time() -> None:
    """An H200 has 132 multiprocessors; one program a row and group would be 64 at two rows."""
    for shape in UNET[2:] + DECODER:
        launches = norm(HALF, *shape)
        assert [launch.variant.kernel.__name__ for launch in launches] == [
            "moments_kernel",
            "apply_kernel",
        ], shape
        assert all(math.prod(launch.grid) >= 132 for launch in launches), shape
    for launch in norm(HALF, *UNET[3]):
        ptx = launch.variant.compile(90).asm["ptx"]
        assert re.search(r"ld\.global\.v4\.b32", ptx) and "st.global.b16" not in ptx


def test_attention_copies_16_bytes_at_a_time_from_a_strided_view() -> None:
    """8 in the piece of 16 columns, of which each thread has four elements."""
    (launch,) = heads(HALF, 40, 4096)
    ptx = launch.variant.compile(90).asm["ptx"]
    sizes = set(re.findall(r"cp\.async\S* \[[^]]*\], \[[^]]*\], (0x)?(\w+)", ptx))
    assert {int(size, 16) for _, size in sizes} == {16, 8}
    assert "wgmma" in ptx and "ex2" in ptx


@pytest.mark.parametrize("keys", [77, 4096])
def test_attention_counts_rows_and_tokens_in_64_bits(keys: int) -> None:
    """Strides of 2³¹ elements reach the kernel as 64-bit numbers; products with a row are wide without."""
    (launch,) = heads(HALF, 64, keys)
    near = launch.variant.compile(90).asm["ttir"]
    scalars = set(re.findall(r"arith\.muli .* : (i\d+)", near))
    assert "i64" in scalars
    q = empty(2, 8, 4096, 64, nhwc=False)
    k = torch.empty_strided((2, 8, keys, 64), (2**34, 64, 2**34, 1), dtype=HALF, device="meta")
    (far,) = record(attention, q, k, k)
    assert "%k_token: i64" in (ttir := far.variant.compile(90).asm["ttir"]) and "%k_row: i64" in ttir
