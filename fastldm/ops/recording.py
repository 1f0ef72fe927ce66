"""Which ops a program calls, with what: a backend that notes every call and takes none."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fastldm.ops import registry

RECORDER = "recorder"


@dataclass(frozen=True)
class Call:
    """An op's name and all its arguments in order, defaults too."""

    op: str
    arguments: tuple[Any, ...]


_noted: ContextVar[list[Call]] = ContextVar("fastldm_recorded")


def _noting(op: registry.Op[..., Any]) -> Callable[..., str]:
    signature = inspect.signature(op.reference)

    def refuses(*args: Any, **kwargs: Any) -> str:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        _noted.get().append(Call(op.name, bound.args))
        return "it only notes the call"

    return refuses


@contextlib.contextmanager
def recording() -> Iterator[list[Call]]:
    """Within the block, and this thread only, the ops run on their references and every call is listed.

    Tensors are kept as they are, so record on the meta device, where they have no memory.
    """
    for op in registry.OPS.values():
        if RECORDER not in op.stand_ins:
            op.register(RECORDER, _noting(op))(op.reference)
    calls: list[Call] = []
    noted, order = _noted.set(calls), registry._chosen.set((RECORDER, registry.REFERENCE))
    try:
        yield calls
    finally:
        registry._chosen.reset(order)
        _noted.reset(noted)
