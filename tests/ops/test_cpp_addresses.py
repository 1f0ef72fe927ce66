"""The C++ kernels are given addresses: every tensor of a call has to be in the CPU's memory, and what a call
allocates is of its own type, whatever the defaults of the process are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastldm import ops
from fastldm.errors import BackendUnavailable
from fastldm.ops.registry import Op
from fastldm.ops.trial import run_trial

pytest.importorskip("fastldm.ops.cpp", exc_type=BackendUnavailable)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32)


def last(*shape: int) -> Tensor:
    return normal(*shape).contiguous(memory_format=torch.channels_last)


CALLS: dict[Op, tuple[Any, ...]] = {
    ops.linear: (normal(2, 3, 64), normal(80, 64), normal(80), normal(2, 3, 80)),
    ops.geglu: (normal(2, 3, 64), normal(80, 64), normal(80)),
    ops.conv2d: (last(2, 64, 8, 8), last(32, 64, 3, 3), normal(32), 1, 1, last(2, 32, 8, 8)),
    ops.upsample_conv: (last(1, 32, 4, 4), last(32, 32, 3, 3), normal(32)),
    ops.layer_norm: (normal(2, 3, 64), normal(64), normal(64), 1e-5, normal(2, 64), normal(2, 64)),
    ops.group_norm_silu: (last(2, 32, 8, 8), normal(32), normal(32), 4, 1e-5, True, normal(2, 32)),
    ops.attention: (normal(1, 2, 16, 32), normal(1, 2, 9, 32), normal(1, 2, 9, 32)),
}


@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.name)
def test_a_tensor_elsewhere_is_refused(op: Op) -> None:
    refuses, call = op.stand_ins["cpp"].refuses, CALLS[op]
    assert refuses(*call) is None
    for place, given in enumerate(call):
        if isinstance(given, Tensor):
            moved = (*call[:place], given.to("meta"), *call[place + 1 :])
            assert refuses(*moved) is not None, place


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16])
def other_default(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.name)
def test_results_are_of_the_calls_type(op: Op, other_default: None) -> None:
    with ops.use_backends("cpp"):
        made = op(*CALLS[op])
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, op.reference(*CALLS[op]), rtol=1e-4, atol=1e-4)


def test_the_trial_of_a_backend_is_in_float32(other_default: None) -> None:
    run_trial("cpp", "cpu")


def test_a_vector_is_normed_by_the_reference() -> None:
    x = normal(8)
    torch.testing.assert_close(ops.layer_norm(x), ops.layer_norm.reference(x))
