"""What the Triton stand-ins share: the library they register in, and where a call may run.

Under TRITON_INTERPRET=1 the kernels run on the CPU, in NumPy: slow, float32 and float16 only, for tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = ["INTERPRETED", "TYPES", "device_of", "implement", "library", "on_device"]

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
