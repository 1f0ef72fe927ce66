"""ops.group_norm_silu on the Triton backend, interpreted, in one pass and in two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastldm.errors import BackendUnavailable
from fastldm.kernels import group_norm_silu as module
from fastldm.kernels import tuned
from fastldm.ops import group_norm_silu, use_backends

DTYPES = [torch.float32, torch.float16]
Case = dict[str, Any]
TWO_PASSES = module.Blocks(groups=2, pixels=8, tiles=2, warps=4)


def make(
    dtype: torch.dtype,
    rows: int = 2,
    groups: int = 3,
    width: int = 5,
    side: tuple[int, int] = (7, 9),
    mean: float = 0.0,
    scale: float = 1.0,
    silu: bool = True,
    biased: int = 2,
    affine: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """biased: 0 for no row_bias, 1 for one in float32, 2 for one of dtype that is a slice."""
    generator, channels = torch.Generator().manual_seed(seed), groups * width

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = (normal(rows, channels, *side) + mean * normal(rows, channels, 1, 1).sign()) * scale
    wide = normal(rows, channels + 3)
    return {
        "x": x.to(dtype).to(memory_format=torch.channels_last),
        "weight": normal(channels).to(affine),
        "bias": normal(channels).to(affine),
        "groups": groups,
        "eps": 1e-5,
        "silu": silu,
        "row_bias": [None, wide[:, :channels].contiguous(), wide.to(dtype)[:, :channels]][biased],
    }


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype) -> tuple[Case, module.Blocks | None]:
    """Odd sizes, groups of any width, large means; the usual blocks, or two passes in up to four parts."""
    case = make(
        dtype,
        rows=draw(st.integers(1, 2)),
        groups=draw(st.sampled_from([1, 2, 3, 5, 8])),
        width=draw(st.sampled_from([1, 2, 3, 4, 5, 10, 20])),
        side=draw(st.tuples(st.integers(1, 9), st.integers(2, 13))),
        mean=draw(st.sampled_from([0.0, 0.0, 1.0, 30.0] + [3000.0] * (dtype == torch.float32))),
        scale=draw(st.sampled_from([0.1, 1.0, 8.0])),
        silu=draw(st.booleans()),
        biased=draw(st.integers(0, 2)),
        affine=draw(st.sampled_from([dtype, torch.float32])),
        seed=draw(st.integers(0, 2**32)),
    )
    if draw(st.booleans()):
        return case, None
    size, parts = draw(st.sampled_from([8, 16])), draw(st.integers(1, 4))
    tiles = -(-case["x"][0, 0].numel() // (size * parts))
    return case, module.Blocks(-(-case["groups"] // draw(st.integers(1, 2))), size, tiles, 4)


def wide(case: Case, dtype: torch.dtype) -> Case:
    return {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in case.items()}


def truth(case: Case) -> Tensor:
    return group_norm_silu.reference(**wide(case, torch.float64))


def conditioning(case: Case) -> float:
    """1 + |mean| / std of the worst group."""
    x = case["x"].double()
    if case["row_bias"] is not None:
        x = x + case["row_bias"].double()[:, :, None, None]
    x = x.reshape(x.shape[0], case["groups"], -1)
    return 1 + (x.mean(-1).abs() / (x.var(-1, correction=0) + case["eps"]).sqrt()).max().item()


def run(case: Case, blocks: module.Blocks | None = None) -> Tensor:
    usual = module.blocks
    with use_backends("triton"), patch.object(module, "blocks", lambda *shape: blocks or usual(*shape)):
        return group_norm_silu(**case)


@pytest.fixture(params=[None, TWO_PASSES], ids=["one pass", "two passes"])
def passes(request: Any) -> Iterator[module.Blocks | None]:
    yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_errors_stay_within_those_of_pytorch(dtype: torch.dtype, error_rule: Any, shapes: int) -> None:
    rule = error_rule()

    @settings(max_examples=shapes)
    @given(cases(dtype))
    def check(drawn: tuple[Case, module.Blocks | None]) -> None:
        case, blocks = drawn
        plain = group_norm_silu.reference(**wide(case, dtype))
        label = tuple(case["x"].shape), case["groups"], blocks
        rule.add(run(case, blocks), plain, truth(case), conditioning(case), label)

    check()
    rule.close(at_least=shapes * 3 // 4)


def test_the_usual_blocks_of_a_large_map_take_two_passes() -> None:
    case = make(torch.float32, rows=1, groups=2, width=9, side=(37, 40))
    assert module.blocks(1, 37 * 40, 18, 2).tiles > 0 == module.blocks(1, 37, 18, 2).tiles
    assert (run(case) - truth(case)).abs().max() <= 8 * torch.finfo(torch.float32).eps * 8


def test_a_large_mean_costs_no_more_than_its_rounding(passes: module.Blocks | None) -> None:
    """Here E[x²] − E[x]² loses all digits of the variance, and the first pixel is a bad shift for a sum."""
    case = make(torch.float32, side=(13, 11), silu=False, biased=0)
    case["x"] += 1e3
    case["x"][0, :, 0, 0] += 1e5
    exact, eps = truth(case), torch.finfo(torch.float32).eps
    error = (run(case, passes).double() - exact).abs().max().item()
    assert error <= 4 * eps * exact.abs().max().item() + eps * conditioning(case)


def test_nothing_outside_the_tensors_is_read_or_written(
    passes: module.Blocks | None, guarded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, guard = make(torch.float32), guarded()
    wanted, real, results = run(case, passes), torch.empty_like, []

    def cut(tensor: Tensor) -> Tensor:
        results.append(guard.cut(real(tensor)))
        return results[-1]

    guard.CANARY = float("nan")  # read, it would reach the result
    read = {name: guard.cut(value) for name, value in case.items() if isinstance(value, Tensor)}
    guard.memory.clear()
    guard.CANARY = 77.0
    monkeypatch.setattr(torch, "empty_like", cut)
    assert torch.equal(run(case | read, passes), wanted)
    assert len(results) == len(guard.memory) == 1
    guard.check()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_inf_reach_what_they_reach_in_pytorch(passes: module.Blocks | None, bad: float) -> None:
    case = make(torch.float32, side=(13, 11))
    case["x"][1, 7, 12, 3] = bad
    assert torch.equal(run(case, passes).isnan(), group_norm_silu.reference(**case).isnan())


def test_silu_is_accurate_over_the_whole_range() -> None:
    """With one element a group, the result is silu(bias): every value is reached exactly."""
    values = torch.cat([torch.linspace(-120, 120, 481), torch.logspace(-30, 30, 99)])
    case = {"x": torch.zeros(1, len(values), 1, 1), "weight": torch.ones(len(values)), "bias": values}
    result = run(case | {"groups": len(values)}).flatten().double()
    exact = torch.nn.functional.silu(values.double())
    assert ((result - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact.abs() + 1e-35).all()


def test_a_measured_row_takes_the_place_of_the_default(measure: Any) -> None:
    device, shape = torch.device("cpu"), (2, 64, 320, 32)
    measure("group_norm_silu", shape, TWO_PASSES)
    default = module.blocks(*shape)
    assert default != TWO_PASSES == tuned.choose("group_norm_silu", device, shape, default)
    assert tuned.choose("group_norm_silu", device, (1, *shape[1:]), default) is default
    assert tuned.choose("attention", device, shape, default) is default


def test_refused_calls_fall_back_or_say_why() -> None:
    x = torch.randn(2, 8, 6, 5).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(8), torch.randn(8)
    strided = torch.randn(2, 16)[:, ::2]
    refused = {
        "channels-last": (x.contiguous(), weight, bias, 4),
        r"not \[N, C, H, W\]": (x[:0], weight, bias, 4),
        "do not form 3 groups": (x, weight, bias, 3),
        "x is torch.bfloat16": (x.bfloat16(), weight, bias, 4),
        "not contiguous": (x, torch.randn(16)[::2], bias, 4),
        "both of one type": (x, weight, bias.half(), 4),
        r"not \[C\]": (x, weight[:4], bias, 4),
        "neighbouring": (x, weight, bias, 4, 1e-5, True, strided),
        "several devices": (x, weight.to("meta"), bias, 4),
        "autograd": (x, weight.clone().requires_grad_(), bias, 4),
    }
    for why, arguments in refused.items():
        told = f"group_norm_silu: triton: .*{why}"
        with use_backends("triton"), pytest.raises(BackendUnavailable, match=told):
            group_norm_silu(*arguments)
    with use_backends(("triton", "reference")):
        arguments = refused["channels-last"]
        assert torch.equal(group_norm_silu(*arguments), group_norm_silu.reference(*arguments))


def test_the_op_is_sound_for_torch_compile() -> None:
    case = make(torch.float32, rows=1)
    torch.library.opcheck(torch.ops.fastldm.triton_group_norm_silu.default, tuple(case.values()))
    traced = torch.compile(lambda **named: group_norm_silu(**named) + 1, fullgraph=True, backend="aot_eager")
    with use_backends("triton"):
        result = traced(**case)
    assert torch.equal(result, run(case) + 1)
