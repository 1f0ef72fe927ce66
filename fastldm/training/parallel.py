"""Several processes, one model: torchrun starts them, each takes its share of every step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastldm.checkpoint.atomic import save_tensors


@dataclass(frozen=True)
class Workers:
    """How many processes train together, and which of them this is, counted from 0."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def summed(self, tensors: Iterable[Tensor]) -> None:
        """Every tensor becomes its sum over all processes, in one message."""
        given = list(tensors)
        if self.count == 1 or not given:
            return
        flat = torch.cat([tensor.flatten() for tensor in given])
        dist.all_reduce(flat)
        for tensor, part in zip(given, flat.split([tensor.numel() for tensor in given]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def gathered(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, in their order; each has as many."""
        if self.count == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def kept(self, file: Path, make: Callable[[], Any]) -> Any:
        """What the file holds, tensors above all; where there is none, what `make` gives the leading process,
        which writes it for all.
        """
        if self.leads and not file.exists():
            made = make()
            file.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(file, made)
        self.wait()
        return torch.load(file, weights_only=True)

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            dist.barrier()


ALONE = Workers()


def gradients(module: nn.Module) -> list[Tensor]:
    """The gradients of a module's parameters, of those that have one."""
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


@contextmanager
def joined(device: torch.device) -> Iterator[Workers]:
    """The processes that torchrun started together, or this one alone."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        yield ALONE
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Workers(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()


def local_device(name: str) -> torch.device:
    """The device of a configuration: "cpu", "cuda", or "auto", a GPU where there is one; each of several
    processes takes a GPU of its own.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
