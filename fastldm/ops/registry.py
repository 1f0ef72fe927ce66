"""One name, one reference, any number of stand-ins.

`@op` turns a PyTorch function into an `Op`: its body stays the reference and the documentation; a backend
registers a stand-in with a predicate that says why it cannot take a call (None: it can). Which backends are
tried, and in which order, is a context variable, so threads and tests choose independently.

Automatic choice falls back to the reference. A backend asked for by name that cannot run raises
`BackendUnavailable`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from fastldm.errors import BackendUnavailable, InvalidArgument

P = ParamSpec("P")
R = TypeVar("R")

REFERENCE = "reference"
AUTOMATIC: tuple[str, ...] = ("cuda", "triton", "cpp", REFERENCE)
# Modules that register the stand-ins of a backend when imported.
PROVIDERS: dict[str, str] = {
    "cuda": "fastldm.ops.cuda.register",
    "triton": "fastldm.kernels.register",
    "cpp": "fastldm.ops.cpp",
}

OPS: dict[str, Op[..., Any]] = {}


@dataclass(frozen=True)
class StandIn:
    run: Callable[..., Any]
    refuses: Callable[..., str | None]


class Op(Generic[P, R]):
    """A callable operation: the reference, and the stand-ins that may take its place."""

    def __init__(self, reference: Callable[P, R]) -> None:
        self.reference = reference
        self.name = reference.__name__
        self.stand_ins: dict[str, StandIn] = {}
        functools.update_wrapper(self, reference)

    def register(
        self, backend: str, refuses: Callable[..., str | None]
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Decorator: the function below runs this op on `backend` wherever `refuses(*same arguments)` is
        None.
        """

        def add(run: Callable[P, R]) -> Callable[P, R]:
            self.stand_ins[backend] = StandIn(run, refuses)
            return run

        return add

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        refusals = None
        for backend in _order():
            if backend == REFERENCE:
                return self.reference(*args, **kwargs)
            stand_in = self.stand_ins.get(backend)
            if stand_in is not None:
                why = stand_in.refuses(*args, **kwargs)
                if why is None:
                    return stand_in.run(*args, **kwargs)
                refusals = f"{refusals}; {backend}: {why}" if refusals else f"{backend}: {why}"
        if refusals:
            raise BackendUnavailable(f"{self.name}: {refusals} (add 'reference' to the backends to allow it)")
        return self.reference(*args, **kwargs)  # none of the named backends knows this op


def op(reference: Callable[P, R]) -> Op[P, R]:
    """Make the function the reference of an op of the same name."""
    made = Op(reference)
    OPS[made.name] = made
    return made


@functools.cache
def missing(backend: str) -> str | None:
    """Why this process cannot use the backend at all, or None."""
    if backend == REFERENCE:
        return None
    if backend not in AUTOMATIC:
        return f"unknown backend; known are {', '.join(AUTOMATIC)}"
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if backend in ("cuda", "triton") and not interpreted and not torch.cuda.is_available():
        return "no CUDA device"
    try:
        importlib.import_module(PROVIDERS[backend])
    except BackendUnavailable as error:
        return str(error)
    return None


def resolve(backends: str | tuple[str, ...] | list[str] | None) -> tuple[str, ...]:
    """The order of backends to try; None is automatic choice.

    Raises InvalidArgument for an unknown name, BackendUnavailable when one asked for by name cannot run in
    this process.
    """
    if backends is None:
        return tuple(name for name in AUTOMATIC if missing(name) is None)
    names = (
        tuple(part.strip() for part in backends.split(",")) if isinstance(backends, str) else tuple(backends)
    )
    for name in names:
        if name not in AUTOMATIC:
            raise InvalidArgument("backends", name, f"one of {', '.join(AUTOMATIC)}")
        why = missing(name)
        if why is not None:
            raise BackendUnavailable(f"{name}: {why}")
    return names


@functools.cache
def _default_order() -> tuple[str, ...]:
    return resolve(os.environ.get("FASTLDM_BACKENDS") or None)


_chosen: ContextVar[tuple[str, ...] | None] = ContextVar("fastldm_backends", default=None)


def _order() -> tuple[str, ...]:
    return _chosen.get() or _default_order()


# Dynamo cannot trace a context variable: the order is a constant of what it compiles.
_order._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def use_backends(backends: str | tuple[str, ...] | list[str] | None) -> Iterator[None]:
    """Within the block, and this thread or task only, ops try these backends in this order; None changes
    nothing.
    """
    token = _chosen.set(_chosen.get() if backends is None else resolve(backends))
    try:
        yield
    finally:
        _chosen.reset(token)
