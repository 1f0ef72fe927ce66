"""ops.geglu on the Triton backend, interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastldm.errors import BackendUnavailable
from fastldm.kernels.geglu import launch
from fastldm.ops import geglu, use_backends

DTYPES = [torch.float32, torch.float16]


def make(dtype: torch.dtype, rows: tuple[int, ...], channels: int, width: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (*rows, channels), (2 * width, channels), (2 * width,)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.to(dtype), (weight * channels**-0.5).to(dtype), bias.to(dtype)]


def run(*call: Tensor) -> Tensor:
    with use_backends("triton"):
        return geglu(*call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_errors_stay_within_those_of_pytorch(dtype: torch.dtype, error_rule: Any, shapes: int) -> None:
    rule = error_rule()

    @settings(max_examples=shapes)
    @given(
        rows=st.one_of(st.tuples(st.integers(1, 3), st.integers(1, 40)), st.just((70,)), st.just((2, 1, 9))),
        channels=st.sampled_from([1, 8, 24, 40, 64, 96, 130]),
        width=st.sampled_from([1, 7, 32, 48, 100]),
        seed=st.integers(0, 2**32),
    )
    def check(rows: tuple[int, ...], channels: int, width: int, seed: int) -> None:
        call = make(dtype, rows, channels, width, seed)
        truth = geglu.reference(*(each.double() for each in call))
        rule.add(run(*call), geglu.reference(*call), truth, label=(rows, channels, width))

    check()
    rule.close(at_least=shapes)


def test_many_rows_take_the_large_tiles() -> None:
    call = make(torch.float16, (1030,), 70, 70)
    truth = geglu.reference(*(each.double() for each in call))
    assert (run(*call) - truth).abs().max() <= 4 * torch.finfo(torch.float16).eps * truth.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_the_result_is_written(dtype: torch.dtype, guarded: Any) -> None:
    call, guard = make(dtype, (3, 5), 24, 7), guarded()
    wanted = run(*call)
    result = guard.cut(torch.full_like(wanted, float("nan")))
    launch(*call, result)
    guard.check()
    assert torch.equal(result, wanted)


def test_nan_and_inf_propagate() -> None:
    x, weight, bias = make(torch.float32, (4,), 16, 5)
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    result, wanted = run(x, weight, bias), geglu.reference(x, weight, bias)
    assert torch.equal(result.isnan(), wanted.isnan()) and result[1].isnan().all()
    assert torch.equal(result.isfinite(), wanted.isfinite())


def test_refused_calls_say_why() -> None:
    x, weight, bias = make(torch.float32, (4,), 16, 5)
    refused = {
        "one type": (x, weight.half(), bias),
        "is empty": (x[:0], weight, bias),
        "fit together": (x[:, :8], weight, bias),
        "not contiguous": (x.T.contiguous().T, weight, bias),
        "autograd records": (x, weight.clone().requires_grad_(), bias),
    }
    for why, call in refused.items():
        with use_backends("triton"), pytest.raises(BackendUnavailable, match=f"geglu: triton: .*{why}"):
            geglu(*call)


def test_it_traces() -> None:
    call = make(torch.float32, (2, 3), 8, 4)
    torch.library.opcheck(torch.ops.fastldm.triton_geglu.default, tuple(call))
