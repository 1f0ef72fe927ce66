"""The backend `cuda` as far as a machine without a GPU can tell: what is built, how work is divided, spills.

Its arithmetic is compared with the references on the device: by the trial before first use, and by
benchmarks/gpu.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastldm.ops import registry

if shutil.which("nvcc") is None:
    _cuda = pytest.importorskip("fastldm._cuda")  # neither is there, or it came with the wheel
else:
    from fastldm import _cuda  # whoever has nvcc has built it

from fastldm.ops.cuda.group_norm_silu import plan

SOURCES = sorted((Path(__file__).parents[2] / "csrc" / "cuda").glob("*.cu"))
H200 = 132, 232_448  # multiprocessors, bytes of shared memory that a block may have
UNET = [(2, 64, 320), (2, 64, 960), (2, 32, 640), (2, 32, 1920), (2, 16, 1280), (2, 8, 1280), (16, 64, 320)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "side", "channels"), UNET)
def test_a_plan_divides_the_groups_and_fits(dtype: torch.dtype, rows: int, side: int, channels: int) -> None:
    found = plan(dtype, rows, side * side, channels, 32, *H200)
    assert found is not None
    slice_groups, splits = found
    width = channels // 32 * slice_groups * dtype.itemsize
    assert 32 % slice_groups == 0 and width % 16 == 0 and 16 <= width <= 4096
    shape = {"pixels": side * side, "channels": channels, "groups": 32}
    name = str(dtype).removeprefix("torch.")
    share = {"groups_per_slice": slice_groups, "splits": splits}
    needed = _cuda.group_norm_silu_shared(name, **shape, **share)
    kept = -(-side * side // splits) * width  # the picture itself
    assert kept < needed <= H200[1] and needed <= kept + 3 * 32 * 4 + 256 * 16 // dtype.itemsize * 4


def test_the_unets_maps_fill_the_chip() -> None:
    for rows, side, channels in UNET:
        slice_groups, splits = plan(torch.bfloat16, rows, side * side, channels, 32, *H200) or (32, 0)
        assert rows * 32 // slice_groups * splits >= 128, (rows, side, channels)


def test_a_map_that_no_cluster_holds_has_no_plan() -> None:
    assert plan(torch.bfloat16, 1, 512 * 512, 128, 32, *H200) is None
    assert plan(torch.float32, 1, 64, 33, 11, *H200) is None  # 12 bytes: no slice begins at a multiple of 16


def test_wrong_sizes_are_refused_before_the_device_is_asked() -> None:
    with pytest.raises(ValueError, match="multiple of groups"):
        _cuda.group_norm_silu_shared("float32", 64, 30, 32, 1, 1)
    with pytest.raises(ValueError, match="splits are"):
        _cuda.group_norm_silu_shared("float32", 64, 32, 8, 1, 3)
    with pytest.raises(ValueError, match="dtype"):
        _cuda.group_norm_silu_shared("float64", 64, 32, 8, 1, 1)
    planes = [(0, 1, 1, 1)] * 4
    with pytest.raises(ValueError, match="nine columns"):
        _cuda.guided_step(0, *planes, None, "float32", 1, 1, 1, False, False, 0, 0, 1, 8, 0)
    for letters, warps, why in (("px", 4, "letters"), ("pT", 4, "one tile"), ("p", 0, "1 to 32 warps")):
        with pytest.raises(ValueError, match=why):
            _cuda.CompiledKernel(0, b"", "kernel", letters, warps, 0, False, [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so() -> None:
    assert registry.missing("cuda") == "no CUDA device"
    planes = [(0, 1, 1, 1)] * 4
    with pytest.raises(RuntimeError, match="CUDA: .*(driver|device)"):
        _cuda.guided_step(0, *planes, None, "float32", 1, 1, 1, False, False, 0, 0, 1, 9, 0)
    with pytest.raises(RuntimeError, match="CUDA.*(driver|device)"):
        _cuda.CompiledKernel(0, b"", "kernel", "p", 4, 0, False, [])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("generation", [90, 100])
def test_no_kernel_spills(source: Path, generation: int, tmp_path: Path) -> None:
    target = f"-arch=sm_{generation}"
    command = ["nvcc", "-std=c++17", "-O3", target, "-Xptxas=-v", "-cubin", str(source), "-o", "out.cubin"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    frames = [int(size) for size in re.findall(r"(\d+) bytes stack frame", told)]
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", told)]
    print(f"{source.stem} sm_{generation}: {registers} registers")
    assert frames == [0, 0, 0] and len(registers) == 3  # one kernel a dtype
    assert max(registers) * 256 * 2 <= 65536  # two blocks a multiprocessor
