"""ops.upsample_conv on the C++ backend: the convolutions, what is kept of the weights, the interleave."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastldm.errors import BackendUnavailable
from fastldm.ops import upsample_conv, use_backends

cpp = pytest.importorskip("fastldm.ops.cpp", exc_type=BackendUnavailable)

DTYPES = [torch.float32, torch.bfloat16]
Call = tuple[Tensor, Tensor, Tensor]


@st.composite
def calls(draw: st.DrawFn, dtype: torch.dtype) -> Call:
    """Odd sizes down to two pixels, 1 to 17 rows, large means, weights in any memory order."""
    rows, height, width = draw(st.integers(1, 17)), draw(st.integers(1, 9)), draw(st.integers(2, 9))
    channels, outputs = draw(st.integers(2, 40)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**40)))
    mean = draw(st.sampled_from([0.0, 1.0, 30.0]))
    x = torch.randn(rows, channels, height, width, generator=generator) + mean
    weight = torch.randn(outputs, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    if draw(st.booleans()):
        weight = weight.to(memory_format=torch.channels_last)
    elif draw(st.booleans()):
        weight = torch.cat((weight, weight), 1)[:, :channels]
    bias = torch.randn(outputs, generator=generator).to(dtype)
    return x.to(dtype, memory_format=torch.channels_last), weight.to(dtype), bias


def example(channels: int = 8, outputs: int = 12, rows: int = 2) -> Call:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, channels, 6, 5, generator=generator).to(memory_format=torch.channels_last)
    weight = torch.randn(outputs, channels, 3, 3, generator=generator)
    return x, weight, torch.randn(outputs, generator=generator)


def run(call: Call) -> Tensor:
    with use_backends("cpp"):
        return upsample_conv(*call)


def truth(call: Call) -> Tensor:
    x, weight, bias = call
    return upsample_conv.reference(x.double(), weight.double(), bias.double())


@pytest.mark.parametrize(
    "dtype, packs",
    [
        (torch.float32, "panels"),
        (torch.float32, "oneDNN"),
        (torch.float32, "none"),
        (torch.bfloat16, "oneDNN"),
        (torch.bfloat16, "none"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("poisoned")
def test_errors_stay_within_those_of_pytorch(
    dtype: torch.dtype, packs: str, error_rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packs == "oneDNN" and cpp.onednn.missing(dtype):
        assert dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        pytest.skip("oneDNN has no bfloat16 on this CPU; the plain case covers what runs here")
    if packs != "panels":
        monkeypatch.setattr(cpp.panels, "MOST", 0)
    if packs == "none":
        monkeypatch.setattr(cpp.onednn, "missing", lambda dtype: "told so")
    rule = error_rule()

    @settings(max_examples=200)
    @given(calls(dtype))
    def check(call: Call) -> None:
        rule.add(run(call), upsample_conv.reference(*call), truth(call), label=tuple(call[0].shape))

    check()
    rule.close(at_least=200)


@pytest.mark.parametrize("lines", [1, 2, 4, 5])
def test_strips_are_the_whole(lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = example(rows=3)
    monkeypatch.setattr(cpp.panels, "MOST", 0)
    whole = run((x, weight, bias))
    line_of_maps = 4 * x.shape[0] * x.shape[3] * weight.shape[0] * x.element_size()
    monkeypatch.setattr(cpp.upsample_conv, "STRIP", lines * line_of_maps // torch.get_num_threads())
    assert torch.allclose(run((x, weight, bias)), whole, atol=1e-5)


def test_errors_of_many_channels_are_below_those_of_the_direct_convolution() -> None:
    """Fewer products and the weights rounded once: no worse than PyTorch in float32, by root mean square."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 320, 12, 12, generator=generator).to(memory_format=torch.channels_last)
    weight = torch.randn(64, 320, 3, 3, generator=generator) / 2880**0.5
    call = x, weight, torch.randn(64, generator=generator)
    exact = truth(call)
    error, theirs = (
        (run(call) - exact).square().mean(),
        (upsample_conv.reference(*call) - exact).square().mean(),
    )
    assert error <= 1.1**2 * theirs


def test_a_weight_changed_in_place_is_seen() -> None:
    x, weight, bias = example()
    kept = [weight, weight.view(12, 72).view(12, 8, 3, 3), weight.detach()]
    for change in (lambda: weight.add_(1.0), lambda: kept[1].mul_(0.5), lambda: weight.copy_(torch.ones(3))):
        for each in kept:
            assert torch.allclose(run((x, each, bias)), upsample_conv.reference(x, weight, bias), atol=1e-4)
        change()
    assert torch.allclose(run((x, weight, bias)), upsample_conv.reference(x, weight, bias), atol=1e-4)


def test_one_weight_is_prepared_once_and_forgotten_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    entries, count = cpp.packed._entries, []
    monkeypatch.setattr(
        cpp.upsample_conv,
        "phase_weights",
        lambda w, f=cpp.upsample_conv.phase_weights: count.append(0) or f(w),
    )
    before = len(entries)
    x, weight, bias = example()
    weight = torch.nn.Parameter(weight)
    with torch.inference_mode():
        for _ in range(3):
            run((x, weight, bias))
            run((x[:1], weight.flatten(1).unflatten(1, (8, 3, 3)), bias))
    assert len(count) == 1 and len(entries) == before + 1
    del weight
    gc.collect()
    assert len(entries) == before


def test_nan_and_inf_reach_what_they_reach_in_pytorch() -> None:
    """Of a sum of weights as of each: every output that sees the pixel, and no other."""
    for bad in (float("nan"), float("inf")):
        call = example()
        call[0][1, 3, 2, 2] = bad
        expected = upsample_conv.reference(*call)
        assert torch.equal(run(call).isfinite(), expected.isfinite())


@pytest.mark.parametrize("isa", cpp._C.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_interleave_moves_every_pixel_and_nothing_else(isa: str, dtype: torch.dtype) -> None:
    for rows, height, width, channels in [(1, 1, 1, 1), (3, 2, 5, 7), (2, 4, 3, 64), (1, 9, 8, 33)]:
        pixels, pad = rows * height * width * channels, 19
        phases = torch.arange(4 * pixels).to(dtype).view(4, rows, height, width, channels)
        for threads in (1, 2, 5):
            result = torch.full((4 * pixels + 2 * pad,), -1.0, dtype=dtype)
            addresses = [phase.data_ptr() for phase in phases]
            cpp._C.interleave(
                isa,
                result[pad:].data_ptr(),
                addresses,
                rows * height,
                width,
                channels * result.element_size(),
                threads,
            )
            woven = phases.view(2, 2, rows, height, width, channels).permute(2, 3, 0, 4, 1, 5).flatten()
            assert torch.equal(result[pad:-pad], woven)
            assert (result[:pad] == -1).all() and (result[-pad:] == -1).all()


def test_refused_calls_fall_back_or_say_why() -> None:
    x, weight, bias = example()
    with torch.inference_mode():
        uncounted = weight.clone()
    refused = {
        "not channels-last": (x.contiguous(), weight, bias),
        "sliced channels": (x[:, ::2], weight[:, ::2], bias),
        "one channel": (x[:, :1].contiguous(), weight[:, :1], bias),
        "half": (x.half(), weight.half(), bias.half()),
        "weight of another dtype": (x.bfloat16(), weight.bfloat16(), bias.bfloat16().to(torch.float32)),
        "inference tensor": (x, uncounted, bias),
    }
    for why, call in refused.items():
        with use_backends("cpp"), pytest.raises(BackendUnavailable, match="upsample_conv: cpp: "):
            upsample_conv(*call)
        if len({tensor.dtype for tensor in call}) == 1:
            with use_backends(("cpp", "reference")):
                assert torch.equal(upsample_conv(*call), upsample_conv.reference(*call)), why


def test_gradients_are_those_of_the_reference() -> None:
    def gradients(op: Any) -> tuple[Tensor, ...]:
        call = [tensor.requires_grad_() for tensor in example()]
        return torch.autograd.grad(op(*call).square().sum(), call)

    with use_backends(("cpp", "reference")):
        ours = gradients(upsample_conv)
    assert all(map(torch.equal, ours, gradients(upsample_conv.reference)))


def test_the_op_is_sound_for_torch_compile() -> None:
    call = example()
    torch.library.opcheck(torch.ops.fastldm.cpp_upsample_conv.default, call)
    compiled = torch.compile(lambda *given: upsample_conv(*given) + 1, fullgraph=True, backend="aot_eager")
    with use_backends("cpp"):
        assert torch.equal(compiled(*call), upsample_conv(*call) + 1)


def test_wrong_sizes_are_refused_before_memory_is_touched() -> None:
    with pytest.raises(ValueError, match="rows, width and bytes are positive"):
        cpp._C.interleave("plain", 0, [0] * 4, 1, 0, 4, 1)
