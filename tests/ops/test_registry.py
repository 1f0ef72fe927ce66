"""The registry: what a watcher sees, and what explain says."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from fastldm import ops
from fastldm.errors import InvalidArgument
from fastldm.ops import registry

X, WEIGHT = torch.randn(2, 3), torch.randn(4, 3)


def test_a_watcher_gets_every_call_of_its_thread_alone() -> None:
    seen: list[Any] = []

    def watcher(op: ops.Op, *args: Any, **kwargs: Any) -> Any:
        seen.append((op, args, kwargs))
        return op(*args, **kwargs)  # not watched again

    elsewhere = threading.Thread(target=lambda: ops.linear(X, WEIGHT))
    with ops.use_backends("reference"), registry.watch(watcher):
        with ops.use_backends(None):  # as a pipeline without an order of its own
            result = ops.linear(X, WEIGHT, residual=None)
        elsewhere.start()
        elsewhere.join()
    ops.linear(X, WEIGHT)
    ((op, args, kwargs),) = seen
    assert op is ops.linear and args == (X, WEIGHT) and kwargs == {"residual": None}
    assert torch.equal(result, X @ WEIGHT.T)


def test_a_watcher_runs_with_the_order_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = registry.StandIn(lambda x, weight: x, lambda x, weight: None if x is X else "another x")
    monkeypatch.setitem(ops.linear.stand_ins, "cpp", kernel)
    with ops.use_backends(("cpp", "reference")):
        with registry.watch(lambda op, *args: (op.explain(*args), op(*args))):
            (explained, result), (other, _) = ops.linear(X, WEIGHT), ops.linear(X + 1, WEIGHT)
        assert ops.linear(X, WEIGHT) is X  # no longer watched
    assert explained == ("cpp", {}) and result is X
    assert other == ("reference", {"cpp": "another x"})


def test_the_watch_ends_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), registry.watch(lambda op, *args: 1 // 0):
        ops.linear(X, WEIGHT)
    assert torch.allclose(ops.linear(X, WEIGHT), X @ WEIGHT.T)


def test_explain_names_the_backends_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.linear, "stand_ins", {})
    with ops.use_backends(("cpp", "reference")):
        assert ops.linear.explain(X, WEIGHT) == ("reference", {"cpp": "has no kernel for it"})


def test_an_order_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="backends"):
        ops.resolve(())
    with pytest.raises(InvalidArgument, match="backends=5: allowed is some of cuda, triton, cpp, reference"):
        ops.resolve(5)  # type: ignore[arg-type]
