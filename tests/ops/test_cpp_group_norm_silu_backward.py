"""The gradients of ops.group_norm_silu on the C++ backend, on every instruction set that runs here."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.errors import BackendUnavailable
from fastldm.ops import group_norm_silu, use_backends

cpp = pytest.importorskip("fastldm.ops.cpp", exc_type=BackendUnavailable)

ISAS = cpp._C.isas()
DTYPES = [torch.float32, torch.bfloat16]
LEAVES = "x", "weight", "bias", "row_bias"
Case = dict[str, Any]
Gradients = dict[str, Tensor]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpp.extension, "ISA", request.param)
    return request.param


def draw(rng: random.Random, dtype: torch.dtype) -> tuple[Case, Tensor]:
    """A call and the gradient of its result: odd sizes, groups of one channel, channels that fill no vector,
    a large mean, maps of more than one block of pixels.
    """
    groups = rng.choice([1, 2, 3, 4, 5, 8, 16, 32])
    channels = groups * rng.choice([1, 1, 2, 3, 4, 5, 7, 10, 20] if groups < 16 else [1, 2, 3, 4])
    height, width = (
        (rng.randint(1, 12), rng.randint(1, 12)) if rng.random() < 0.9 else (rng.randint(15, 30), 17)
    )
    rows = rng.randint(1, 9) if height * width < 80 else rng.randint(1, 3)
    generator = torch.Generator().manual_seed(rng.getrandbits(40))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def image() -> Tensor:
        return normal(rows, channels, height, width).to(memory_format=torch.channels_last)

    mean = rng.choice([0.0, 0.0, 1.0, 30.0] if dtype == torch.bfloat16 else [0.0, 0.0, 1.0, 30.0, 3000.0])
    x = (image() + mean * normal(rows, channels, 1, 1).sign()) * rng.choice([0.1, 1.0, 8.0])
    affine = rng.choice([dtype, torch.float32])
    row_bias = rng.choice([None, normal(rows, channels), normal(rows, channels + 3)[:, :channels].to(dtype)])
    case = {
        "x": x.to(dtype),
        "weight": normal(channels).to(affine),
        "bias": normal(channels).to(affine),
        "groups": groups,
        "eps": rng.choice([1e-5, 1e-6]),
        "silu": rng.random() < 0.7,
        "row_bias": row_bias,
    }
    return case, image().to(dtype)


def gradients(op: Callable[..., Tensor], case: Case, grad: Tensor) -> Gradients:
    leaves = {k: case[k].detach().requires_grad_() for k in LEAVES if case[k] is not None}
    result = op(**(case | leaves))
    return dict(zip(leaves, torch.autograd.grad(result, list(leaves.values()), grad), strict=True))


def ours(case: Case, grad: Tensor) -> Gradients:
    with use_backends("cpp"):
        return gradients(group_norm_silu, case, grad)


def plain(case: Case, grad: Tensor) -> Gradients:
    """Those of the reference with the row bias in x's dtype, as a PyTorch model in that dtype has it."""

    def reference(x: Tensor, row_bias: Tensor | None, **rest: Any) -> Tensor:
        return group_norm_silu.reference(
            x, row_bias=None if row_bias is None else row_bias.to(x.dtype), **rest
        )

    return gradients(reference, case, grad)


def truth(case: Case, grad: Tensor) -> Gradients:
    double = {k: v.double() if isinstance(v, Tensor) else v for k, v in case.items()}
    return gradients(group_norm_silu.reference, double, grad.double())


def conditioning(case: Case, grad: Tensor, exact: Gradients) -> dict[str, float]:
    """How much each gradient amplifies rounding: 1 + |mean| / std of the worst group, and by how much the
    terms of its sums are larger than the sums.
    """
    x, grad, groups = case["x"].double(), grad.double(), case["groups"]
    if case["row_bias"] is not None:
        x = x + case["row_bias"].double()[:, :, None, None]
    grouped = x.reshape(len(x), groups, -1)
    rstd = (grouped.var(2, correction=0) + case["eps"]).rsqrt()
    shift = 1 + float((grouped.mean(2).abs() * rstd).max())
    hat = F.group_norm(x, groups, eps=case["eps"])
    weight, bias = (case[k].double()[:, None, None] for k in ("weight", "bias"))
    if case["silu"]:
        y = (hat * weight + bias).requires_grad_()
        (grad,) = torch.autograd.grad(F.silu(y), y, grad)
    inner = (grad * weight).abs() * rstd.repeat_interleave(x.shape[1] // groups, 1)[:, :, None, None]
    terms = {
        "x": inner,
        "weight": (grad * hat).abs().sum((0, 2, 3)),
        "bias": grad.abs().sum((0, 2, 3)),
        "row_bias": inner.sum((2, 3)),
    }
    return {
        k: shift * max(1.0, float(terms[k].max()) / max(float(v.abs().max()), 1e-300))
        for k, v in exact.items()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_errors_stay_within_those_of_pytorch(
    dtype: torch.dtype, error_rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(f"{dtype}")
    rules = {(isa, leaf): error_rule() for isa in ISAS for leaf in LEAVES}
    for index in range(200):
        case, grad = draw(rng, dtype)
        torchs, exact = plain(case, grad), truth(case, grad)
        slack = conditioning(case, grad, exact)
        for isa in ISAS:
            monkeypatch.setattr(cpp.extension, "ISA", isa)
            for leaf, made in ours(case, grad).items():
                label = (isa, leaf, index, tuple(case["x"].shape), case["groups"])
                rules[isa, leaf].add(made, torchs[leaf], exact[leaf], slack[leaf], label)
    for rule in rules.values():
        rule.close(at_least=100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_mean_costs_no_more_than_its_rounding(isa: str, dtype: torch.dtype) -> None:
    """Here sums of x itself, not of its deviations, would leave no digit of the gradients."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 24, 33, 29, generator=generator) + (1e4 if dtype == torch.float32 else 100.0)
    case, grad = draw(random.Random(1), dtype)
    case |= {
        "x": x.to(dtype).to(memory_format=torch.channels_last),
        "weight": torch.ones(24),
        "bias": torch.zeros(24),
        "groups": 3,
        "row_bias": None,
    }
    grad = torch.randn(x.shape, generator=generator).to(dtype)
    made, exact = ours(case, grad), truth(case, grad)
    for leaf, slack in conditioning(case, grad, exact).items():
        eps = torch.finfo(torch.float32).eps * slack + 4 * torch.finfo(made[leaf].dtype).eps
        if leaf != "x":  # silu' of bfloat16 is exact to 1e-4
            eps += 1e-4 if dtype == torch.bfloat16 else 0
        error = float((made[leaf].double() - exact[leaf]).abs().max())
        assert error <= eps * float(exact[leaf].abs().max()), leaf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_slope_of_silu_is_accurate_over_the_whole_range(isa: str, dtype: torch.dtype) -> None:
    """With one element a channel, the gradient of the bias is silu'(bias): every value is reached exactly."""
    values = torch.cat(
        [torch.linspace(-120, 120, 4801), *(s * torch.logspace(-30, 30, 199) for s in (1, -1))]
    )
    x = torch.zeros(1, len(values), 1, 1, dtype=dtype)
    case = {"x": x, "weight": torch.ones(len(values)), "bias": values, "groups": 1, "row_bias": None}
    made = ours(case, torch.ones_like(x))["bias"].double()
    wide = values.double()
    s = torch.sigmoid(wide)
    exact = s + wide * s * (1 - s).clamp_min(0) * (wide.abs() < 1e3)
    size = s + (exact - s).abs()  # of its two terms
    eps = 4 * torch.finfo(torch.float32).eps if dtype == torch.float32 else 3e-4
    assert ((made - exact).abs() <= eps * size + 1e-35).all()


def test_nothing_outside_the_tensors_is_read_or_written(isa: str) -> None:
    rng, pad = random.Random(5), 67

    def guarded(values: Tensor) -> Tensor:
        around = torch.full((values.numel() + 2 * pad,), float("nan"), dtype=values.dtype)
        around[pad:-pad] = values.flatten()
        return around

    for dtype in DTYPES:
        for _ in range(30):
            case, grad = draw(rng, dtype)
            rows, channels, height, width = case["x"].shape
            x, grad = (guarded(each.permute(0, 2, 3, 1)) for each in (case["x"], grad))
            moments, affine = torch.rand(rows, 2, channels), torch.rand(channels)
            read = [guarded(each) for each in (moments, affine, affine, moments[:, 0])]
            sizes = {"x": x.numel() - 2 * pad, "affine": 2 * channels, "rows": rows * channels}
            written = [
                torch.full((size + 2 * pad,), 12345.0, dtype=dtype if name == "x" else torch.float32)
                for name, size in sizes.items()
            ]
            cpp._C.group_norm_silu_backward(
                isa,
                *(each[pad:].data_ptr() for each in (*written, grad, x)),
                *(cpp.TYPES[dtype], rows, height * width, channels),
                *(each[pad:].data_ptr() for each in read),
                *(case["groups"], 1e-5, True, 1),
            )
            for each in written:
                assert (each[:pad] == 12345.0).all() and (each[-pad:] == 12345.0).all()
                assert each[pad:-pad].isfinite().all() and not (each[pad:-pad] == 12345.0).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("where", ["x", "grad"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_shows(isa: str, dtype: torch.dtype, where: str, bad: float) -> None:
    rng = random.Random(7)
    for _ in range(10):
        case, grad = draw(rng, dtype)
        into = case["x"] if where == "x" else grad
        into[tuple(rng.randrange(size) for size in into.shape)] = bad
        made, torchs = ours(case, grad), plain(case, grad)
        for leaf in made:
            assert torch.equal(made[leaf].isfinite(), torchs[leaf].isfinite()), leaf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(11)
    for _ in range(20):
        case, grad = draw(rng, dtype)
        alone = ours(case, grad)
        for threads in (2, 5):
            with monkeypatch.context() as patch:
                patch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
                made = ours(case, grad)
            assert all(torch.equal(made[leaf], alone[leaf]) for leaf in alone)


def test_gradients_of_any_layout_are_taken() -> None:
    rng = random.Random(13)
    for _ in range(10):
        case, grad = draw(rng, torch.float32)
        dense = ours(case, grad)
        for layout in (grad.contiguous(), torch.stack((grad, grad), -1)[..., 0]):
            assert all(map(torch.equal, ours(case, layout).values(), dense.values()))
        one = torch.ones((), dtype=grad.dtype)
        expanded, filled = ours(case, one.expand(grad.shape)), ours(case, torch.ones_like(grad))
        assert all(map(torch.equal, expanded.values(), filled.values()))


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    case, grad = draw(random.Random(17), torch.float32)
    case["row_bias"] = torch.randn(case["x"].shape[:2])
    everything = ours(case, grad)
    for leaf in LEAVES:
        given = case | {leaf: case[leaf].detach().requires_grad_()}
        with use_backends("cpp"):
            group_norm_silu(**given).backward(grad)
        assert torch.equal(given[leaf].grad, everything[leaf])
        assert all(case[other].grad is None for other in LEAVES)


def test_autocast_keeps_the_dtypes_and_less_memory_than_the_reference() -> None:
    """A convolution in bfloat16, a norm with float32 parameters, a bias a row from a product."""
    torch.manual_seed(19)
    conv = torch.nn.Conv2d(16, 16, 3, padding=1).to(memory_format=torch.channels_last)
    time, weight = torch.nn.Linear(4, 16), torch.randn(16, requires_grad=True)
    bias = torch.randn(16, requires_grad=True)
    images = torch.randn(4, 16, 12, 12).to(memory_format=torch.channels_last)
    leaves = [*conv.parameters(), *time.parameters(), weight, bias]

    def run(backends: str) -> tuple[Tensor, int, list[Tensor]]:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with use_backends(backends), torch.autocast("cpu", torch.bfloat16):
            x, rows = conv(images), time(images[:, :4, 0, 0])
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                result = group_norm_silu(x, weight, bias, 4, row_bias=rows)
        assert result.dtype == x.dtype == torch.bfloat16
        return result, sum(kept.values()), list(torch.autograd.grad(result.float().square().mean(), leaves))

    result, kept, made = run("cpp")
    expected, most, torchs = run("reference")
    assert kept < 0.6 * most  # x, but neither x + row_bias nor the norm before SiLU
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0.02)
    for ours, theirs in zip(made, torchs, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02


def test_a_gradient_of_the_gradient_is_refused() -> None:
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    with use_backends("cpp"):
        result = group_norm_silu(x, torch.ones(8), torch.zeros(8), 4)
    (grad,) = torch.autograd.grad(result.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_other_recorded_calls_go_to_the_reference() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 8, 4, 4, generator=generator)
    case = {"x": x, "weight": torch.randn(8), "bias": torch.randn(8), "groups": 4, "row_bias": None}
    grad = torch.randn(x.shape, generator=generator)
    with use_backends(("cpp", "reference")):
        made = gradients(group_norm_silu, case, grad)
    assert all(map(torch.equal, made.values(), plain(case, grad).values()))
    lying = x.to(memory_format=torch.channels_last).requires_grad_()
    with use_backends("cpp"), pytest.raises(BackendUnavailable, match="autograd records the call"):
        group_norm_silu(lying, case["weight"], case["bias"], 4, moments=torch.ones(2, 2, 8))


def test_the_ops_are_sound_for_torch_compile() -> None:
    case, grad = draw(random.Random(23), torch.float32)
    case["row_bias"] = torch.randn(case["x"].shape[:2])
    moments = torch.ops.fastldm.cpp_channel_moments.default(case["x"])
    rest = moments, case["groups"], 1e-5, True, case["row_bias"]
    kernel = torch.ops.fastldm.cpp_group_norm_silu_backward.default
    torch.library.opcheck(kernel, (grad, case["x"], case["weight"], case["bias"], *rest))
    with use_backends("cpp"):
        compiled = torch.compile(
            lambda **given: group_norm_silu(**given), fullgraph=True, backend="aot_eager"
        )
        made = gradients(compiled, case, grad)
    assert all(map(torch.equal, made.values(), ours(case, grad).values()))


def test_wrong_sizes_are_refused_before_memory_is_touched() -> None:
    for isa, groups, why in (("plain", 2, "multiple of groups"), ("sse9", 1, "instruction set sse9")):
        sizes = "float32", 1, 1, 5
        with pytest.raises(ValueError, match=why):
            cpp._C.group_norm_silu_backward(isa, *[0] * 5, *sizes, *[0] * 4, groups, 1e-5, True, 1)
