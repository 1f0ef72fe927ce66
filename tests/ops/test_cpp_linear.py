"""ops.linear on the C++ backend: oneDNN on bfloat16 weights packed once; and geglu, which multiplies so.

float32 is another kernel's: test_cpp_panels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastldm.errors import BackendUnavailable
from fastldm.ops import geglu, linear, use_backends

cpp = pytest.importorskip("fastldm.ops.cpp", exc_type=BackendUnavailable)

MISSING = cpp.onednn.missing(torch.bfloat16)
needs_bfloat16 = pytest.mark.skipif(MISSING is not None, reason=f"the references serve here: {MISSING}")
Call = tuple[Any, ...]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of any size are packed."""
    monkeypatch.setattr(cpp.linear, "LEAST", 0)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """1 to 3 leading axes, odd widths, large means, strided input and weight, with and without the rest."""
    leading = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    width, outputs = draw(st.integers(1, 400)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**40)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    x = normal(*leading, 2 * width)[..., :: draw(st.sampled_from([1, 2]))] + draw(
        st.sampled_from([0.0, 30.0])
    )
    weight = normal(outputs, x.shape[-1]) / x.shape[-1] ** 0.5
    if draw(st.booleans()):
        weight = weight.t().contiguous().t()
    residual = normal(*leading, outputs) if draw(st.booleans()) else None
    return x, weight, normal(outputs) if draw(st.booleans()) else None, residual


def example(dtype: torch.dtype = torch.bfloat16, width: int = 256) -> Call:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(2, 3, width, generator=generator), torch.randn(256, width, generator=generator)
    bias, residual = torch.randn(256, generator=generator), torch.randn(2, 3, 256, generator=generator)
    return x.to(dtype), weight.to(dtype) / 16, bias.to(dtype), residual.to(dtype)


def run(call: Call) -> Tensor:
    with use_backends("cpp"):
        return linear(*call)


def truth(call: Call) -> Tensor:
    return linear.reference(*(None if each is None else each.double() for each in call))


@pytest.mark.parametrize("apart", [False, True], ids=["in the epilogue", "residual apart"])
@needs_bfloat16
@pytest.mark.usefixtures("poisoned", "always")
def test_errors_stay_within_those_of_pytorch(
    apart: bool, error_rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the residual added as for small results, and as for large ones."""
    monkeypatch.setattr(cpp.onednn, "LARGE", 0 if apart else 1 << 40)
    rule = error_rule()

    @settings(max_examples=200)
    @given(calls())
    def check(call: Call) -> None:
        rule.add(
            run(call), linear.reference(*call), truth(call), label=[getattr(t, "shape", t) for t in call]
        )

    check()
    rule.close(at_least=200)


def test_errors_of_the_models_widths_stay_within_those_of_pytorch(error_rule: Any) -> None:
    """Over many numbers the order of adding counts."""
    for dtype in (torch.float32, torch.bfloat16):
        rule, generator = error_rule(), torch.Generator().manual_seed(4)
        for width in (256, 320, 640, 1280, 2560, 5120):
            x, weight = (torch.randn(n, width, generator=generator).to(dtype) for n in (64, 256))
            call = x, weight / width**0.5, None, torch.randn(64, 256, generator=generator).to(dtype)
            with use_backends(("cpp", "reference")):
                rule.add(linear(*call), linear.reference(*call), truth(call), label=(dtype, width))
        rule.close(at_least=6)


@needs_bfloat16
def test_a_weight_changed_in_place_is_seen_and_one_pack_serves_all_rows() -> None:
    x, weight, bias, _ = example()
    packs = len(cpp.packed._entries)
    for _ in range(3):
        for part in (x, x[:1, :1], x.repeat(9, 1, 1)):
            expected = linear.reference(part, weight, bias)
            assert torch.allclose(run((part, weight, bias)), expected, rtol=2**-7, atol=0.05)
        assert len(cpp.packed._entries) == packs + 1
        weight.mul_(-2.0)


@needs_bfloat16
def test_nan_and_inf_reach_what_they_reach_in_pytorch() -> None:
    for bad in (float("nan"), float("inf")):
        x, *rest = example()
        x[1, 2, 3] = bad
        assert torch.equal(run((x, *rest)).isfinite(), linear.reference(x, *rest).isfinite())


def test_refused_calls_fall_back_or_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, residual = example()
    with torch.inference_mode():
        uncounted = weight.clone()
    refused = {
        "many rows of float32": (torch.ones(513, 8), torch.ones(4, 8)),
        "strided float32": (torch.ones(8, 16)[:, ::2], torch.ones(4, 8)),
        "x of another dtype": (x.float(), weight, bias),
        "small": example(width=127),
        "empty": (x[:0], weight, bias),
        "vector": (x[0, 0], weight, bias),
        "residual of one row": (x, weight, bias, residual[:1]),
        "strided residual": (x, weight, bias, residual.transpose(0, 1).contiguous().transpose(0, 1)),
        "inference tensor": (x, uncounted, bias),
    }

    def check(why: str, call: Call) -> None:
        with use_backends("cpp"), pytest.raises(BackendUnavailable, match="linear: cpp: "):
            linear(*call)
        if call[0].dtype == call[1].dtype:
            with use_backends(("cpp", "reference")):
                assert torch.equal(linear(*call), linear.reference(*call)), why

    for why, call in refused.items():
        check(why, call)
    monkeypatch.setattr(cpp.onednn, "missing", lambda dtype: "told so")
    check("no such operators", example())


def test_the_probe_tells_wrong_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp.onednn, "multiply", lambda x, *_: torch.zeros(5, 24))
    assert "wrong results" in cpp.onednn.missing.__wrapped__(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_geglu_strip_by_strip_is_geglu(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, error_rule: Any
) -> None:
    """Strips of 5 rows, the last one shorter."""
    x, weight, bias, _ = example(dtype)
    call = x.repeat(1, 4, 1), weight, bias
    monkeypatch.setattr(cpp.geglu, "ROWS", 1)
    monkeypatch.setattr(cpp.geglu, "STRIP", 5 * 256 * x.element_size() // torch.get_num_threads())
    rule = error_rule()
    with use_backends("cpp"):
        result = geglu(*call)
    rule.add(result, geglu.reference(*call), geglu.reference(*(each.double() for each in call)))
    rule.close(at_least=1)


def test_gradients_are_those_of_the_reference() -> None:
    def gradients(op: Any) -> tuple[Tensor, ...]:
        call = [each.requires_grad_() for each in example()]
        return torch.autograd.grad(op(*call).square().sum(), call)

    with use_backends(("cpp", "reference")):
        ours = gradients(linear)
    assert all(map(torch.equal, ours, gradients(linear.reference)))


def test_torch_compile_traces_the_reference() -> None:
    call = example()
    compiled = torch.compile(lambda *given: linear(*given) + 1, fullgraph=True, backend="aot_eager")
    with use_backends(("cpp", "reference")):
        assert torch.allclose(compiled(*call), linear(*call) + 1, rtol=2**-7, atol=0.05)
