"""What a process can check: interpreted/ needs TRITON_INTERPRET=1, under which nothing can be compiled."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

COMPILED = ["test_triton_compiled.py", "test_triton_launch.py", "test_triton_processes.py"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = COMPILED if INTERPRETED else ["interpreted"]


class Guarded:
    """Tensors cut out of larger memory, to see what a kernel writes outside them."""

    CANARY, MARGIN = 77.0, 61

    def __init__(self) -> None:
        self.memory: list[Tensor] = []

    def cut(self, tensor: Tensor) -> Tensor:
        """A copy with the same strides between two canaries."""
        span = (
            sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        )
        memory = torch.full((span + 2 * self.MARGIN,), self.CANARY, dtype=tensor.dtype)
        self.memory.append(memory)
        return memory.as_strided(tensor.shape, tensor.stride(), self.MARGIN).copy_(tensor)

    def check(self) -> None:
        for memory in self.memory:
            assert (memory[: self.MARGIN] == self.CANARY).all() and (
                memory[-self.MARGIN :] == self.CANARY
            ).all()


@pytest.fixture
def guarded() -> type[Guarded]:
    """One instance watches one call."""
    return Guarded


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """measure(op, shape, sizes): as if they had been measured on the CPU, where the interpreter runs."""
    from fastldm.kernels import tuned

    def leave(op: str, shape: tuple[object, ...], sizes: object) -> None:
        file = tmp_path / "tuned" / "cpu.json"
        file.parent.mkdir()
        file.write_text(json.dumps({op: {tuned.key_of(shape): {"sizes": vars(sizes)}}}))
        tuned.table.cache_clear()

    monkeypatch.setenv("FASTLDM_CACHE", str(tmp_path))
    yield leave
    tuned.table.cache_clear()


@pytest.fixture(params=[40, pytest.param(200, marks=pytest.mark.long)], ids="{} shapes".format)
def shapes(request: Any) -> int:
    """How many shapes the test of an op's errors draws."""
    return request.param
