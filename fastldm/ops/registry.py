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
        order = order_in_force()
        for backend in order:
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
        if not order:
            return _watcher()(self, *args, **kwargs)  # see `watch`
        return self.reference(*args, **kwargs)  # none of the named backends knows this op

    def explain(self, *args: P.args, **kwargs: P.kwargs) -> tuple[str, dict[str, str]]:
        """The backend that serves such a call, and why those before it in the order do not."""
        refusals: dict[str, str] = {}
        for backend in order_in_force():
            if backend == REFERENCE:
                break
            stand_in = self.stand_ins.get(backend)
            why = "has no kernel for it" if stand_in is None else stand_in.refuses(*args, **kwargs)
            if why is None:
                return backend, refusals
            refusals[backend] = why
        return REFERENCE, refusals


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
    if not isinstance(backends, str | tuple | list):
        raise InvalidArgument("backends", backends, f"some of {', '.join(AUTOMATIC)}, in a string or a list")
    names = (
        tuple(part.strip() for part in backends.split(",")) if isinstance(backends, str) else tuple(backends)
    )
    for name in names or ("",):  # an empty order would mean `watch`
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


def order_in_force() -> tuple[str, ...]:
    """The backends that ops try in this thread or task, in order."""
    chosen = _chosen.get()
    return _default_order() if chosen is None else chosen


# Dynamo cannot trace a context variable: the order is a constant of what it compiles.
order_in_force._dynamo_marked_constant = True  # type: ignore[attr-defined]

Watcher = Callable[..., Any]
_watching: ContextVar[tuple[Watcher, tuple[str, ...]]] = ContextVar("fastldm_watcher")


def _watcher() -> Watcher:
    return _watching.get()[0]


def order_outside() -> tuple[str, ...]:
    """The order in force; of a block in which calls are watched, that outside it."""
    return order_in_force() or _watching.get()[1]


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


@contextlib.contextmanager
def watch(watcher: Watcher) -> Iterator[None]:
    """Within the block, and this thread or task only, every op call is watcher(op, *its arguments) instead.

    The watcher runs with the order of backends in force outside the block, so it may call the op itself.
    An empty order stands for being watched: calls that nobody watches pay nothing for it.
    """
    order = order_outside()

    def unwatched(op: Op[..., Any], *args: Any, **kwargs: Any) -> Any:
        with use_backends(order):
            return watcher(op, *args, **kwargs)

    watching, chosen = _watching.set((unwatched, order)), _chosen.set(())
    try:
        yield
    finally:
        _chosen.reset(chosen)
        _watching.reset(watching)
