"""Sizes of blocks as data, by op, device and shape; nothing is tuned while a program runs.

The defaults stand beside each kernel. They are chosen, not measured: they spill no register on sm_80, sm_90
and sm_100. A row of MEASURED takes their place on the device that it names.
"""

from __future__ import annotations

import functools
from typing import TypeVar

import torch

T = TypeVar("T")

# op → name of the device → shape → sizes of the op's type
MEASURED: dict[str, dict[str, dict[tuple[int, ...], object]]] = {}


def choose(op: str, device: torch.device, shape: tuple[int, ...], default: T) -> T:
    """What was measured for this op and shape on this device, else `default`."""
    if op not in MEASURED or device.type != "cuda":
        return default
    return MEASURED[op].get(_name(device), {}).get(shape, default)  # type: ignore[return-value]


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
