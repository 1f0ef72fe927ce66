"""How much memory there is, moving tensors without waiting, and tensors kept for the next call."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fastldm.errors import OutOfMemory
from fastldm.ops.registry import order_in_force

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
# What a control group may take and has taken, by file; lines of memory.stat: what cached files take.
VERSION_2 = ("memory.max", "memory.current", "active_file", "inactive_file")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_active_file", "total_inactive_file")


def available_bytes(device: torch.device) -> int:
    """Bytes that new work may take on the device now: on a GPU with what torch holds in reserve, as in the
    pools of graphs; on a CPU what the system counts as available, cached files included, within the limits of
    the process's control groups, such as a container's.
    """
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    return max(0, min([_of_the_machine(), *_of_groups()]))


def _of_the_machine() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _of_groups() -> Iterator[int]:
    """What each control group that this process is in, and has a limit, may still take."""
    try:
        lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, names = (GROUPS / "memory", VERSION_1) if controllers else (GROUPS, VERSION_2)
        group = top / path.lstrip("/")
        for folder in (group, *group.parents[: len(group.parts) - len(top.parts)]):
            try:
                limit, taken = (int((folder / name).read_text()) for name in names[:2])
                told = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield limit - taken + sum(int(told[name]) for name in names[2:])
            except (OSError, LookupError, ValueError):  # not seen from this container, or no limit: "max"
                pass


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


def owned(x: Tensor) -> Tensor:
    """A copy for the caller, who may write to it and differentiate it: no inference tensor; contiguous."""
    with torch.inference_mode(False):
        return x.clone(memory_format=torch.contiguous_format)


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
