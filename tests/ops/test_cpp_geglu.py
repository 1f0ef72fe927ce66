"""ops.geglu on the C++ backend: the gate, on every instruction set that runs here, and the whole op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastldm.errors import BackendUnavailable
from fastldm.ops import geglu, use_backends

cpp = pytest.importorskip("fastldm.ops.cpp", exc_type=BackendUnavailable)

DTYPES = [torch.float32, torch.bfloat16]
each_isa = pytest.mark.parametrize("isa", cpp._C.isas())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
Call = tuple[Tensor, Tensor, Tensor]


@st.composite
def calls(draw: st.DrawFn, dtype: torch.dtype) -> Call:
    """1 to 3 leading axes, widths that fill no vector, large means, strided input."""
    leading = draw(
        st.lists(st.integers(1, 17), min_size=1, max_size=3).filter(
            lambda sizes: len(sizes) < 3 or max(sizes) < 9
        )
    )
    width, outputs = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**40)))
    scale, mean = draw(st.sampled_from([0.1, 1.0, 8.0])), draw(st.sampled_from([0.0, 0.0, 30.0]))
    x = (
        torch.randn(*leading, 2 * width, generator=generator)[..., :: draw(st.sampled_from([1, 2]))] * scale
        + mean
    )
    weight = torch.randn(2 * outputs, x.shape[-1], generator=generator) / x.shape[-1] ** 0.5
    return x.to(dtype), weight.to(dtype), torch.randn(2 * outputs, generator=generator).to(dtype)


def truth(call: Call) -> Tensor:
    return geglu.reference(*(tensor.double() for tensor in call))


def unfused(x: Tensor) -> Tensor:
    hidden, gates = x.chunk(2, dim=-1)
    return hidden * F.gelu(gates)


@each_isa
@each_dtype
@pytest.mark.usefixtures("poisoned")
def test_errors_stay_within_those_of_pytorch(
    isa: str, dtype: torch.dtype, error_rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpp.extension, "ISA", isa)
    rule = error_rule()

    @settings(max_examples=200)
    @given(calls(dtype))
    def check(call: Call) -> None:
        with use_backends("cpp"):
            result = geglu(*call)
        rule.add(result, geglu.reference(*call), truth(call), label=[tuple(t.shape) for t in call])

    check()
    rule.close(at_least=200)


@each_isa
@each_dtype
def test_the_gate_alone_is_as_accurate_as_pytorch(
    isa: str, dtype: torch.dtype, error_rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product in front hides its errors: here it is by itself."""
    monkeypatch.setattr(cpp.extension, "ISA", isa)
    rule = error_rule()
    for seed, scale in enumerate([0.01, 0.3, 1.0, 3.0, 10.0]):
        x = (torch.randn(40, 2 * 333, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
        rule.add(cpp.geglu.gate(x), unfused(x), unfused(x.double()))
    rule.close(at_least=5)


@each_isa
@each_dtype
def test_gelu_is_accurate_over_the_whole_range(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within four units in the last place of the value, also where 1 + erf has lost every digit."""
    monkeypatch.setattr(cpp.extension, "ISA", isa)
    far = torch.logspace(-30, 30, 199)
    values = torch.cat([torch.linspace(-20, 20, 4001), far, -far]).to(dtype)
    result = cpp.geglu.gate(torch.cat((torch.ones_like(values), values))).double()
    exact = values.double() * torch.special.erfc(-(0.5**0.5) * values.double()) / 2
    # exp(−g²/2) amplifies the rounding of its argument by that argument.
    allowed = (4 + values.double().square().clamp(max=200.0)) * torch.finfo(dtype).eps
    assert ((result - exact).abs() <= allowed * exact.abs() + 1e-37).all()


@each_isa
def test_nothing_outside_the_tensors_is_read_or_written(isa: str) -> None:
    for dtype in DTYPES:
        for rows, channels in [(1, 1), (3, 7), (5, 33), (2, 64), (17, 31)]:
            numbers, pad = rows * channels, 67
            guarded = torch.full((2 * numbers + 2 * pad,), float("nan"), dtype=dtype)
            guarded[pad:-pad] = 1.0
            result = torch.full((numbers + 2 * pad,), 12345.0, dtype=dtype)
            where = isa, result[pad:].data_ptr(), guarded[pad:].data_ptr(), cpp.TYPES[dtype]
            cpp._C.geglu(*where, rows, channels, 1)
            assert (result[:pad] == 12345.0).all() and (result[-pad:] == 12345.0).all()
            assert torch.allclose(result[pad:-pad].float(), torch.tensor(0.8413), atol=4e-3)


@each_isa
@each_dtype
def test_threads_change_no_bit(isa: str, dtype: torch.dtype) -> None:
    x = torch.randn(41, 2 * 803, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for threads in (1, 2, 5):
        results.append(torch.empty(41, 803, dtype=dtype))
        cpp._C.geglu(isa, results[-1].data_ptr(), x.data_ptr(), cpp.TYPES[dtype], 41, 803, threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@each_isa
@each_dtype
def test_nan_and_inf_give_what_they_give_in_pytorch(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64: in float32, gelu(inf) is NaN in PyTorch's AVX-512 code and inf in its others."""
    monkeypatch.setattr(cpp.extension, "ISA", isa)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.0, -1.0])
    x = torch.cartesian_prod(odd, odd).T.reshape(1, -1)
    result, expected = cpp.geglu.gate(x.to(dtype)), unfused(x.double())
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.isinf(), expected.isinf())


def test_refused_calls_fall_back_or_say_why() -> None:
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(12, 8), torch.randn(12)
    refused = {
        "double": (x.double(), weight.double(), bias.double()),
        "half": (x.half(), weight.half(), bias.half()),
        "empty": (x[:0], weight, bias),
    }
    for why, call in refused.items():
        with use_backends("cpp"), pytest.raises(BackendUnavailable, match="geglu: cpp: "):
            geglu(*call)
        with use_backends(("cpp", "reference")):
            assert torch.equal(geglu(*call), geglu.reference(*call)), why


def test_gradients_are_those_of_the_reference() -> None:
    def gradients(op: Any) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        call = [
            torch.randn(*shape, generator=generator).requires_grad_() for shape in [(5, 8), (12, 8), (12,)]
        ]
        return torch.autograd.grad(op(*call).square().sum(), call)

    with use_backends(("cpp", "reference")):
        ours = gradients(geglu)
    assert all(map(torch.equal, ours, gradients(geglu.reference)))


def test_the_op_is_sound_for_torch_compile() -> None:
    call = torch.randn(2, 3, 8), torch.randn(12, 8), torch.randn(12)
    torch.library.opcheck(torch.ops.fastldm.cpp_geglu_gate.default, (torch.randn(2, 3, 12),))
    compiled = torch.compile(lambda *given: geglu(*given) + 1, fullgraph=True, backend="aot_eager")
    with use_backends("cpp"):
        assert torch.equal(compiled(*call), geglu(*call) + 1)


def test_wrong_sizes_are_refused_before_memory_is_touched() -> None:
    with pytest.raises(ValueError, match="rows and channels are positive"):
        cpp._C.geglu("plain", 0, 0, "float32", 1, 0, 1)
