"""ops.linear on the C++ backend: oneDNN on weights packed once, where that pays."""

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

DTYPES = [torch.float32, torch.bfloat16]
Call = tuple[Any, ...]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of any size are packed, and float32 ones on any CPU."""
    monkeypatch.setattr(cpp.linear, "LEAST", {})
    monkeypatch.setattr(cpp.extension, "ISA", "avx512")


@st.composite
def calls(draw: st.DrawFn, dtype: torch.dtype) -> Call:
    """1 to 3 leading axes, odd widths, large means, strided input and weight, with and without the rest."""
    leading = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    width, outputs = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**40)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x = normal(*leading, 2 * width)[..., :: draw(st.sampled_from([1, 2]))] + draw(
        st.sampled_from([0.0, 30.0])
    )
    weight = normal(outputs, x.shape[-1]) / x.shape[-1] ** 0.5
    if draw(st.booleans()):
        weight = weight.t().contiguous().t()
    residual = normal(*leading, outputs) if draw(st.booleans()) else None
    return x, weight, normal(outputs) if draw(st.booleans()) else None, residual


def example(dtype: torch.dtype = torch.float32, width: int = 256) -> Call:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(2, 3, width, generator=generator), torch.randn(256, width, generator=generator)
    bias, residual = torch.randn(256, generator=generator), torch.randn(2, 3, 256, generator=generator)
    return x.to(dtype), weight.to(dtype), bias.to(dtype), residual.to(dtype)


def run(call: Call) -> Tensor:
    with use_backends("cpp"):
        return linear(*call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned", "always")
def test_errors_stay_within_those_of_pytorch(dtype: torch.dtype, error_rule: Any) -> None:
    if cpp.onednn.missing(dtype):
        assert dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        with pytest.raises(BackendUnavailable, match="packed weights do not serve torch.bfloat16 here"):
            run(example(dtype))
        return
    rule = error_rule()

    @settings(max_examples=200)
    @given(calls(dtype))
    def check(call: Call) -> None:
        exact = linear.reference(*(None if each is None else each.double() for each in call))
        rule.add(run(call), linear.reference(*call), exact, label=[getattr(t, "shape", t) for t in call])

    check()
    rule.close(at_least=200)


@pytest.mark.usefixtures("always")
def test_a_weight_changed_in_place_is_seen_and_one_pack_serves_all_rows() -> None:
    x, weight, bias, _ = example()
    packs = len(cpp.packed._entries)
    for _ in range(3):
        for part in (x, x[:1, :1], x.repeat(9, 1, 1)):
            assert torch.allclose(run((part, weight, bias)), linear.reference(part, weight, bias), atol=1e-3)
        assert len(cpp.packed._entries) == packs + 1
        weight.mul_(-2.0)


@pytest.mark.usefixtures("always")
def test_nan_and_inf_reach_what_they_reach_in_pytorch() -> None:
    for bad in (float("nan"), float("inf")):
        x, *rest = example()
        x[1, 2, 3] = bad
        assert torch.equal(run((x, *rest)).isfinite(), linear.reference(x, *rest).isfinite())


@pytest.mark.usefixtures("always")
def test_refused_calls_fall_back_or_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, residual = example()
    with torch.inference_mode():
        uncounted = weight.clone()
    refused = {
        "half": (x.half(), weight.half(), bias.half()),
        "empty": (x[:0], weight, bias),
        "vector": (x[0, 0], weight, bias),
        "residual of one row": (x, weight, bias, residual[:1]),
        "strided residual": (x, weight, bias, residual.transpose(0, 1).contiguous().transpose(0, 1)),
        "inference tensor": (x, uncounted, bias),
    }

    def check(why: str, call: Call) -> None:
        with use_backends("cpp"), pytest.raises(BackendUnavailable, match="linear: cpp: "):
            linear(*call)
        with use_backends(("cpp", "reference")):
            assert torch.equal(linear(*call), linear.reference(*call)), why

    for why, call in refused.items():
        check(why, call)
    with monkeypatch.context() as patch:
        patch.setattr(cpp.onednn, "missing", lambda dtype: "told so")
        check("no such operators", example())


def test_packs_only_where_that_was_found_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(dtype: torch.dtype, width: int) -> str | None:
        return cpp.linear.refuses_linear(*example(dtype, width))

    for isa, dtype, width, reason in [
        ("avx512_bf16", torch.float32, 256, None),
        ("avx512", torch.float32, 255, "so small a weight"),
        ("avx2", torch.float32, 256, "without AVX-512"),
        ("avx2", torch.bfloat16, 127, "so small a weight"),
    ]:
        monkeypatch.setattr(cpp.extension, "ISA", isa)
        told = why(dtype, width)
        assert told is None if reason is None else reason in (told or ""), (isa, dtype, width)


def test_the_probe_tells_wrong_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp.onednn, "multiply", lambda x, *_: torch.zeros(5, 24))
    assert "wrong results" in cpp.onednn.missing.__wrapped__(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packs", [True, False], ids=["packed", "plain"])
def test_geglu_strip_by_strip_is_geglu_at_once(
    dtype: torch.dtype, packs: bool, monkeypatch: pytest.MonkeyPatch, error_rule: Any
) -> None:
    """Strips of 5 rows, the last one shorter."""
    monkeypatch.setattr(cpp.linear, "LEAST", {} if packs else dict.fromkeys(DTYPES, 1 << 40))
    x, weight, bias, _ = example(dtype)
    call = x.repeat(1, 4, 1), weight / 16, bias
    monkeypatch.setattr(cpp.geglu, "STRIP", 5 * 256 * x.element_size() // torch.get_num_threads())
    rule = error_rule()
    with use_backends("cpp"):
        result = geglu(*call)
    rule.add(result, geglu.reference(*call), geglu.reference(*(each.double() for each in call)))
    rule.close(at_least=1)


@pytest.mark.usefixtures("always")
def test_gradients_are_those_of_the_reference() -> None:
    def gradients(op: Any) -> tuple[Tensor, ...]:
        call = [each.requires_grad_() for each in example()]
        return torch.autograd.grad(op(*call).square().sum(), call)

    with use_backends(("cpp", "reference")):
        ours = gradients(linear)
    assert all(map(torch.equal, ours, gradients(linear.reference)))


@pytest.mark.usefixtures("always")
def test_torch_compile_traces_the_reference() -> None:
    call = example()
    compiled = torch.compile(lambda *given: linear(*given) + 1, fullgraph=True, backend="aot_eager")
    with use_backends(("cpp", "reference")):
        assert torch.allclose(compiled(*call), linear(*call) + 1, atol=1e-3)
