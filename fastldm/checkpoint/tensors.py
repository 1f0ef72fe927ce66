"""Tensors from the bytes of a safetensors file, and back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastldm.checkpoint.container import ALIGNMENT, Entry, Payload
from fastldm.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_tensor(entry: Entry, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Tensor:
    """A float tensor of a file, all finite, in another dtype and on another device when given.

    It is a view of the memory map where the data lies in one piece on a multiple of 64 bytes, else a copy:
    misaligned data is slower in every kernel and moves results by an ulp. CheckpointError naming it when it
    holds NaN or Inf, in the file or after conversion.
    """
    span = entry.spans[0]
    if entry.numel == 0:
        raise CheckpointError(span.file.path, entry.name, "is empty")
    pieces = [
        torch.frombuffer(each.file.map(), dtype=torch.uint8, count=each.end - each.begin, offset=each.begin)
        for each in entry.spans
    ]
    data = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    if data.data_ptr() % ALIGNMENT:
        data = data.clone()
    stored = data.view(DTYPES[entry.dtype]).view(entry.shape)
    tensor = stored.to(dtype=dtype or stored.dtype)
    if not _finite(tensor):
        why = (
            "holds NaN or Inf"
            if not _finite(stored)
            else f"does not fit into {dtype}: its largest values become Inf"
        )
        raise CheckpointError(span.file.path, entry.name, why)
    return tensor.to(device)


def _finite(tensor: Tensor) -> bool:
    """No NaN and no Inf, in one pass without a temporary: each shows in the smallest or largest value."""
    low, high = torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor)
    return math.isfinite(high.item() - low.item())


def payload(tensor: Tensor) -> Payload:
    """A tensor as something to write into a safetensors file."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return Payload(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), [flat.view(torch.uint8).numpy()])
