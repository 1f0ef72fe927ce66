"""Compiled kernels: what the cache holds, what is compiled ahead of time, and what reaches the driver."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from fastldm import tuning
from fastldm.kernels import (
    ahead,
    attention,
    cubins,
    geglu,
    group_norm_silu,
    guided_step,
    launch,
    layer_norm,
    tuned,
)
from fastldm.kernels.cubins import Variant
from fastldm.kernels.launch import recording

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
MODULES = {
    "attention": attention,
    "geglu": geglu,
    "group_norm_silu": group_norm_silu,
    "guided_step": guided_step,
    "layer_norm": layer_norm,
}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of its own for each test."""
    monkeypatch.setenv("FASTLDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cubins"


def norm(channels: int = 64) -> Variant:
    """A kernel that compiles quickly."""
    x, affine = torch.empty(2, 8, channels, device="meta"), torch.empty(channels, device="meta")
    with recording() as launches:
        layer_norm._run(x, affine, affine)
    return launches[0].variant


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The capabilities for which something was compiled, in turn."""
    asked: list[int] = []
    compile = Variant.compile

    def noting(variant: Variant, capability: int) -> Any:
        asked.append(capability)
        return compile(variant, capability)

    monkeypatch.setattr(Variant, "compile", noting)
    return asked


def test_an_entry_is_made_once_for_each_generation(cache: Path, compiled: list[int]) -> None:
    made = [cubins.obtain(norm(), capability) for capability in (80, 90, 90, 80)]
    assert compiled == [80, 90]
    assert made[0] == made[3] and made[1] == made[2] and made[0] != made[1]
    assert made[0] and made[0].code.startswith(b"\x7fELF") and made[0].letters == "ppppppiiiiifpp"
    assert len(list(cache.iterdir())) == 2  # and no temporary file


def shortened(data: bytes) -> bytes:
    return data[:-1]


def changed_code(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def changed_head(data: bytes) -> bytes:
    assert b'"warps": 4' in data
    return data.replace(b'"warps": 4', b'"warps": 8', 1)


def emptied(data: bytes) -> bytes:
    return b""


def another_json(data: bytes) -> bytes:
    return b"[]\n" + data


@pytest.mark.parametrize("damage", [shortened, changed_code, changed_head, emptied, another_json])
def test_a_damaged_entry_is_made_again(
    cache: Path, compiled: list[int], damage: Callable[[bytes], bytes]
) -> None:
    made = cubins.obtain(norm(), 90)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert cubins.read(norm(), 90) is None
    assert cubins.obtain(norm(), 90) == made and file.read_bytes() == whole
    assert compiled == [90, 90]


def test_an_entry_of_another_kernel_is_not_taken(cache: Path) -> None:
    cubins.obtain(norm(64), 90)
    (file,) = cache.iterdir()
    file.rename(cubins.path(norm(80), 90))
    assert cubins.read(norm(80), 90) is None and cubins.read(norm(64), 90) is None


SOURCE = """
import triton
import triton.language as tl
from fastldm.kernels.launch import kernel

@triton.jit
def changed(x):
    return x + {summand}

@kernel()
def add_kernel(x, BLOCK: tl.constexpr):
    at = x + tl.arange(0, BLOCK)
    tl.store(at, changed(tl.load(at)))
"""


def test_an_entry_goes_by_what_the_kernel_calls_and_by_the_version_of_triton(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []
    for summand in (1, 2, 1):
        file = tmp_path / f"added_{len(digests)}.py"
        file.write_text(SOURCE.format(summand=summand))
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with recording() as launches:
            module.add_kernel[(1,)](torch.empty(16, device="meta"), BLOCK=16)
        digests.append(launches[0].variant.digest(90))
    assert digests[0] == digests[2] != digests[1]
    monkeypatch.setattr(triton, "__version__", "0")
    assert launches[0].variant.digest(90) != digests[2]


def test_where_nothing_can_be_stored_the_kernel_is_compiled_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("FASTLDM_CACHE", str(tmp_path / "file"))
    assert cubins.obtain(norm(), 90) == cubins.make(norm(), 90)


def test_a_gpu_without_tensor_maps_is_left_to_triton(cache: Path) -> None:
    with tuned.using({"geglu": {tuned.ANY: {"sizes": {"tma": True}}}}), recording() as launches:
        half = {"dtype": torch.bfloat16, "device": "meta"}
        geglu._run(torch.empty(64, 64, **half), torch.empty(256, 64, **half), torch.empty(256, **half))
    assert cubins.obtain(launches[0].variant, 80) is None
    made = cubins.obtain(launches[0].variant, 90)
    assert (
        made
        and made.letters == "TiillTiillppiiipp"
        and [tile[3] for tile in made.tiles] == [(64, 64), (32, 64)]
    )
    assert cubins.read(launches[0].variant, 90) == made  # tiles too


def test_a_gpu_before_9_0_gets_no_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, allowed in (((8, 9), False), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, found=capability: found)
        assert launch._possible({"PDL": True, "SILU": True}, 0) == {"PDL": allowed, "SILU": True}


def test_tensors_on_no_gpu_are_not_launched_on() -> None:
    x, affine = torch.empty(2, 8, 64), torch.empty(64)
    with pytest.raises(RuntimeError, match="layer_norm_kernel is launched on tensors that are on no GPU"):
        layer_norm._run(x, affine, affine)


@pytest.mark.parametrize(("model", "tokens"), [("sd15", 77), ("sd21", 77), ("default", 32)])
def test_every_kernel_of_a_model_is_shipped(model: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a guided step and the decoder really call, with the sizes that stand beside the kernels."""
    monkeypatch.setattr(tuning, "TOKENS", tokens)
    shipped = ahead.variants()
    for dtype in ahead.DTYPES:
        with recording() as launches:
            for call in tuning.calls_of(model, dtype):
                if call.op in MODULES:
                    MODULES[call.op]._run(*call.arguments)
        assert len(launches) > 50
        missing = {each.variant for each in launches} - shipped
        assert not missing, [(each.kernel.__name__, each.constants, each.aligned) for each in missing]


def test_compile_all_compiles_what_lacks_in_other_processes(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "variants", lambda: {norm(64), norm(128)})
    cubins.obtain(norm(64), 80)
    lines: list[str] = []
    assert ahead.compile_all([80, 90], lines.append) == 4
    assert lines[0] == "4 kernels, 1 of them compiled before" and len(lines) == 4
    assert "sm_90 layer_norm_kernel" in "".join(lines[1:])
    assert all(cubins.read(norm(channels), sm) for channels in (64, 128) for sm in (80, 90))
    assert ahead.compile_all([90], lines.append) == 2 and lines[4:] == [
        "2 kernels, 2 of them compiled before"
    ]


def recorded(by: str, folder: Path) -> list[dict[str, Any]]:
    """What the driver was given in a process whose CUDA driver is the double in libcuda.cpp."""
    log = folder / f"{by}.json"
    environment = os.environ | {
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "TRITON_LIBCUDA_PATH": str(folder),
        "RECORDED_LAUNCHES": str(log),
        "PYTHONPATH": os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path),
    }
    run = [sys.executable, str(FOLDER / "launches.py"), by]
    done = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_the_driver_is_given_what_triton_gives_it(tmp_path: Path) -> None:
    """Machine code, grid, block, shared memory, stream, attributes and the bytes of the parameters."""
    if shutil.which("nvcc") is None:
        pytest.importorskip("fastldm._cuda")  # whoever has nvcc has built it
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    build = ["g++", "-std=c++17", "-shared", "-fPIC", f"-I{include}", str(FOLDER / "libcuda.cpp")]
    build += ["-Wl,-soname,libcuda.so.1", "-o", str(tmp_path / "libcuda.so.1")]
    subprocess.run(build, check=True)
    ours, theirs = recorded("cubins", tmp_path), recorded("triton", tmp_path)
    assert len(ours) == len(theirs) == 11
    names = {each["name"] for each in ours}
    assert names == {"moments_kernel", "apply_kernel", "one_pass_kernel", "attention_kernel"} | {
        "layer_norm_kernel",
        "geglu_kernel",
        "guided_step_kernel",
    }
    assert ours[-1]["attributes"] == [[6, 1]] and not ours[0]["attributes"]  # programmatic serialization
    assert len(ours[-2]["parameters"][0]) == 2 * 128  # a tensor map
    for mine, expected in zip(ours, theirs, strict=True):
        if mine["parameters"][0] == "02100000007f0000":
            # Triton knows which of the addresses are no multiples of 16, this path only that some are not.
            for each in (mine, expected):
                del each["module"], each["shared"]
        assert mine == expected
