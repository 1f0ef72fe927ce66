"""ops.group_norm_silu and channel_moments on the C++ backend, on every instruction set that runs here."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fastldm.errors import BackendUnavailable
from fastldm.ops import channel_moments, group_norm_silu, use_backends

cpp = pytest.importorskip("fastldm.ops.cpp", exc_type=BackendUnavailable)

ISAS = cpp._C.isas()
DTYPES = [torch.float32, torch.bfloat16]
Case = dict[str, Any]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpp.extension, "ISA", request.param)
    return request.param


def draw(rng: random.Random, dtype: torch.dtype) -> Case:
    """A call with odd sizes, 1 to 17 rows, channels that fill no vector, a large mean, strided row biases."""
    groups = rng.choice([1, 2, 3, 4, 5, 8, 16, 32])
    channels = groups * rng.choice([1, 2, 3, 4, 5, 7, 10, 20] if groups < 16 else [1, 2, 3, 4])
    height, width = (
        (rng.randint(1, 14), rng.randint(1, 14)) if rng.random() < 0.9 else (rng.randint(15, 40), 37)
    )
    rows = rng.randint(1, 17) if height * width < 100 else rng.randint(1, 3)
    generator = torch.Generator().manual_seed(rng.getrandbits(40))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    mean = rng.choice([0.0, 0.0, 1.0, 30.0] if dtype == torch.bfloat16 else [0.0, 0.0, 1.0, 30.0, 3000.0])
    x = (normal(rows, channels, height, width) + mean * normal(rows, channels, 1, 1).sign()) * rng.choice(
        [0.1, 1.0, 8.0]
    )
    affine = rng.choice([dtype, torch.float32])
    row_bias = rng.choice([None, normal(rows, channels), normal(rows, channels + 3)[:, :channels].to(dtype)])
    return {
        "x": x.to(dtype).to(memory_format=torch.channels_last),
        "weight": normal(channels).to(affine),
        "bias": normal(channels).to(affine),
        "groups": groups,
        "eps": rng.choice([1e-5, 1e-6]),
        "silu": rng.random() < 0.7,
        "row_bias": row_bias,
    }


def plain(case: Case) -> Tensor:
    """The reference with every tensor in x's dtype, as a PyTorch model in that dtype computes it."""
    dtype = case["x"].dtype
    return group_norm_silu.reference(
        **{k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in case.items()}
    )


def truth(case: Case) -> Tensor:
    return group_norm_silu.reference(
        **{k: v.double() if isinstance(v, Tensor) else v for k, v in case.items()}
    )


def conditioning(case: Case) -> float:
    """1 + |mean| / std of the worst group."""
    x = case["x"].double()
    if case["row_bias"] is not None:
        x = x + case["row_bias"].double()[:, :, None, None]
    x = x.reshape(x.shape[0], case["groups"], -1)
    return 1 + (x.mean(-1).abs() / (x.var(-1, correction=0) + case["eps"]).sqrt()).max().item()


def run(case: Case) -> Tensor:
    with use_backends("cpp"):
        return group_norm_silu(**case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_errors_stay_within_those_of_pytorch(
    dtype: torch.dtype, error_rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, rules = random.Random(f"{dtype}"), {isa: error_rule() for isa in ISAS}
    for index in range(200):
        case = draw(rng, dtype)
        torchs, exact, slack = plain(case), truth(case), conditioning(case)
        for isa, rule in rules.items():
            monkeypatch.setattr(cpp.extension, "ISA", isa)
            rule.add(run(case), torchs, exact, slack, (isa, index, tuple(case["x"].shape), case["groups"]))
    for rule in rules.values():
        rule.close(at_least=200)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_moments_are_those_of_pytorch_and_serve_the_norm(
    dtype: torch.dtype, error_rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norm of the lower lines of a map by the moments of all of it, against the norm of all of it."""
    rng, rules = random.Random(f"moments of {dtype}"), {isa: error_rule() for isa in ISAS}
    eps = torch.finfo(torch.float32).eps
    for index in range(200):
        case = draw(rng, dtype)
        x, slack, top = case["x"], conditioning(case), case["x"].shape[2] // 2
        part = x[:, :, top:].contiguous(memory_format=torch.channels_last)
        moments = channel_moments.reference(x.double())
        # In float32, 8 numbers are added and 8 such sums; then all in float64.
        bound = 32 * eps * slack * moments.abs().amax((0, 2))[:, None]
        torchs, exact = plain(case)[:, :, top:], truth(case)[:, :, top:]
        for isa, rule in rules.items():
            monkeypatch.setattr(cpp.extension, "ISA", isa)
            with use_backends("cpp"):
                made = channel_moments(x)
            assert ((made - moments).abs() <= bound).all(), (isa, index)
            result = run({**case, "x": part, "moments": made})
            rule.add(result.contiguous(), torchs.contiguous(), exact.contiguous(), slack, (isa, index))
    for rule in rules.values():
        rule.close(at_least=200)


def test_the_reference_takes_moments_too() -> None:
    """In float64, where rounding hides nothing: the moments of x give the norm of x."""
    rng = random.Random(17)
    for _ in range(20):
        case = draw(rng, torch.float32)
        case = {k: v.double() if isinstance(v, Tensor) else v for k, v in case.items()}
        moments = channel_moments.reference(case["x"])
        got, want = group_norm_silu.reference(**case, moments=moments), group_norm_silu.reference(**case)
        torch.testing.assert_close(
            got, want, rtol=0, atol=1e-11 * float(want.abs().max()) * conditioning(case)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_mean_costs_no_more_than_its_rounding(isa: str, dtype: torch.dtype) -> None:
    """Here E[x²] − E[x]² loses all digits of the variance, and the first pixel is a bad shift for a sum."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 24, 33, 29, generator=generator) + (1e4 if dtype == torch.float32 else 100.0)
    x[0, :, 0, 0] += 1e5
    x[1] += torch.linspace(-50, 50, 33)[:, None]
    case = {
        "x": x.to(dtype).to(memory_format=torch.channels_last),
        "weight": torch.ones(24),
        "bias": torch.zeros(24),
        "groups": 3,
        "eps": 1e-5,
        "silu": False,
        "row_bias": None,
    }
    exact = truth(case)
    error = (run(case).double() - exact).abs().max().item()
    assert error <= 4 * torch.finfo(dtype).eps * exact.abs().max().item() + torch.finfo(
        torch.float32
    ).eps * conditioning(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_is_accurate_over_the_whole_range(isa: str, dtype: torch.dtype) -> None:
    """With one element a group, the result is silu(bias): every value is reached exactly."""
    values = torch.cat(
        [torch.linspace(-120, 120, 4801), torch.logspace(-30, 30, 199), -torch.logspace(-30, 30, 199)]
    )
    values = values.to(dtype).float()
    x = torch.zeros(1, len(values), 1, 1, dtype=dtype)
    with use_backends("cpp"):
        result = group_norm_silu(x, torch.ones(len(values)), values, groups=len(values)).flatten().double()
    exact = torch.nn.functional.silu(values.double())
    # A relative error of two units in the last place, down to exp(-87).
    assert ((result - exact).abs() <= 2 * torch.finfo(dtype).eps * exact.abs() + 1e-35).all()


def test_nothing_outside_the_tensors_is_read_or_written(isa: str) -> None:
    rng = random.Random(5)
    for dtype in DTYPES:
        for _ in range(30):
            case = draw(rng, dtype)
            rows, channels, height, width = case["x"].shape
            numbers, pad = case["x"].numel(), 67
            guarded = torch.full((numbers + 2 * pad,), float("nan"), dtype=dtype)
            guarded[pad:-pad] = case["x"].permute(0, 2, 3, 1).flatten()
            result = torch.full((numbers + 2 * pad,), 12345.0, dtype=dtype)
            parameters = torch.full((3 * pad + 2 * channels,), float("nan"))
            weight, bias = parameters[pad : pad + channels], parameters[-pad - channels : -pad]
            weight.fill_(1.0), bias.fill_(0.0)
            where = isa, result[pad:].data_ptr(), guarded[pad:].data_ptr(), cpp.TYPES[dtype]
            affine = weight.data_ptr(), bias.data_ptr(), "float32"
            sizes = rows, height * width, channels
            cpp._C.group_norm_silu(*where, *sizes, *affine, None, case["groups"], 1e-5, True, 0, 1)
            assert (result[:pad] == 12345.0).all() and (result[-pad:] == 12345.0).all()
            assert result[pad:-pad].isfinite().all() and not (result[pad:-pad] == 12345.0).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_reach_what_they_reach_in_pytorch(isa: str, dtype: torch.dtype, bad: float) -> None:
    rng = random.Random(7)
    for _ in range(10):
        case = draw(rng, dtype)
        x = case["x"]
        x[
            rng.randrange(x.shape[0]),
            rng.randrange(x.shape[1]),
            rng.randrange(x.shape[2]),
            rng.randrange(x.shape[3]),
        ] = bad
        assert torch.equal(run(case).isnan(), plain(case).isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(11)
    for _ in range(20):
        case = draw(rng, dtype)
        alone = run(case)
        for threads in (2, 5):
            with monkeypatch.context() as patch:
                patch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
                assert torch.equal(run(case), alone)


def test_refused_calls_fall_back_or_say_why() -> None:
    x = torch.randn(2, 8, 6, 5).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(8), torch.randn(8)
    refused = {
        "not contiguous in channels-last": (x.contiguous(), weight, bias, 4),
        "sliced channels": (x[:, ::2], weight[:4], bias[:4], 2),
        "expanded rows": (x[:1].expand(3, -1, -1, -1), weight, bias, 4),
        "half": (x.half(), weight.half(), bias.half(), 4),
        "strided weight": (x, torch.randn(16)[::2], bias, 4),
        "moments in float64": (x, weight, bias, 4, 1e-5, True, None, torch.ones(2, 2, 8).double()),
        "strided row bias": (x, weight, bias, 4, 1e-5, True, torch.randn(2, 16)[:, ::2]),
    }
    for why, arguments in refused.items():
        with use_backends("cpp"), pytest.raises(BackendUnavailable, match="group_norm_silu: cpp: "):
            group_norm_silu(*arguments)
        with use_backends(("cpp", "reference")):
            assert torch.equal(group_norm_silu(*arguments), group_norm_silu.reference(*arguments)), why


def test_the_op_is_sound_for_torch_compile() -> None:
    x = torch.randn(2, 8, 5, 3).to(memory_format=torch.channels_last)
    arguments = x, torch.randn(8), torch.randn(8), 4, 1e-6, True, torch.randn(2, 8)
    kernel = torch.ops.fastldm.cpp_group_norm_silu.default
    torch.library.opcheck(kernel, arguments)
    compiled = torch.compile(lambda *given: kernel(*given) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), kernel(*arguments) + 1)
    torch.library.opcheck(torch.ops.fastldm.cpp_channel_moments.default, (x,))


def test_refused_moments_fall_back_or_say_why() -> None:
    x = torch.randn(2, 8, 6, 5)
    for call in (x, x[:, :, ::2], x.half().to(memory_format=torch.channels_last)):
        with use_backends("cpp"), pytest.raises(BackendUnavailable, match="channel_moments: cpp: "):
            channel_moments(call)
        with use_backends(("cpp", "reference")):
            assert torch.equal(channel_moments(call), channel_moments.reference(call))


def test_wrong_sizes_are_refused_before_memory_is_touched() -> None:
    with pytest.raises(ValueError, match="multiple of groups"):
        cpp._C.group_norm_silu("plain", 0, 0, "float32", 1, 1, 5, 0, 0, "float32", None, 2, 1e-5, True, 0, 1)
    with pytest.raises(ValueError, match="instruction set sse9"):
        cpp._C.group_norm_silu("sse9", 0, 0, "float32", 1, 1, 1, 0, 0, "float32", None, 1, 1e-5, True, 0, 1)
