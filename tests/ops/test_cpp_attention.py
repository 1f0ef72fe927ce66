"""ops.attention on the C++ backend, on every instruction set that runs here, and with products in pairs."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fastldm.errors import BackendUnavailable
from fastldm.ops import attention, use_backends

cpp = pytest.importorskip("fastldm.ops.cpp", exc_type=BackendUnavailable)

DTYPES = [torch.float32, torch.bfloat16]
# Each set as it is; and with bfloat16 in pairs, as AVX-512 BF16 multiplies it, which the others imitate.
KINDS = [(isa, isa in cpp.attention.PAIRS) for isa in cpp._C.isas()]
KINDS += [(isa, True) for isa, pairs in KINDS if not pairs]
Case = dict[str, Any]


def choose(monkeypatch: pytest.MonkeyPatch, isa: str, pairs: bool) -> None:
    monkeypatch.setattr(cpp.extension, "ISA", isa)
    monkeypatch.setattr(cpp.attention, "PAIRS", (isa,) if pairs else ())


@pytest.fixture(params=KINDS, ids=lambda kind: kind[0] + "-pairs" * kind[1])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, bool]:
    choose(monkeypatch, *request.param)
    return request.param


def draw(rng: random.Random, dtype: torch.dtype, **fixed: Any) -> Case:
    """Views of tokens, with gaps or without; few and many keys, lengths a row, small and large scores."""
    rows, heads = rng.choice([1, 2, 2, 3, 17]), rng.randint(1, 3)
    head_dim = rng.choice([8, 24, 32, 40, 64, 80, 96, 128, 160, 512] if rows < 17 else [16, 32, 40])
    queries, keys = rng.randint(1, 60), rng.choice([1, 7, 32, 77, rng.randint(1, 150)])
    if rng.random() < 0.1:
        queries, keys = rng.randint(60, 240), rng.randint(150, 300)
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    layout = rng.choice(["tokens", "tokens", "joined", "heads"])

    def normal(tokens: int) -> Tensor:
        if layout == "heads":
            return torch.randn(rows, heads, tokens, head_dim, generator=generator).to(dtype)
        width = heads * head_dim
        made = torch.randn(rows, tokens, width + (13 if layout == "joined" else 0), generator=generator)
        return made.to(dtype)[..., -width:].unflatten(-1, (heads, head_dim)).transpose(1, 2)

    case: Case = {
        "q": normal(queries) * rng.choice([0.1, 1.0, 1.0, 4.0]),
        "k": normal(keys),
        "v": normal(keys),
    }
    case["key_lengths"] = (
        torch.randint(1, keys + 3, (rows,), generator=generator) if rng.random() < 0.3 else None
    )
    case["causal"] = rng.random() < 0.3
    return case | fixed


def truth(case: Case) -> Tensor:
    return attention.reference(**case | {name: case[name].double() for name in "qkv"})


def amplification(case: Case) -> float:
    """1 + the largest score: its rounding is a relative error of a weight."""
    scores = case["q"].double() @ case["k"].double().mT / case["q"].shape[-1] ** 0.5
    return 1 + scores.abs().max().item()


def run(case: Case) -> Tensor:
    with use_backends("cpp"):
        return attention(**case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_errors_stay_within_those_of_pytorch(
    dtype: torch.dtype, error_rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, kinds = random.Random(f"{dtype}"), [kind for kind in KINDS if dtype == torch.bfloat16 or not kind[1]]
    rules = {kind: error_rule() for kind in kinds}
    for index in range(200):
        case = draw(rng, dtype)
        torchs, exact = attention.reference(**case), truth(case)
        torchs = torchs.transpose(1, 2).contiguous().transpose(1, 2)  # a layout that varies with its path
        slack = amplification(case) if dtype == torch.float32 else 1.0
        for kind, rule in rules.items():
            choose(monkeypatch, *kind)
            rule.add(run(case), torchs, exact, slack, (kind, index, case["q"].shape, case["k"].shape))
    for rule in rules.values():
        rule.close(at_least=200)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_neither_overflow_nor_vanish(kind: tuple[str, bool], dtype: torch.dtype) -> None:
    """Scores in the thousands, of both signs, highest in another block of keys for each query."""
    case = draw(random.Random(3), dtype, key_lengths=None, causal=False)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, tokens, 40, generator=generator).to(dtype) for tokens in (50, 300, 300))
    for sign in (1, -1):  # all scores of query 0 far below 0, or far above
        q[:, :, 0] = 40.0
        k[..., 0] = sign * 100.0
        case |= {"q": q * 30, "k": k, "v": v}
        error = (run(case).double() - truth(case)).abs().max().item()
        assert error <= 4 * torch.finfo(dtype).eps * 4 + 1e-7 * amplification(case)


def test_nothing_outside_the_tensors_is_read_or_written(kind: tuple[str, bool]) -> None:
    """NaN between the heads, the tokens and the rows, and in keys and values that no query may see."""
    rng = random.Random(5)
    for dtype in DTYPES * 15:
        case = draw(rng, dtype, causal=False)
        rows, heads, queries, head_dim = case["q"].shape
        keys = case["k"].shape[2]
        for name in "qkv":
            tensor = case[name]
            guarded = torch.full(
                (rows + 2, tensor.shape[2] + 2, heads + 2, head_dim + 11), float("nan"), dtype=dtype
            )
            inner = guarded[1:-1, 1:-1, 1:-1, 3 : 3 + head_dim].transpose(1, 2)
            case[name] = inner.copy_(tensor)
        if case["key_lengths"] is not None:
            for row, length in enumerate(case["key_lengths"].tolist()):
                case["k"][row, :, length:], case["v"][row, :, length:] = float("nan"), float("nan")
        result = torch.full((rows + 2, queries + 2, heads + 2, head_dim + 9), 12345.0, dtype=dtype)
        inner = result[1:-1, 1:-1, 1:-1, 5 : 5 + head_dim].transpose(1, 2)
        strides = [cpp.attention._strides(x) for x in (inner, case["q"], case["k"], case["v"])]
        lengths = 0 if case["key_lengths"] is None else case["key_lengths"].data_ptr()
        sizes = rows, heads, queries, keys, head_dim
        cpp._C.attention(kind[0], *strides, cpp.TYPES[dtype], *sizes, lengths, False, kind[1], 1)
        assert inner.isfinite().all() and not (inner == 12345.0).any()
        assert torch.equal(inner, run(case))
        inner.fill_(12345.0)
        assert (result == 12345.0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_reach_what_they_reach_in_pytorch(
    kind: tuple[str, bool], dtype: torch.dtype, bad: float
) -> None:
    """As in its softmax: scaled_dot_product_attention makes zeros of some rows of NaN, by their place."""
    rng = random.Random(7)
    for name in "qkv" * 4:
        case = draw(rng, dtype, key_lengths=None, causal=False)
        case["q"] *= 0.1  # no weight vanishes: 0 times infinity is NaN
        case[name][tuple(rng.randrange(size) for size in case[name].shape)] = bad
        q, k, v = (case[each].float() for each in "qkv")
        ours, plain = run(case), torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v
        assert torch.equal(ours.isnan(), plain.isnan())
        assert torch.equal(ours.isposinf(), plain.isposinf()) and torch.equal(
            ours.isneginf(), plain.isneginf()
        )


def test_any_nan_stays_nan(kind: tuple[str, bool]) -> None:
    """Also one whose lower bits are set, which integer arithmetic on exponents could make a number."""
    case = draw(random.Random(8), torch.float32, key_lengths=None, causal=False)
    case["q"][0, 0, 0, 0] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    assert run(case)[0, 0, 0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neither_threads_nor_other_rows_change_a_bit(
    kind: tuple[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(11)
    for _ in range(15):
        case = draw(rng, dtype)
        alone = run(case)
        for threads in (2, 5):
            with monkeypatch.context() as patch:
                patch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
                assert torch.equal(run(case), alone)
        row = rng.randrange(len(alone))
        single = {
            name: value[row : row + 1] if isinstance(value, Tensor) else value for name, value in case.items()
        }
        assert torch.equal(run(single), alone[row : row + 1])


def test_lengths_are_those_of_the_reference(kind: tuple[str, bool]) -> None:
    """More than there are keys: all of them. None at all: zero."""
    case = draw(random.Random(12), torch.float32, causal=False)
    rows, keys = case["k"].shape[0], case["k"].shape[2]
    for length in (-1, 0, 1, keys, keys + 9):
        case["key_lengths"] = torch.full((rows,), length)
        torch.testing.assert_close(run(case), attention.reference(**case), rtol=1e-4, atol=1e-5)


def test_the_heads_merge_without_a_copy() -> None:
    case = draw(random.Random(13), torch.float32)
    result = run(case)
    assert result.transpose(1, 2).flatten(2).data_ptr() == result.data_ptr()


def test_refused_calls_fall_back_or_say_why() -> None:
    x, lengths = torch.randn(2, 3, 6, 16), torch.tensor([4, 6])
    empty, deep = torch.empty(2, 3, 0, 16), torch.randn(1, 1, 2, 520)
    refused = {
        "not on the CPU": (x.to("meta"), x.to("meta"), x.to("meta")),
        "not all float32": (x.half(), x.half(), x.half()),
        "or all bfloat16": (x, x.bfloat16(), x.bfloat16()),
        "with numbers in them": (empty, x, x),
        "heads, tokens, head dim": (x[0], x[0], x[0]),
        "differ in rows": (x, x[:1], x[:1]),
        "k and v in tokens": (x, x, x[:, :, :5]),
        "head dim 12 is not": (x[..., :12], x[..., :12], x[..., :12]),
        "head dim 520 is not": (deep, deep, deep),
        "not neighbours in memory": (x[..., ::2], x[..., :8], x[..., :8]),
        r"not contiguous int64 \[rows\]": (x, x, x, lengths.int()),
        "key_lengths are": (x, x, x, lengths.repeat_interleave(2)[::2]),
        "key_lengths are not": (x, x, x, lengths[:1]),
        "autograd records": (x.clone().requires_grad_(), x, x),
    }
    for why, arguments in refused.items():
        with use_backends("cpp"), pytest.raises(BackendUnavailable, match=f"attention: cpp: .*{why}"):
            attention(*arguments)
    for why in ("not all float32", "differ in rows", "head dim 12 is not", "not neighbours in memory"):
        with use_backends(("cpp", "reference")):
            assert torch.equal(attention(*refused[why]), attention.reference(*refused[why])), why


def test_gradients_are_those_of_the_reference() -> None:
    def gradients(op: Any) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        q, k, v = (torch.randn(1, 2, 5, 8, generator=generator).requires_grad_() for _ in range(3))
        return list(torch.autograd.grad(op(q, k, v).square().sum(), (q, k, v)))

    with use_backends(("cpp", "reference")):
        ours = gradients(attention)
    assert all(map(torch.equal, ours, gradients(attention.reference)))


def test_the_op_is_sound_for_torch_compile() -> None:
    x = torch.randn(2, 80, 3, 16).transpose(1, 2)
    kernel = torch.ops.fastldm.cpp_attention.default
    for arguments in (
        (x, x, x),
        (x, x[:, :, :77], x[:, :, :77], torch.tensor([2, 70])),
        (x, x, x, None, True),
    ):
        torch.library.opcheck(kernel, arguments)
        with use_backends("cpp"):
            compiled = torch.compile(
                lambda *given: attention(*given) + 1, fullgraph=True, backend="aot_eager"
            )
            assert torch.equal(compiled(*arguments), kernel(*arguments) + 1)


def test_wrong_sizes_are_refused_before_memory_is_touched() -> None:
    nowhere = [(0, 0, 0, 0)] * 4
    with pytest.raises(ValueError, match="multiple of 8, at most 512"):
        cpp._C.attention("plain", *nowhere, "float32", 1, 1, 1, 1, 12, 0, False, False, 1)
    with pytest.raises(ValueError, match="keys are positive"):
        cpp._C.attention("plain", *nowhere, "float32", 1, 1, 1, 0, 8, 0, False, False, 1)
    with pytest.raises(ValueError, match="a dtype is"):
        cpp._C.attention("plain", *nowhere, "float16", 1, 1, 1, 1, 8, 0, False, False, 1)
