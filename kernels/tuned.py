"""Measured divisions of work: one file a device, written by `fastldm tune`, read when a kernel is called.

`kernels/tuned/DEVICE.json` came with fastldm; `$FASTLDM_CACHE/tuned/DEVICE.json` was measured on this machine
and goes first. Each holds {op: {shape: {setting: number}}}.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path

import torch

SHIPPED = Path(__file__).with_name("tuned")
Settings = dict[str, int]


def file_name(device: str) -> str:
    """ "NVIDIA H200" → "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def cache() -> Path:
    """Where `fastldm tune` writes: $FASTLDM_CACHE, else ~/.cache/fastldm."""
    return Path(os.environ.get("FASTLDM_CACHE") or Path.home() / ".cache" / "fastldm") / "tuned"


@functools.cache
def table(device: str) -> dict[str, dict[str, Settings]]:
    """Everything measured on a device of this name; empty where nothing was."""
    found: dict[str, dict[str, Settings]] = {}
    for folder in (SHIPPED, cache()):
        file = folder / file_name(device)
        if file.is_file():
            for op, shapes in json.loads(file.read_text()).items():
                found.setdefault(op, {}).update(shapes)
    return found


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def tuned(device: torch.device, op: str, shape: str) -> Settings | None:
    """The settings measured for an op at a shape on this device, or None."""
    return table(_device_name(device)).get(op, {}).get(shape)
