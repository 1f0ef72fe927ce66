"""What the Triton stand-ins share: the library they register in, where a call may run, and the launch.

Under TRITON_INTERPRET=1 the kernels run on the CPU, in NumPy: slow, float32 and float16 only, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastldm.kernels import cubins

try:
    from fastldm import _cuda
except ImportError:  # fastldm was built without nvcc: Triton compiles and launches
    _cuda = None

__all__ = [
    "INTERPRETED",
    "TYPES",
    "Kernel",
    "Launch",
    "device_of",
    "implement",
    "kernel",
    "library",
    "on_device",
    "recording",
]

INTERPRETED: bool = triton.knobs.runtime.interpret
# NumPy, and so the interpreter, has no bfloat16: its products come out as garbage there.
TYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

library = torch.library.Library("fastldm", "FRAGMENT")


def implement(schema: str, run: Callable[..., Any], shape: Callable[..., Any]) -> Any:
    """Define the operator, `run` on a GPU (interpreted: on the CPU too) and `shape` for tracing; it is
    returned.
    """
    library.define(schema, tags=TAGS)
    name = schema.partition("(")[0]
    for device in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
        library.impl(name, run, device)
    library.impl(name, shape, "Meta")
    return getattr(torch.ops.fastldm, name).default


def on_device(*tensors: Tensor | None) -> str | None:
    """Why these tensors are not all in reach of one launch, or None."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) != 1:
        return "the tensors are on several devices"
    if devices.pop().type in (("cuda", "cpu") if INTERPRETED else ("cuda",)):
        return None
    return "the tensors are not on a CUDA device"


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# What is known of an integer: it is 1, and so a constant; a multiple of 16; too large for 32 bits.
ONE, SIXTEENFOLD, WIDE = 1, 2, 4
LEFT_TO_TRITON = object()


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded and not made."""

    grid: tuple[int, ...]
    variant: cubins.Variant


_recorded: ContextVar[list[Launch] | None] = ContextVar("fastldm_recorded_launches", default=None)
_preparing = threading.Lock()


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within the block, and this thread only, launches on tensors without memory (`device="meta"`) are
    listed.
    """
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def kernel(*do_not_specialize: str) -> Callable[[Callable[..., None]], Kernel]:
    """Decorator: a Triton kernel. The code is the same for all values of the integers that are named; each
    of the others may get code of its own where it is 1, or a multiple of 16.
    """
    return lambda function: Kernel(function, do_not_specialize)


class Kernel:
    """`kernel[grid](tensors and numbers, CONSTANT=…, num_warps=…, num_stages=…)` launches a Triton kernel on
    PyTorch's stream.

    The machine code comes from the cache of `cubins`, where it is put when it lacks, and is launched through
    `fastldm._cuda`. Triton launches where that is not built, and what needs more than a launch of cubins
    does. A constant PDL lets the kernel start before the one in front of it has ended; GPUs before 9.0 know
    no such thing, and get PDL=False.
    """

    def __init__(self, function: Callable[..., None], do_not_specialize: tuple[str, ...]) -> None:
        functools.update_wrapper(self, function)
        self.function = triton.jit(function, do_not_specialize=do_not_specialize)
        self.arg_names: list[str] = self.function.arg_names
        self.special = [name not in do_not_specialize for name in self.arg_names]
        self.ready: dict[tuple[Any, ...], Any] = {}

    def __reduce__(self) -> str:
        return self.__name__

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(
        self,
        grid: tuple[int, ...],
        *arguments: Tensor | TensorDescriptor | int | float,
        num_warps: int = 4,
        num_stages: int = 3,
        **constants: Any,
    ) -> None:
        if INTERPRETED:
            self.function[grid](*arguments, **_possible(constants, -1))
            return
        index, aligned, kinds, values = self._specialise(arguments)
        key = index, aligned, *kinds, num_warps, num_stages, *constants.items()
        found = self.ready.get(key)
        if found is None:
            constants = _possible(constants, index)
            variant = self._variant(kinds, aligned, constants, num_warps, num_stages)
            if index < 0:
                _record(Launch(grid, variant))
                return
            with _preparing:
                found = self.ready[key] = _prepare(variant, index)
        if found is LEFT_TO_TRITON:
            constants = _possible(constants, index)
            options = {
                "num_warps": num_warps,
                "num_stages": num_stages,
                "launch_pdl": constants.get("PDL", False),
                "enable_fp_fusion": True,
            }
            self.function[grid](*arguments, **options, **constants)
        else:
            found.launch(torch._C._cuda_getCurrentRawStream(index), grid, values)

    def _specialise(self, arguments: tuple[Any, ...]) -> tuple[int, bool, list[Any], list[Any]]:
        """The device (-1: none); whether every address is a multiple of 16; what else the code depends on,
        argument by argument; the values that remain to be passed.
        """
        kinds: list[Any] = []
        values: list[Any] = []
        addresses, index = 0, -1
        for value, special in zip(arguments, self.special, strict=False):
            if isinstance(value, Tensor):
                address = value.data_ptr()
                addresses |= address
                index = value.get_device()
                kinds.append(value.dtype)
                values.append(address)
            elif type(value) is int:
                if special and value == 1:
                    kinds.append(ONE)
                    continue
                kind = SIXTEENFOLD if special and value % 16 == 0 else 0
                kinds.append(kind if -(2**31) <= value < 2**31 else kind | WIDE)
                values.append(value)
            elif type(value) is float:
                kinds.append(float)
                values.append(value)
            else:
                kinds.append((value.base.dtype, *value.block_shape))
                address, sizes, strides = value.base.data_ptr(), list(value.shape), list(value.strides)
                values += (address, sizes, strides), *sizes, *strides
        return index, addresses % 16 == 0, kinds, values

    def _variant(
        self, kinds: list[Any], aligned: bool, constants: dict[str, Any], warps: int, stages: int
    ) -> cubins.Variant:
        """What Triton's JIT would specialise such a call to."""
        types = ["constexpr"] * len(self.arg_names)
        fixed = {self.arg_names.index(name): value for name, value in constants.items()}
        multiples = []
        for place, kind in enumerate(kinds):
            if isinstance(kind, torch.dtype):
                types[place] = POINTERS[kind]
                if aligned:
                    multiples.append(place)
            elif isinstance(kind, tuple):
                types[place] = f"tensordesc<{POINTERS[kind[0]][1:]}{list(kind[1:])}>"
            elif kind is float:
                types[place] = "fp32"
            elif kind == ONE:
                fixed[place] = 1
            else:
                types[place] = "i64" if kind & WIDE else "i32"
                if kind & SIXTEENFOLD:
                    multiples.append(place)
        pdl = bool(constants.get("PDL"))
        return cubins.Variant(
            self, tuple(types), tuple(sorted(fixed.items())), tuple(multiples), warps, stages, pdl
        )


def _possible(constants: dict[str, Any], index: int) -> dict[str, Any]:
    """The constants without what the device does not know, nor the interpreter."""
    if constants.get("PDL"):
        if INTERPRETED or (index >= 0 and torch.cuda.get_device_capability(index) < (9, 0)):
            return constants | {"PDL": False}
    return constants


def _record(launch: Launch) -> None:
    launches = _recorded.get()
    if launches is None:
        raise RuntimeError(f"{launch.variant.kernel.__name__} is launched on tensors that are on no GPU")
    launches.append(launch)


def _prepare(variant: cubins.Variant, index: int) -> Any:
    """What launches it on this device, from the cache, or compiled now and put there."""
    if _cuda is None:
        return LEFT_TO_TRITON
    major, minor = torch.cuda.get_device_capability(index)
    cubin = cubins.obtain(variant, 10 * major + minor)
    if cubin is None:
        return LEFT_TO_TRITON
    return _cuda.CompiledKernel(
        index, cubin.code, cubin.name, cubin.letters, cubin.warps, cubin.shared, variant.pdl, cubin.tiles
    )
