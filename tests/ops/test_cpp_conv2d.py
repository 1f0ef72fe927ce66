"""ops.conv2d on the C++ backend: oneDNN on weights packed once, for small maps and as products.

Small float32 weights are another kernel's: test_cpp_panels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastldm.errors import BackendUnavailable
from fastldm.ops import conv2d, use_backends

cpp = pytest.importorskip("fastldm.ops.cpp", exc_type=BackendUnavailable)

DTYPES = [torch.float32, torch.bfloat16]
Call = tuple[Any, ...]


@st.composite
def calls(draw: st.DrawFn, dtype: torch.dtype) -> Call:
    """Windows of 1 (bfloat16 alone) to 5, strides 1 and 2, odd sizes, with and without bias and residual."""
    window = draw(st.integers(2 if dtype == torch.float32 else 1, 5))
    stride, padding = (1, 0) if window == 1 else (draw(st.integers(1, 2)), draw(st.integers(0, 2)))
    rows, height, width = draw(st.integers(1, 6)), draw(st.integers(5, 8)), draw(st.integers(5, 8))
    channels, outputs = draw(st.integers(2, 40)), draw(st.integers(2, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**40)))

    def normal(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=generator).to(dtype)
        return made.to(memory_format=torch.channels_last) if len(shape) == 4 else made

    x = normal(rows, channels, height, width) + draw(st.sampled_from([0.0, 1.0, 30.0]))
    weight = normal(outputs, channels, window, window) / channels**0.5
    if draw(st.booleans()):
        weight = weight.contiguous()
    sides = ((side + 2 * padding - window) // stride + 1 for side in (height, width))
    residual = normal(rows, outputs, *sides) if draw(st.booleans()) else None
    return x, weight, normal(outputs) if draw(st.booleans()) else None, stride, padding, residual


def example(dtype: torch.dtype = torch.float32) -> Call:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 8, 6, 5, generator=generator).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(12, 8, 3, 3, generator=generator).to(dtype)
    return x, weight, torch.randn(12, generator=generator).to(dtype), 1, 1


def run(call: Call) -> Tensor:
    with use_backends("cpp"):
        return conv2d(*call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_errors_stay_within_those_of_pytorch(
    dtype: torch.dtype, error_rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cpp.onednn.missing(dtype):
        assert dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        with pytest.raises(BackendUnavailable, match="packed weights do not serve torch.bfloat16 here"):
            run(example(dtype))
        return
    monkeypatch.setattr(cpp.linear, "LEAST", 0)
    monkeypatch.setattr(cpp.panels, "MOST", 0)
    rule = error_rule()

    @settings(max_examples=200)
    @given(calls(dtype))
    def check(call: Call) -> None:
        exact = conv2d.reference(*(each.double() if isinstance(each, Tensor) else each for each in call))
        shapes = [getattr(each, "shape", each) for each in call]
        rule.add(run(call), conv2d.reference(*call), exact, label=shapes)

    check()
    rule.close(at_least=200)


def test_a_weight_changed_in_place_is_seen() -> None:
    x, weight, *rest = example()
    for _ in range(3):
        assert torch.allclose(run((x, weight, *rest)), conv2d.reference(x, weight, *rest), atol=1e-4)
        weight.mul_(-2.0)


@pytest.mark.parametrize("most", [0, 512], ids=["oneDNN", "panels"])
def test_a_pack_made_for_one_size_serves_others(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp.panels, "MOST", most)
    _, weight, bias, *_ = example()
    for rows, height, width, stride, padding in [(1, 3, 3, 1, 0), (3, 9, 4, 2, 1), (1, 16, 16, 1, 1)]:
        x = torch.randn(rows, 8, height, width).to(memory_format=torch.channels_last)
        call = x, weight, bias, stride, padding
        assert torch.allclose(run(call), conv2d.reference(*call), atol=1e-4)


def test_refused_calls_fall_back_or_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, *_ = example()
    with torch.inference_mode():
        uncounted = weight.clone()
    refused = {
        "not channels-last": (x.contiguous(), weight, bias, 1, 1),
        "1×1 with padding": (x.bfloat16(), weight[:, :, :1, :1].bfloat16(), bias.bfloat16(), 1, 1),
        "large": (torch.randn(1, 8, 23, 23).to(memory_format=torch.channels_last), weight, bias, 1, 1),
        "half": (x.half(), weight.half(), bias.half(), 1, 1),
        "residual in other memory": (x, weight, bias, 1, 1, torch.randn(2, 12, 6, 5)),
        "residual of one row": (x, weight, bias, 1, 1, torch.randn(1, 12, 6, 5)),
        "inference tensor": (x, uncounted, bias, 1, 1),
    }

    def check(why: str, call: Call) -> None:
        with use_backends("cpp"), pytest.raises(BackendUnavailable, match="conv2d: cpp: "):
            conv2d(*call)
        with use_backends(("cpp", "reference")):
            assert torch.equal(conv2d(*call), conv2d.reference(*call)), why

    for why, call in refused.items():
        check(why, call)
    monkeypatch.setattr(cpp.onednn, "missing", lambda dtype: "told so")
    check("no such operators", example(torch.bfloat16))


def test_the_probe_tells_missing_and_wrong_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = cpp.onednn.missing.__wrapped__
    assert probe(torch.float32) is None
    with monkeypatch.context() as patch:
        patch.setattr(cpp.onednn, "convolve", lambda x, *_: torch.zeros(1, 24, 5, 6))
        assert "wrong results" in probe(torch.float32)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_convolution_weight", None)
    assert "do not serve torch.float32 here" in probe(torch.float32)


def test_gradients_are_those_of_the_reference() -> None:
    def gradients(op: Any) -> tuple[Tensor, ...]:
        x, weight, bias, *rest = example()
        inputs = [each.requires_grad_() for each in (x, weight, bias)]
        return torch.autograd.grad(op(*inputs, *rest).square().sum(), inputs)

    with use_backends(("cpp", "reference")):
        ours = gradients(conv2d)
    assert all(map(torch.equal, ours, gradients(conv2d.reference)))


def test_torch_compile_traces_the_reference() -> None:
    call = example()
    compiled = torch.compile(lambda *given: conv2d(*given) + 1, fullgraph=True, backend="aot_eager")
    with use_backends(("cpp", "reference")):
        assert torch.allclose(compiled(*call), conv2d(*call) + 1, atol=1e-4)
