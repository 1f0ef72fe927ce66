"""ops.attention on the Triton backend, interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastldm.errors import BackendUnavailable
from fastldm.kernels.attention import ONE_TILE, PIECES, WIDE
from fastldm.ops import attention, use_backends

DTYPES = [torch.float32, torch.float16]
LAYOUTS = ["[rows, L, heads, d]", "[rows, heads, L, d]", "[rows, L, 3, heads, d]"]
Case = dict[str, Any]


def make(
    dtype: torch.dtype,
    rows: int = 2,
    heads: int = 2,
    queries: int = 35,
    keys: int = 140,
    head_dim: int = 40,
    lengths: tuple[int, ...] | None = None,
    causal: bool = False,
    layout: str = LAYOUTS[0],
    scale: float = 1.0,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(tokens: int, part: int) -> Tensor:
        made = (torch.randn(rows, tokens, 3, heads, head_dim, generator=generator) * scale).to(dtype)
        views = {
            LAYOUTS[0]: made[:, :, part].contiguous().transpose(1, 2),
            LAYOUTS[1]: made[:, :, part].transpose(1, 2).contiguous(),
            LAYOUTS[2]: made[:, :, part].transpose(1, 2),
        }
        return views[layout]

    return {
        "q": normal(queries, 0),
        "k": normal(keys, 1),
        "v": normal(keys, 2),
        "key_lengths": None if lengths is None else torch.tensor(lengths),
        "causal": causal,
    }


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    """Every head dim, one tile of keys or several, lengths from none to all, causal, strided heads."""
    rows, keys = draw(st.integers(1, 2)), draw(st.one_of(st.integers(1, 40), st.integers(100, 150)))
    head_dim = draw(st.sampled_from([*PIECES, WIDE]))
    return make(
        dtype,
        rows=rows,
        heads=draw(st.integers(1, 2)),
        queries=draw(st.integers(1, 40)),
        keys=min(keys, 40) if head_dim == WIDE else keys,
        head_dim=head_dim,
        lengths=draw(st.none() | st.tuples(*[st.integers(0, keys)] * rows)),
        causal=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        scale=draw(st.sampled_from([0.5, 1.0, 3.0])),
        seed=draw(st.integers(0, 2**32)),
    )


def run(case: Case) -> Tensor:
    with use_backends("triton"):
        return attention(**case)


def truth(case: Case) -> Tensor:
    return attention.reference(**{name: case[name].double() for name in "qkv"}, **options(case))


def token_major(result: Tensor) -> Tensor:
    """In the memory that the kernel promises, [rows, L, heads, d]; PyTorch's own depends on its inputs'."""
    return result.transpose(1, 2).contiguous().transpose(1, 2)


def options(case: Case) -> Case:
    return {name: case[name] for name in ("key_lengths", "causal")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_errors_stay_within_those_of_pytorch(dtype: torch.dtype, error_rule: Any, shapes: int) -> None:
    rule = error_rule()

    @settings(max_examples=shapes)
    @given(cases(dtype))
    def check(case: Case) -> None:
        # Rounding of a score s costs s · eps of its weight.
        slack = (
            1 + (case["q"].double() @ case["k"].double().mT).abs().max().item() / case["q"].shape[3] ** 0.5
        )
        label = tuple(case["q"].shape), case["k"].shape[2], options(case)
        rule.add(run(case), token_major(attention.reference(**case)), truth(case), slack, label)

    check()
    rule.close(at_least=shapes * 3 // 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [20, 140], ids=["one tile", "several tiles"])
def test_every_head_dim(dtype: torch.dtype, keys: int, error_rule: Any) -> None:
    rule = error_rule()
    assert keys > ONE_TILE or keys == 20
    for head_dim in PIECES:
        case = make(dtype, rows=1, queries=20, keys=keys, head_dim=head_dim)
        rule.add(run(case), token_major(attention.reference(**case)), truth(case), 4.0, head_dim)
    rule.close(at_least=len(PIECES))


@pytest.mark.parametrize("head_dim", [40, WIDE])
def test_keys_after_the_length_are_not_read(head_dim: int) -> None:
    """Whatever lies there, NaN too; a row without keys gives zeros, as in PyTorch."""
    case = make(torch.float32, keys=50, head_dim=head_dim, lengths=(17, 0))
    wanted = run(case)
    case["k"][0, :, 17:], case["v"][0, :, 17:] = float("nan"), float("inf")
    case["k"][1], case["v"][1] = float("nan"), float("nan")
    assert torch.equal(run(case), wanted)
    assert (wanted[1] == 0).all() and wanted[0].isfinite().all()


@pytest.mark.parametrize("keys", [20, 140], ids=["one tile", "several tiles"])
def test_nan_and_inf_reach_what_they_reach_in_pytorch(keys: int) -> None:
    for name, bad in (("q", float("nan")), ("k", float("nan")), ("v", float("nan")), ("v", float("inf"))):
        case = make(torch.float32, keys=keys)
        case[name][1, 1, 7, 3] = bad
        assert torch.equal(run(case).isfinite(), attention.reference(**case).isfinite()), (name, bad)


@pytest.mark.parametrize("head_dim", [40, WIDE])
def test_nothing_outside_the_tensors_is_read_or_written(
    head_dim: int, guarded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, guard = make(torch.float32, keys=20 if head_dim == WIDE else 140, head_dim=head_dim), guarded()
    wanted = run(case)
    guard.CANARY = float("nan")  # read, it would reach the result
    read = {name: guard.cut(case[name]) for name in "qkv"}
    guard.memory.clear()
    guard.CANARY = 77.0
    real = Tensor.new_empty

    def new_empty(self: Tensor, *shape: int, **named: Any) -> Tensor:
        made = real(self, *shape, **named)
        return made if named else guard.cut(made)  # the interpreter's own calls name a device

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    assert torch.equal(run(case | read), wanted)
    assert len(guard.memory) == 1
    guard.check()


def test_refused_calls_fall_back_or_say_why() -> None:
    case = make(torch.float32)
    q, k, v = (case[name] for name in "qkv")
    refused = {
        "not all of one type": {"q": q.half()},
        "not all of one type of": {name: case[name].bfloat16() for name in "qkv"},
        "the head dim is none of 32, 40": {name: case[name][..., :24] for name in "qkv"},
        "are not neighbours": {"q": q.transpose(2, 3).contiguous().transpose(2, 3)},
        "no multiple of 8": {"k": torch.randn(*k.shape[:3], 44)[..., :40]},
        r"not \[rows, heads, L or S, d\]": {"v": v[:, :1]},
        "is empty": {"q": q[:, :, :0]},
        r"not int32 or int64 \[rows\]": {"key_lengths": torch.tensor([1.0, 2.0])},
        "several devices": {"q": q.to("meta")},
        "autograd": {"q": q.clone().requires_grad_()},
    }
    for why, change in refused.items():
        with pytest.raises(BackendUnavailable, match=f"attention: triton: .*{why}"):
            run(case | change)
    changed = case | refused["are not neighbours"]
    with use_backends(("triton", "reference")):
        assert torch.equal(attention(**changed), attention.reference(**changed))


def test_the_op_is_sound_for_torch_compile() -> None:
    case = make(torch.float32, rows=1, heads=1, queries=5, keys=7, lengths=(3,))
    torch.library.opcheck(torch.ops.fastldm.triton_attention.default, tuple(case.values()))
    traced = torch.compile(lambda **named: attention(**named) + 1, fullgraph=True, backend="aot_eager")
    with use_backends("triton"):
        result = traced(**case)
    assert torch.equal(result, run(case) + 1)
