"""ops.guided_step on the Triton backend, interpreted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastldm.errors import BackendUnavailable
from fastldm.kernels.guided_step import BLOCKS
from fastldm.ops import guided_step, use_backends
from fastldm.ops.sampling import CLAMP, GUIDANCE, NEXT_X

DTYPES = [torch.float32, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
MUTATED = "latents", "x0", "model_input"
Case = dict[str, Any]


def make(
    dtype: torch.dtype,
    slots: int = 3,
    channels: int = 4,
    side: tuple[int, int] = (5, 7),
    guided: bool = True,
    copies: int = 2,
    noisy: bool = True,
    tables: bool = True,
    clamped: bool = True,
    layouts: tuple[torch.memory_format, ...] = (torch.contiguous_format,) * 5,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    layout = iter(layouts)

    def normal(rows: int, kind: torch.dtype) -> Tensor:
        made = torch.randn(rows, channels, *side, generator=generator).to(kind)
        return made.to(memory_format=next(layout))

    table = torch.randn(slots if tables else 1, 6, 9, generator=generator)
    table[..., GUIDANCE] *= 7.5
    table[..., CLAMP] = table[..., CLAMP].abs() if clamped else float("inf")
    return {
        "latents": normal(slots, torch.float32),
        "x0": normal(slots, torch.float32),
        "model_input": torch.full_like(normal(copies * slots, dtype), float("nan")),
        "out": normal((1 + guided) * slots, dtype),
        "noise": normal(slots, torch.float32) if noisy else None,
        "table": table,
        "step": torch.randint(6, (slots,), generator=generator),
    }


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    """1 to 6 slots, odd sizes up to three blocks, one table for all or one a slot, layouts alike or mixed."""
    layout = st.sampled_from(LAYOUTS)
    layouts = draw(st.one_of(layout.map(lambda one: (one,) * 5), st.tuples(*[layout] * 5)))
    return make(
        dtype,
        slots=draw(st.integers(1, 6)),
        channels=draw(st.sampled_from([1, 3, 4, 16])),
        side=draw(st.one_of(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.just((17, 19)))),
        guided=draw(st.booleans()),
        copies=draw(st.integers(1, 2)),
        noisy=draw(st.booleans()),
        tables=draw(st.booleans()),
        clamped=draw(st.booleans()),
        layouts=layouts,
        seed=draw(st.integers(0, 2**32)),
    )


def run(**case: Any) -> None:
    with use_backends("triton"):
        guided_step(**case)


def outcome(op: Any, case: Case) -> list[Tensor]:
    """What the call leaves in latents, x0 and model_input; it must change nothing else."""
    given_ = copy.deepcopy(case)
    op(**given_)
    for name in ("out", "noise", "table", "step"):
        assert given_[name] is None or torch.equal(given_[name].nan_to_num(), case[name].nan_to_num()), name
    return [given_[name] for name in MUTATED]


def exact(case: Case, magnitude: bool = False) -> list[Tensor]:
    """The formula in float64, slot by slot; or with `magnitude` the sum of its terms' magnitudes."""
    wide = {name: value.double() for name, value in case.items() if value is not None and name != "step"}
    if magnitude:
        wide = {name: value.abs() for name, value in wide.items()}
    x, before, copies = wide["latents"], wide["x0"], len(case["model_input"]) // len(case["latents"])
    nexts, cleans = [], []
    for slot in range(len(x)):
        row = wide["table"][slot % len(wide["table"]), case["step"][slot]]
        _, x0_x, x0_out, next_x, next_x0, next_prev, scale, guidance, clamp = row
        predicted = wide["out"][slot]
        if len(wide["out"]) > len(x):
            rest = 1 + guidance if magnitude else 1 - guidance
            predicted = rest * predicted + guidance * wide["out"][len(x) + slot]
        clean = (x0_x * x[slot] + x0_out * predicted).clamp(-clamp, clamp)
        noise = wide["noise"][slot] if "noise" in wide else torch.zeros_like(clean)
        nexts.append(next_x * x[slot] + next_x0 * clean + next_prev * before[slot] + scale * noise)
        cleans.append(clean)
    return [torch.stack(nexts), torch.stack(cleans), torch.stack(nexts).repeat(copies, 1, 1, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_errors_stay_within_those_of_pytorch(dtype: torch.dtype, error_rule: Any, shapes: int) -> None:
    rule = error_rule()

    @settings(max_examples=shapes)
    @given(cases(dtype))
    def check(case: Case) -> None:
        results = outcome(run, case), outcome(guided_step.reference, case), exact(case), exact(case, True)
        for name, ours, plain, truth, scale in zip(MUTATED, *results, strict=True):
            slack = max(1.0, (scale.max() / truth.abs().max()).item())
            rule.add(ours, plain, truth, slack, (name, tuple(case["out"].shape)))

    check()
    rule.close(at_least=2 * shapes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_the_tensors_is_written(dtype: torch.dtype, guarded: Any) -> None:
    for side in ((1, 1), (5, 7), (13, 11)):
        case, guard = make(dtype, side=side), guarded()
        wanted = outcome(run, case)
        case |= {name: guard.cut(case[name]) for name in MUTATED}
        run(**case)
        guard.check()
        assert all(torch.equal(case[name], value) for name, value in zip(MUTATED, wanted, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_inf_reach_what_they_reach_in_pytorch(bad: float) -> None:
    for name in ("latents", "x0", "out", "noise"):
        case = make(torch.float32, clamped=name != "out")
        case[name][1, 2, 3, 4] = bad
        for ours, plain in zip(outcome(run, case), outcome(guided_step.reference, case), strict=True):
            assert torch.equal(ours.isnan(), plain.isnan()) and torch.equal(ours.isinf(), plain.isinf())


def test_a_step_outside_the_table_gives_nan_in_its_slot_alone() -> None:
    for wrong in (-1, 6, 2**40):
        case = make(torch.float32)
        wanted = outcome(run, case)
        case["step"][1] = wrong
        for result, right in zip(outcome(run, case), wanted, strict=True):
            lost = torch.arange(len(result)) % 3 == 1
            assert result[lost].isnan().all() and torch.equal(result[~lost], right[~lost])


def test_the_idle_row_changes_no_latent() -> None:
    case = make(torch.float16)
    case["table"][:, -1] = 0
    case["table"][:, -1, NEXT_X], case["table"][:, -1, CLAMP] = 1, float("inf")
    case["step"][:] = case["table"].shape[1] - 1
    latents, _, model_input = outcome(run, case)
    assert torch.equal(latents, case["latents"])
    assert torch.equal(model_input, case["latents"].half().repeat(2, 1, 1, 1))


def test_neither_layout_nor_slots_change_a_bit() -> None:
    case = make(torch.float16, side=(13, 11))
    assert case["latents"][0].numel() > BLOCKS.elements
    alone = outcome(run, case)
    for count in range(5):
        layouts = (torch.channels_last,) * count + (torch.contiguous_format,) * (5 - count)
        relaid = make(torch.float16, side=(13, 11), layouts=layouts)
        assert all(map(torch.equal, outcome(run, relaid), alone))
    single = {name: value[1::3].contiguous() for name, value in case.items()}
    for one, together in zip(outcome(run, single), alone, strict=True):
        assert torch.equal(one, together[1::3])


def test_refused_calls_fall_back_or_say_why() -> None:
    case = make(torch.float32)
    shape = case["latents"].shape
    refused = {
        "neither contiguous": {"latents": torch.randn(*shape[:3], 2 * shape[3])[..., ::2]},
        "not alike in": {
            "out": case["out"].bfloat16(),
            "model_input": case["model_input"].bfloat16(),
        },
        r"table is not float32 \[B or 1": {"table": case["table"].double()},
        "or it or table is not contiguous": {"step": case["step"].repeat_interleave(2)[::2]},
        "not the shape": {"noise": case["noise"][..., :1].contiguous()},
        r"not \[B or 2B": {"out": case["out"].repeat(2, 1, 1, 1)},
        "latents are not": {name: torch.empty(0, *shape[1:]) for name in ("latents", "x0", "noise")},
        "several devices": {"out": case["out"].to("meta")},
        "autograd": {"out": case["out"].clone().requires_grad_()},
    }
    for why, change in refused.items():
        with pytest.raises(BackendUnavailable, match=f"guided_step: triton: .*{why}"):
            run(**case | change)

    def fallback(**given_: Any) -> None:
        with use_backends(("triton", "reference")):
            guided_step(**given_)

    changed = case | refused["neither contiguous"]
    assert all(map(torch.equal, outcome(fallback, changed), outcome(guided_step.reference, changed)))


def test_the_op_is_sound_for_torch_compile() -> None:
    case = make(torch.float32, slots=1)
    kernel = torch.ops.fastldm.triton_guided_step.default
    torch.library.opcheck(kernel, tuple(case.values()))
    compiled = torch.compile(lambda **given_: guided_step(**given_), fullgraph=True, backend="aot_eager")
    with use_backends("triton"):
        results = outcome(compiled, case)
    assert all(map(torch.equal, results, outcome(run, case)))
