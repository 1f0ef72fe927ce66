"""ops.layer_norm on the C++ backend, on every instruction set that runs here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastldm.errors import BackendUnavailable
from fastldm.ops import layer_norm, use_backends

cpp = pytest.importorskip("fastldm.ops.cpp", exc_type=BackendUnavailable)

DTYPES = [torch.float32, torch.bfloat16]
each_isa = pytest.mark.parametrize("isa", cpp._C.isas())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
Case = dict[str, Any]


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    """Widths that fill no vector, 1 to 17 rows, large means, any of the other tensors left out."""
    rows, tokens, channels = draw(st.integers(1, 17)), draw(st.integers(1, 9)), draw(st.integers(2, 150))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**40)))
    mean = draw(st.sampled_from([0.0, 0.0, 1.0, 30.0] + [3000.0] * (dtype == torch.float32)))

    def normal(*shape: int) -> Tensor | None:
        made = torch.randn(*shape, generator=generator)
        return made if draw(st.booleans()) else None

    x = (
        torch.randn(rows, tokens, channels, generator=generator) * draw(st.sampled_from([0.1, 1.0, 8.0]))
        + mean
    )
    affine = draw(st.sampled_from([dtype, torch.float32]))
    weight, bias = normal(channels), normal(channels)
    chunks = torch.randn(rows, 3 * channels, generator=generator).to(dtype).chunk(3, dim=1)
    return {
        "x": x.to(dtype),
        "weight": None if weight is None else weight.to(affine),
        "bias": None if bias is None else bias.to(affine),
        "eps": draw(st.sampled_from([1e-5, 1e-6])),
        "scale": chunks[0] if draw(st.booleans()) else None,
        "shift": chunks[2] if draw(st.booleans()) else None,
    }


def in_dtype(case: Case, dtype: torch.dtype) -> Tensor:
    """The reference with every tensor in the dtype."""
    return layer_norm.reference(**{k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in case.items()})


def run(case: Case) -> Tensor:
    with use_backends("cpp"):
        return layer_norm(**case)


@each_isa
@each_dtype
@pytest.mark.usefixtures("poisoned")
def test_errors_stay_within_those_of_pytorch(
    isa: str, dtype: torch.dtype, error_rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpp.extension, "ISA", isa)
    rule = error_rule()

    @settings(max_examples=200)
    @given(cases(dtype))
    def check(case: Case) -> None:
        x = case["x"].double()
        slack = 1 + (x.mean(-1).abs() / (x.var(-1, correction=0) + case["eps"]).sqrt()).max().item()
        plain, exact = in_dtype(case, dtype), in_dtype(case, torch.float64)
        rule.add(run(case), plain, exact, slack, {k: getattr(v, "shape", v) for k, v in case.items()})

    check()
    rule.close(at_least=200)


@each_isa
@each_dtype
def test_a_large_mean_costs_no_more_than_its_rounding(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here E[x²] − E[x]² loses all digits of the variance."""
    monkeypatch.setattr(cpp.extension, "ISA", isa)
    x = torch.randn(7, 5, 333, generator=torch.Generator().manual_seed(3))
    x = (x + (1e4 if dtype == torch.float32 else 100.0)).to(dtype)
    exact = layer_norm.reference(x.double())
    error = (run({"x": x}).double() - exact).abs().max().item()
    # Deviations from a float32 centre are exact: nothing is left of the mean but a few roundings.
    assert error <= 2 * torch.finfo(dtype).eps * exact.abs().max().item()


@each_isa
def test_nothing_outside_the_tensors_is_read_or_written(isa: str) -> None:
    for dtype in DTYPES:
        for rows, channels in [(1, 2), (3, 7), (5, 33), (2, 64), (17, 31)]:
            numbers, pad = rows * channels, 67
            guarded = torch.full((numbers + 2 * pad,), float("nan"), dtype=dtype)
            guarded[pad:-pad] = torch.randn(numbers)
            parameters = torch.full((4, channels + 2 * pad), float("nan"), dtype=dtype)
            parameters[:, pad:-pad] = 1.0
            result = torch.full((numbers + 2 * pad,), 12345.0, dtype=dtype)
            weight, bias, scale, shift = (each[pad:].data_ptr() for each in parameters)
            where = isa, result[pad:].data_ptr(), guarded[pad:].data_ptr(), cpp.TYPES[dtype], rows, channels
            cpp._C.layer_norm(*where, weight, bias, cpp.TYPES[dtype], 1e-5, scale, 0, shift, 0, rows, 1)
            assert (result[:pad] == 12345.0).all() and (result[-pad:] == 12345.0).all()
            assert result[pad:-pad].isfinite().all() and not (result[pad:-pad] == 12345.0).any()


@each_isa
@each_dtype
def test_threads_change_no_bit(isa: str, dtype: torch.dtype) -> None:
    x = torch.randn(41, 803, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for threads in (1, 2, 5):
        results.append(torch.empty_like(x))
        where = isa, results[-1].data_ptr(), x.data_ptr(), cpp.TYPES[dtype], 41, 803
        cpp._C.layer_norm(*where, 0, 0, "float32", 1e-5, 0, 0, 0, 0, 41, threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@each_isa
@each_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_inf_reach_what_they_reach_in_pytorch(
    isa: str, dtype: torch.dtype, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpp.extension, "ISA", isa)
    x = torch.randn(3, 4, 37, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[1, 2, 30] = bad
    assert torch.equal(run({"x": x}).isnan(), layer_norm.reference(x).isnan())


def test_refused_calls_fall_back_or_say_why() -> None:
    x, weight, bias, scale = torch.randn(2, 3, 8), torch.randn(8), torch.randn(8), torch.randn(2, 8)
    refused = {
        "strided": (torch.randn(2, 3, 16)[..., ::2], weight, bias),
        "empty": (x[:0], weight, bias),
        "half": (x.half(), weight.half(), bias.half()),
        "strided weight": (x, torch.randn(16)[::2], bias),
        "strided scale": (x, weight, bias, 1e-5, torch.randn(2, 16)[:, ::2]),
        "shift of one row for all": (x, weight, bias, 1e-5, None, scale[:1]),
    }
    for why, call in refused.items():
        with use_backends("cpp"), pytest.raises(BackendUnavailable, match="layer_norm: cpp: "):
            layer_norm(*call)
        with use_backends(("cpp", "reference")):
            assert torch.equal(layer_norm(*call), layer_norm.reference(*call)), why


def test_gradients_are_those_of_the_reference() -> None:
    def gradients(op: Any) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        shapes = [(2, 3, 8), (8,), (8,), (2, 8), (2, 8)]
        x, weight, bias, scale, shift = call = [
            torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes
        ]
        return torch.autograd.grad(op(x, weight, bias, 1e-5, scale, shift).square().sum(), call)

    with use_backends(("cpp", "reference")):
        ours = gradients(layer_norm)
    assert all(map(torch.equal, ours, gradients(layer_norm.reference)))


def test_the_op_is_sound_for_torch_compile() -> None:
    call = torch.randn(2, 3, 8), torch.randn(8), torch.randn(8), 1e-6, torch.randn(2, 8), torch.randn(2, 8)
    torch.library.opcheck(torch.ops.fastldm.cpp_layer_norm.default, call)
    compiled = torch.compile(lambda *given: layer_norm(*given) + 1, fullgraph=True, backend="aot_eager")
    with use_backends("cpp"):
        assert torch.equal(compiled(*call), layer_norm(*call) + 1)


def test_wrong_sizes_are_refused_before_memory_is_touched() -> None:
    with pytest.raises(ValueError, match="rows and channels are positive"):
        cpp._C.layer_norm("plain", 0, 0, "float32", 1, 0, 0, 0, "float32", 1e-5, 0, 0, 0, 0, 1, 1)
    with pytest.raises(ValueError, match="float32 has a float32 weight and bias"):
        cpp._C.layer_norm("plain", 0, 0, "float32", 1, 4, 0, 0, "bfloat16", 1e-5, 0, 0, 0, 0, 1, 1)
