"""How much memory there is, moving tensors without waiting, and tensors kept for the next call."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor, nn

from fastldm.errors import OutOfMemory
from fastldm.ops.registry import order_in_force


def available_bytes(device: torch.device) -> int:
    """Bytes that new work may take on the device now; what the system counts as available, cached files
    included.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@contextlib.contextmanager
def out_of_memory(asked: str) -> Iterator[None]:
    """Within the block, running out of memory is an OutOfMemory that says what was asked for."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # The CPU allocator of torch has no type of error for it, only words.
        known = isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error)
        if not known or isinstance(error, OutOfMemory):
            raise
        raise OutOfMemory(f"{asked}: {error}") from None


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on the device; neither the host nor, for a GPU, work queued before has to wait."""
    return (
        x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and x.is_cpu else x.to(device)
    )


def to_host(x: Tensor) -> Tensor:
    """x on the CPU, from a GPU through pinned memory; waits for the work that makes it and for no other."""
    if not x.is_cuda:
        return x
    copy = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
    torch.cuda.current_stream(x.device).synchronize()
    return copy


def visiting(network: nn.Module, device: torch.device) -> Callable[..., Tensor]:
    """A call of a network that stays where it is: its weights visit the device for the time of each call."""

    def run(*inputs: Tensor) -> Tensor:
        weights = itertools.chain(network.named_parameters(), network.named_buffers())
        there = {name: to_device(tensor, device) for name, tensor in weights}
        made: Tensor = torch.func.functional_call(network, there, tuple(to_device(x, device) for x in inputs))
        return made

    return run


class TensorCache:
    """Tensors by what they were made of and by the backends in force then; the ones used last, up to `limit`
    bytes. Threads may share it.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of this key, made now if it is not kept; not to be written to."""
        key = key, order_in_force()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = make()
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self.held += made.nbytes
            while self.held > self.limit:
                self.held -= self._kept.popitem(last=False)[1].nbytes
        return made

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
            self.held = 0
