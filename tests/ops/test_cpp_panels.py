"""Convolutions and products on panels, float32: the kernel on every instruction set that runs here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastldm.errors import BackendUnavailable
from fastldm.ops import conv2d, linear, upsample_conv, use_backends

cpp = pytest.importorskip("fastldm.ops.cpp", exc_type=BackendUnavailable)

each_isa = pytest.mark.parametrize("isa", cpp._C.isas())
Call = tuple[Any, ...]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    made = torch.randn(shape, generator=generator)
    return made.to(memory_format=torch.channels_last) if len(shape) == 4 else made


@st.composite
def convolutions(draw: st.DrawFn) -> Call:
    """Windows, strides and padding of any kind, widths that fill no vector, more than one block of depth."""
    window, stride, padding = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(0, 3))
    rows, height, width = draw(st.integers(1, 4)), draw(st.integers(5, 9)), draw(st.integers(5, 9))
    channels, outputs = draw(st.integers(2, 70)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**40)))
    x = normal(generator, rows, channels, height, width) + draw(st.sampled_from([0.0, 1.0, 30.0]))
    weight = normal(generator, outputs, channels, window, window) / (channels * window**2) ** 0.5
    if draw(st.booleans()):
        weight = weight.contiguous()
    sides = ((side + 2 * padding - window) // stride + 1 for side in (height, width))
    residual = normal(generator, rows, outputs, *sides) if draw(st.booleans()) else None
    return x, weight, normal(generator, outputs) if draw(st.booleans()) else None, stride, padding, residual


@st.composite
def products(draw: st.DrawFn) -> Call:
    """1 to 3 leading axes, odd widths, weights in any order, with and without bias and residual."""
    leading = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    width, outputs = draw(st.integers(1, 700)), draw(st.integers(1, 140))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**40)))
    weight = normal(generator, outputs, width) / width**0.5
    if draw(st.booleans()):
        weight = weight.t().contiguous().t()
    x = normal(generator, *leading, width).contiguous() + draw(st.sampled_from([0.0, 30.0]))
    residual = normal(generator, *leading, outputs).contiguous() if draw(st.booleans()) else None
    return x, weight, normal(generator, outputs) if draw(st.booleans()) else None, residual


def choose(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    """This kernel, also where it would leave the call to PyTorch."""
    monkeypatch.setattr(cpp.extension, "ISA", isa)
    monkeypatch.setattr(cpp.panels, "SETS", (isa,))


def run(op: Any, call: Call) -> Tensor:
    with use_backends("cpp"):
        return op(*call)


def truth(op: Any, call: Call) -> Tensor:
    return op.reference(*(each.double() if isinstance(each, Tensor) else each for each in call))


@each_isa
@pytest.mark.parametrize(
    "op, calls", [(conv2d, convolutions()), (linear, products())], ids=["conv", "linear"]
)
@pytest.mark.usefixtures("poisoned")
def test_errors_stay_within_those_of_pytorch(
    isa: str, op: Any, calls: Any, error_rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, isa)
    rule = error_rule()

    @settings(max_examples=150)
    @given(calls)
    def check(call: Call) -> None:
        shapes = [getattr(each, "shape", each) for each in call]
        rule.add(run(op, call), op.reference(*call), truth(op, call), label=shapes)

    check()
    rule.close(at_least=150)


def test_errors_of_long_sums_are_below_those_of_pytorch() -> None:
    """Blocks are summed apart: what the direct convolution loses over 3168 numbers is not lost."""
    generator = torch.Generator().manual_seed(2)
    x, weight = normal(generator, 2, 352, 4, 4), normal(generator, 176, 352, 3, 3) / 3168**0.5
    call = x, weight, None, 1, 1
    exact = truth(conv2d, call)
    ours, theirs = run(conv2d, call) - exact, conv2d.reference(*call) - exact
    assert ours.square().mean() <= theirs.square().mean()


@each_isa
def test_a_row_is_the_same_alone_and_for_any_number_of_threads(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, isa)
    generator = torch.Generator().manual_seed(3)
    maps, tokens = normal(generator, 3, 40, 13, 13), normal(generator, 500, 300)
    window, matrix = normal(generator, 150, 40, 3, 3), normal(generator, 150, 300)
    calls = [
        (conv2d, maps, (window, None, 1, 1)),
        (linear, tokens, (matrix,)),
        (upsample_conv, maps[:2], (window, matrix[0, :150].clone())),
    ]
    for op, x, rest in calls:
        whole = run(op, (x, *rest))
        for threads in (1, 2, 3, 7):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            assert torch.equal(run(op, (x, *rest)), whole)
        for row in range(0, len(x), 99 if op is linear else 1):
            assert torch.equal(run(op, (x[row : row + 1], *rest)), whole[row : row + 1])


@each_isa
def test_nothing_beside_the_result_is_written(isa: str) -> None:
    for outputs in (1, 15, 33, 64):
        x, weight = torch.ones(5, 7), torch.ones(outputs, 7)
        result, pad = torch.full((5 * outputs + 64,), -1.0), 32
        pack = cpp.panels.pack(weight)
        where = result[pad:].data_ptr(), 0, 0, outputs
        sizes = 1, (1, 5), 7, outputs, (1, 1), 1, (0, 0), (1, 5), 2
        cpp._C.convolve(isa, where, x.data_ptr(), pack.data_ptr(), 0, 0, *sizes)
        assert (result[:pad] == -1).all() and (result[-pad:] == -1).all() and (result[pad:-pad] == 7).all()


def test_calls_that_gain_nothing_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    fits, most = cpp.panels.fits, cpp.panels.MOST
    monkeypatch.setattr(cpp.extension, "ISA", "avx2")
    weight = torch.empty(1024, 1024, device="meta")
    assert fits(weight, most) and not fits(weight, most + 1)
    assert not fits(torch.empty(1024, 1025, device="meta"), 1) and not fits(weight.bfloat16(), 1)
    monkeypatch.setattr(cpp.extension, "ISA", "plain")
    assert not fits(weight, 1)


def test_nan_and_inf_reach_what_they_reach_in_pytorch() -> None:
    generator = torch.Generator().manual_seed(4)
    for bad in (float("nan"), float("inf")):
        x = normal(generator, 2, 8, 6, 5)
        x[1, 3, 2, 2] = bad
        call = x, normal(generator, 20, 8, 3, 3), None, 1, 1
        assert torch.equal(run(conv2d, call).isfinite(), conv2d.reference(*call).isfinite())


def test_wrong_sizes_are_refused_before_memory_is_touched() -> None:
    right = dict(maps=1, size=(1, 1), channels=1, outputs=1, window=(1, 1), stride=1, padding=(0, 0))
    right |= dict(result_size=(1, 1), threads=1)
    for name, wrong in {
        "maps": 0,
        "size": (1, 0),
        "channels": 0,
        "outputs": 0,
        "window": (0, 1),
        "stride": 0,
        "padding": (0, -1),
        "result_size": (0, 1),
        "threads": 0,
    }.items():
        with pytest.raises(ValueError, match="positive|pixels"):
            cpp._C.convolve("plain", (0, 0, 0, 0), 0, 0, 0, 0, **(right | {name: wrong}))
