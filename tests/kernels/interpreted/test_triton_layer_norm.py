"""ops.layer_norm on the Triton backend, interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastldm.errors import BackendUnavailable
from fastldm.kernels.layer_norm import launch
from fastldm.ops import layer_norm, use_backends

DTYPES = [torch.float32, torch.float16]
Case = dict[str, Any]


def make(
    dtype: torch.dtype,
    rows: tuple[int, ...] = (2, 5),
    channels: int = 24,
    affine: bool = True,
    modulated: bool = True,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    modulation = normal(2, rows[0], channels) * 0.5 if modulated and len(rows) == 2 else [None, None]
    return {
        "x": normal(*rows, channels),
        "weight": normal(channels) if affine else None,
        "bias": normal(channels) if affine else None,
        "eps": 1e-5,
        "scale": modulation[0],
        "shift": modulation[1],
    }


def run(case: Case) -> Tensor:
    with use_backends("triton"):
        return layer_norm(**case)


def truth(case: Case) -> Tensor:
    return layer_norm.reference(
        **{name: value.double() if isinstance(value, Tensor) else value for name, value in case.items()}
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_errors_stay_within_those_of_pytorch(dtype: torch.dtype, error_rule: Any, shapes: int) -> None:
    rule = error_rule()

    @settings(max_examples=shapes)
    @given(
        rows=st.one_of(st.tuples(st.integers(1, 3), st.integers(1, 40)), st.just((7,)), st.just((2, 1, 9))),
        channels=st.sampled_from([2, 3, 24, 40, 64, 320, 1280]),
        affine=st.booleans(),
        modulated=st.booleans(),
        seed=st.integers(0, 2**32),
    )
    def check(**shape: Any) -> None:
        case = make(dtype, **shape)
        exact = truth(case)
        # Two numbers that are nearly alike: 1 / std makes much of their rounding.
        slack = 1 / float(case["x"].double().std(-1, correction=0).min().clamp(1e-3, 1))
        rule.add(run(case), layer_norm.reference(**case), exact, slack, shape)

    check()
    rule.close(at_least=shapes)


def test_a_large_mean_costs_no_more_than_its_rounding() -> None:
    case = make(torch.float32, (1, 3), 320, affine=False, modulated=False)
    case["x"] = case["x"] + 1e4
    assert (run(case) - truth(case)).abs().max() <= 1e4 * torch.finfo(torch.float32).eps * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_the_result_is_written(dtype: torch.dtype, guarded: Any) -> None:
    case, guard = make(dtype, (2, 3), 20), guarded()
    wanted = run(case)
    result = guard.cut(torch.full_like(wanted, float("nan")))
    launch(**case, result=result)
    guard.check()
    assert torch.equal(result, wanted)


def test_nan_and_inf_stay_in_their_rows() -> None:
    case = make(torch.float32)
    case["x"][0, 1, 3], case["x"][1, 2, 0] = float("nan"), float("inf")
    spoilt = run(case).isnan().all(-1)
    assert torch.equal(spoilt, layer_norm.reference(**case).isnan().all(-1)) and spoilt.sum() == 2


def test_refused_calls_say_why() -> None:
    case = make(torch.float32)
    refused: dict[str, Case] = {
        "float64": case | {"x": case["x"].double()},
        "is empty": case | {"x": case["x"][:0]},
        "not contiguous": case | {"x": case["x"].mT.contiguous().mT},
        "bias is not": case | {"bias": case["bias"][:3]},
        "scale or shift is not": case | {"scale": case["scale"][:1]},
        "neither": case | {"weight": case["weight"].double()},
        "autograd records": case | {"weight": case["weight"].clone().requires_grad_()},
    }
    for why, call in refused.items():
        with use_backends("triton"), pytest.raises(BackendUnavailable, match=f"layer_norm: triton: .*{why}"):
            layer_norm(**call)


def test_it_traces() -> None:
    torch.library.opcheck(torch.ops.fastldm.triton_layer_norm.default, tuple(make(torch.float32).values()))
