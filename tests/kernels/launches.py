"""Run by test_triton_launch.py, with the double of the driver in front: launch every kernel on tensors that
say they are on a GPU, through fastldm._cuda ("cubins") or by Triton ("triton").
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor

from fastldm.kernels import attention, cubins, geglu, group_norm_silu, guided_step, launch, layer_norm, tuned
from fastldm.kernels.tuned import ANY

STREAM = 0x5EA
SIZES = {"p": 8, "l": 8, "i": 4, "f": 4, "T": 128}


class Placed(Tensor):
    """A tensor without memory that gives a device and an address."""

    address = 0x7F0000000000

    def data_ptr(self) -> int:
        return self.address

    def get_device(self) -> int:
        return 0


def placed(*shape: int, dtype: torch.dtype = torch.bfloat16, address: int, nhwc: bool = False) -> Placed:
    layout = torch.channels_last if nhwc else torch.contiguous_format
    made = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout).as_subclass(Placed)
    made.address = 0x7F0000000000 + address
    return made


def run() -> None:
    """One call of each kernel, and of some with the flags or with an address that is no multiple of 16."""
    x, affine = placed(2, 320, 64, 64, address=0x1000, nhwc=True), placed(320, address=0x2000)
    group_norm_silu._run(x, affine, affine, 32)
    group_norm_silu._run(placed(2, 1280, 8, 8, address=0x1000, nhwc=True), affine, affine, 32)
    q, k, v = (placed(2, n, 320, address=0x1000 * n) for n in (4096, 77, 77))
    q, k, v = (each.unflatten(2, (8, 40)).transpose(1, 2) for each in (q, k, v))
    q.address, k.address, v.address = 0x7F0000001000, 0x7F0000002000, 0x7F0000003000
    attention._run(q, k, v, placed(2, dtype=torch.int64, address=0x4000))
    attention._run(q, q, q)
    tokens, norm = placed(2, 4096, 320, address=0x1000), placed(320, address=0x2000)
    layer_norm._run(tokens, norm, norm)
    layer_norm._run(placed(2, 4096, 320, address=0x1002), norm, norm)
    product = tokens, placed(2560, 320, address=0x3000), placed(2560, address=0x4000)
    geglu._run(*product)
    latents = placed(1, 4, 64, 64, dtype=torch.float32, address=0x1000)
    images = placed(2, 4, 64, 64, address=0x5000, nhwc=True)
    table, at = (
        placed(1, 26, 9, dtype=torch.float32, address=0x6000),
        placed(1, dtype=torch.int64, address=0x7000),
    )
    guided_step._run(latents, latents, images, images, None, table, at)
    with tuned.using(
        {"geglu": {ANY: {"sizes": {"tma": True}}}, "attention": {ANY: {"sizes": {"pdl": True}}}}
    ):
        geglu._run(*product)
        attention._run(q, q, q)


def main(by: str) -> None:
    fake: Any = torch._C
    fake._cuda_getCurrentRawStream = lambda device: STREAM
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_name = lambda device=None: "double"
    torch.cuda.current_device = lambda: 0
    prepared: dict[str, str] = {}

    def note(variant: cubins.Variant, capability: int) -> cubins.Cubin | None:
        """The double has to know how long the parameters are."""
        made = obtain(variant, capability)
        assert made is not None
        prepared[made.name] = " ".join(str(SIZES[letter]) for letter in made.letters)
        os.environ["KERNEL_PARAMETERS"] = ";".join(f"{name} {sizes}" for name, sizes in prepared.items())
        return made if by == "cubins" else None

    obtain, cubins.obtain = cubins.obtain, note
    assert launch._cuda is not None
    if by == "triton":
        from triton.backends.nvidia.driver import CudaDriver
        from triton.runtime import driver

        driver.set_active(CudaDriver())
    run()


if __name__ == "__main__":
    main(sys.argv[1])
