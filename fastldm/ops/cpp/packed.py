"""Weights in the form that a kernel wants: made at the first call, kept as long as the weight itself."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class _Entry:
    """What was made of a weight: of which memory, and at which count of the changes in place."""

    storage: weakref.ref[Any]
    version: int
    made: Any


_entries: dict[tuple[Any, ...], _Entry] = {}
_lock = threading.Lock()


def packed(weight: Tensor, make: Callable[..., T], *hints: object) -> T:
    """make(weight, *hints), made once for all views of the same numbers; hints are those of the first call.

    It is made anew after any change in place that autograd counts: an optimiser's, `load_state_dict`, `add_`.
    A write behind autograd's back, through `.data` or NumPy, is not seen. Safe to call from any thread.
    """
    if weight.is_inference():
        return make(weight, *hints)  # its changes are not counted, so nothing can be kept
    key = make, weight.data_ptr(), weight.dtype, weight.shape, weight.stride()
    entry = _entries.get(key)
    if entry is None or entry.version != weight._version or entry.storage() is not weight.untyped_storage():
        with _lock:
            entry = _entries.get(key)
            version, storage = weight._version, weight.untyped_storage()
            if entry is None or entry.version != version or entry.storage() is not storage:
                # The callback takes no lock: the collector may run it inside this very block.
                gone = weakref.ref(storage, lambda _: _entries.pop(key, None))
                entry = _entries[key] = _Entry(gone, version, make(weight, *hints))
    return entry.made


def addresses() -> set[int]:
    """Of the weights of which something is kept."""
    return {key[1] for key in list(_entries)}


def unpackable(weight: Tensor) -> str | None:
    """Why nothing made of the weight may be kept, or None."""
    if not torch.compiler.is_compiling() and weight.is_inference():
        return "weight is an inference tensor, whose changes are not counted"
    return None
