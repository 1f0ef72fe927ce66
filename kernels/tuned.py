"""Sizes of blocks as data, by op, device and shape; nothing is tuned while a program runs.

`kernels/tuned/DEVICE.json` comes with fastldm, `$FASTLDM_CACHE/tuned/DEVICE.json` is this machine's own and
goes first; each holds {op: {shape: {size: number}}}. The defaults stand beside each kernel: chosen, not
measured, they spill no register on sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
SHIPPED = Path(__file__).with_name("tuned")


def choose(op: str, device: torch.device, shape: tuple[object, ...], default: T) -> T:
    """What was measured for this op and shape on this device, else `default`."""
    found = measured(op, device, shape)
    return default if found is None else type(default)(**found)


def measured(op: str, device: torch.device, shape: tuple[object, ...]) -> dict[str, int] | None:
    """The sizes measured for this op and shape on this device, or None."""
    return table(_name(device)).get(op, {}).get(" ".join(map(str, shape)))


@functools.cache
def table(device: str) -> dict[str, dict[str, dict[str, int]]]:
    """All that was measured on a device of this name, by op and shape; empty where nothing was."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    file_name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"
    for folder in (SHIPPED, _cache()):
        if (folder / file_name).is_file():
            for op, shapes in json.loads((folder / file_name).read_text()).items():
                found.setdefault(op, {}).update(shapes)
    return found


def _cache() -> Path:
    return Path(os.environ.get("FASTLDM_CACHE") or Path.home() / ".cache" / "fastldm") / "tuned"


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
