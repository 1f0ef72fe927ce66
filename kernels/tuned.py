"""What `fastldm tune` measured, by device, op and shape, as data; nothing is tuned while a program runs.

`kernels/tuned/DEVICE.json` comes with fastldm, `$FASTLDM_CACHE/tuned/DEVICE.json` is this machine's own and
goes first. Each holds {op: {shape: entry}}. An entry has the "sizes" {name: number} of the kernel, or the
name of the "rival" that was faster; then the stand-in refuses the call. "seconds" tells what each contender
took. The defaults stand beside each kernel: chosen, not measured, they spill no register on sm_80, sm_90 and
sm_100.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Entry = Mapping[str, Any]
Table = Mapping[str, Mapping[str, Entry]]

SHIPPED = Path(__file__).with_name("tuned")
ANY = "*"  # in a table laid over the others: every shape

_laid_over: ContextVar[Table | None] = ContextVar("fastldm_tuned", default=None)


def choose(op: str, device: torch.device, shape: tuple[object, ...], default: T) -> T:
    """The default with what was measured for this op and shape on this device in place of its fields."""
    sizes = (entry(op, device, shape) or {}).get("sizes")
    if not sizes:
        return default
    try:
        return dataclasses.replace(default, **sizes)  # type: ignore[type-var]
    except TypeError:
        warnings.warn(f"tuned sizes of {op} at {key_of(shape)} are of another version: {sizes}", stacklevel=2)
        return default


def beaten(
    op: str, device: torch.device, shape: tuple[object, ...], unknown: str | None = None
) -> str | None:
    """Why the kernel should leave this shape to another, or None; `unknown` where nothing was measured."""
    found = entry(op, device, shape)
    if found is None:
        return unknown
    return f"{found['rival']} was measured to be faster at this shape" if "rival" in found else None


def entry(op: str, device: torch.device, shape: tuple[object, ...]) -> Entry | None:
    """What is known of this op and shape on this device, or None."""
    over = (_laid_over.get() or {}).get(op)
    shapes = table(_name(device)).get(op)
    if not (over or shapes):
        return None
    key = key_of(shape)
    if over and (found := over.get(key) or over.get(ANY)):
        return found
    return shapes.get(key) if shapes else None


# Dynamo takes the answers as constants of what it compiles, as it does the order of the backends.
beaten._dynamo_marked_constant = True  # type: ignore[attr-defined]


def key_of(shape: tuple[object, ...]) -> str:
    """ "bfloat16 2 8 4096 77 40"."""
    return " ".join(str(part).removeprefix("torch.") for part in shape)


@contextlib.contextmanager
def using(laid_over: Table) -> Iterator[None]:
    """Within the block, and this thread or task only, this table goes before those of the files."""
    token = _laid_over.set(laid_over)
    try:
        yield
    finally:
        _laid_over.reset(token)


@functools.cache
def table(device: str) -> Table:
    """All that was measured on a device of this name, by op and shape; empty where nothing was."""
    found: dict[str, dict[str, Entry]] = {}
    for file in (SHIPPED / file_name(device), own_file(device)):
        for op, shapes in read(file).items():
            found.setdefault(op, {}).update(shapes)
    return found


def summary(device: str) -> dict[str, str]:
    """Of each op that was measured on a device of this name: {op: "9 shapes, 2 of them left to PyTorch"}."""
    told = {}
    for op, shapes in table(device).items():
        left = [found["rival"] for found in shapes.values() if "rival" in found]
        lost = f", {len(left)} of them left to {', '.join(sorted(set(left)))}" if left else ""
        told[op] = f"{len(shapes)} shape{'s' * (len(shapes) != 1)}{lost}"
    return told


def read(file: Path) -> Table:
    """A table; empty if there is no such file, and with a warning if it is damaged."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not all(_is_entry(each) for shapes in found.values() for each in shapes.values()):
            raise ValueError("an entry has neither sizes nor a rival")
    except (OSError, ValueError, AttributeError) as error:
        warnings.warn(f"{file} is damaged and not used ({error}); `fastldm tune` makes it anew", stacklevel=2)
        return {}
    return found


def _is_entry(found: Any) -> bool:
    sizes = found.get("sizes")
    if "rival" in found:
        return isinstance(found["rival"], str) and sizes is None
    return isinstance(sizes, dict) and all(isinstance(size, int) for size in sizes.values())


def own_file(device: str) -> Path:
    """Where this machine keeps what it measured on a device of this name."""
    cache = Path(os.environ.get("FASTLDM_CACHE") or Path.home() / ".cache" / "fastldm")
    return cache / "tuned" / file_name(device)


def file_name(device: str) -> str:
    """ "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
