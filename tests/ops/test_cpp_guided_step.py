"""ops.guided_step on the C++ backend, on every instruction set that runs here."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fastldm.errors import BackendUnavailable
from fastldm.ops import guided_step, use_backends
from fastldm.ops.sampling import CLAMP, GUIDANCE, NEXT_X

cpp = pytest.importorskip("fastldm.ops.cpp", exc_type=BackendUnavailable)

ISAS = cpp._C.isas()
DTYPES = [torch.float32, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
MUTATED = "latents", "x0", "model_input"
Case = dict[str, Any]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpp.extension, "ISA", request.param)
    return request.param


def draw(rng: random.Random, dtype: torch.dtype) -> Case:
    """A call with 1 to 17 slots, odd sizes, one table for all or one a slot, one memory layout or a mix."""
    slots, channels = rng.randint(1, 17), rng.choice([1, 3, 4, 16])
    height, width = (rng.randint(1, 17), rng.randint(1, 17)) if rng.random() < 0.95 else (65, 67)
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    layouts = LAYOUTS if rng.random() < 0.5 else [rng.choice(LAYOUTS)]

    def normal(rows: int, kind: torch.dtype) -> Tensor:
        made = torch.randn(rows, channels, height, width, generator=generator).to(kind)
        return made.to(memory_format=rng.choice(layouts))

    guided, copies, rows = rng.random() < 0.7, rng.choice([1, 2]), rng.randint(1, 30)
    table = torch.randn(rng.choice([1, slots]), rows, 9, generator=generator)
    table[..., GUIDANCE] *= 7.5
    table[..., CLAMP] = table[..., CLAMP].abs() if rng.random() < 0.5 else float("inf")
    return {
        "latents": normal(slots, torch.float32),
        "x0": normal(slots, torch.float32),
        "model_input": torch.full_like(normal(copies * slots, dtype), float("nan")),
        "out": normal((1 + guided) * slots, dtype),
        "noise": normal(slots, torch.float32) if rng.random() < 0.5 else None,
        "table": table,
        "step": torch.randint(rows, (slots,), generator=generator),
    }


def outcome(op: Any, case: Case) -> list[Tensor]:
    """What the call leaves in latents, x0 and model_input; it must change nothing else."""
    given = copy.deepcopy(case)  # unlike clone, keeps strides with gaps
    op(**given)
    for name in ("out", "noise", "table", "step"):
        unchanged = given[name] is None or torch.allclose(
            given[name], case[name], rtol=0, atol=0, equal_nan=True
        )
        assert unchanged, f"{name} was changed"
    return [given[name] for name in MUTATED]


def doubled(case: Case) -> Case:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.items()
    }


def magnitudes(case: Case) -> Case:
    """The call whose results are sums of the terms' magnitudes: the scale of the rounding in `case`."""
    return {
        name: value.abs() if isinstance(value, Tensor) else value for name, value in doubled(case).items()
    }


def exact(
    latents: Tensor, x0: Tensor, model_input: Tensor, out: Tensor, noise: Any, table: Tensor, step: Tensor
) -> None:
    """The formula slot by slot, on the float64 tensors it is given: an independent transcription."""
    slots = len(latents)
    for slot in range(slots):
        _, x0_x, x0_out, next_x, next_x0, next_prev, noise_scale, guidance, clamp = table[
            slot % len(table), step[slot]
        ]
        predicted = out[slot]
        if len(out) == 2 * slots:
            predicted = (1 - guidance) * out[slot] + guidance * out[slots + slot]
        clean = (x0_x * latents[slot] + x0_out * predicted).clamp(-clamp, clamp)
        following = next_x * latents[slot] + next_x0 * clean + next_prev * x0[slot]
        if noise is not None:
            following = following + noise_scale * noise[slot]
        latents[slot], x0[slot] = following, clean
        for half in range(len(model_input) // slots):
            model_input[half * slots + slot] = following


def run(**case: Any) -> None:
    with use_backends("cpp"):
        guided_step(**case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_stay_within_those_of_pytorch(
    dtype: torch.dtype, error_rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, rules = random.Random(f"{dtype}"), {isa: error_rule() for isa in ISAS}
    for index in range(200):
        case = draw(rng, dtype)
        plain, truth = outcome(guided_step.reference, case), outcome(exact, doubled(case))
        scale = outcome(exact, magnitudes(case))
        for isa, rule in rules.items():
            monkeypatch.setattr(cpp.extension, "ISA", isa)
            for name, *ours in zip(MUTATED, outcome(run, case), plain, truth, scale, strict=True):
                slack = max(1.0, (ours[3].max() / ours[2].abs().max()).item())
                rule.add(*ours[:3], slack, (isa, index, name, tuple(case["out"].shape)))
    for rule in rules.values():
        rule.close(at_least=600)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_reach_what_they_reach_in_pytorch(isa: str, dtype: torch.dtype) -> None:
    rng = random.Random(2)
    for _ in range(40):
        case = draw(rng, dtype)
        for name in ("latents", "x0", "out", "noise"):
            if case[name] is not None:
                place = tuple(rng.randrange(size) for size in case[name].shape)
                case[name][place] = rng.choice([float("nan"), float("inf"), -float("inf")])
        for ours, plain in zip(outcome(run, case), outcome(guided_step.reference, case), strict=True):
            assert torch.equal(ours.isnan(), plain.isnan())
            assert torch.equal(ours.isposinf(), plain.isposinf()) and torch.equal(
                ours.isneginf(), plain.isneginf()
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_idle_row_changes_no_latent(isa: str, dtype: torch.dtype) -> None:
    """A finished slot stands on a row with next_x = 1 and nothing else while others go on."""
    rng = random.Random(3)
    case = draw(rng, dtype)
    case["table"][:, -1] = 0
    case["table"][:, -1, NEXT_X], case["table"][:, -1, CLAMP] = 1, float("inf")
    case["step"][:] = case["table"].shape[1] - 1
    latents, _, model_input = outcome(run, case)
    assert torch.equal(latents, case["latents"])
    assert torch.equal(model_input[: len(latents)], case["latents"].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neither_threads_nor_layout_nor_slots_change_a_bit(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(4)
    for _ in range(20):
        case = draw(rng, dtype)
        alone = outcome(run, case)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda: 2)
            assert all(map(torch.equal, outcome(run, case), alone))
        for layout in LAYOUTS:
            images = (name for name, value in case.items() if value is not None and value.dim() == 4)
            relaid = case | {name: case[name].clone(memory_format=layout) for name in images}
            assert all(map(torch.equal, outcome(run, relaid), alone))
        slots, slot = len(case["latents"]), rng.randrange(len(case["latents"]))
        single = {
            name: value if value is None else value[slot::slots].clone() for name, value in case.items()
        }
        single["table"] = case["table"][slot % len(case["table"])][None]
        assert all(
            torch.equal(one, all_[slot::slots]) for one, all_ in zip(outcome(run, single), alone, strict=True)
        )


def test_nothing_outside_the_tensors_is_written(isa: str) -> None:
    rng = random.Random(5)
    for dtype in DTYPES * 20:
        case = draw(rng, dtype)
        guards = {}
        for name in MUTATED:
            value = case[name]
            guards[name] = torch.full((value.numel() + 134,), 77.0, dtype=value.dtype)
            case[name] = guards[name][67:-67].as_strided(value.shape, value.stride(), 67).copy_(value)
        run(**case)
        for guard in guards.values():
            assert (guard[:67] == 77.0).all() and (guard[-67:] == 77.0).all()
        assert not case["model_input"].isnan().any()


def test_a_step_outside_the_table_is_refused_before_anything_changes() -> None:
    for wrong in (-1, 30):
        case = draw(random.Random(6), torch.float32)
        case["step"][-1] = wrong
        before = {name: case[name].clone() for name in ("latents", "x0")}
        with pytest.raises(IndexError, match=f"step {wrong} of a sampler table"):
            run(**case)
        assert all(torch.equal(case[name], value) for name, value in before.items())


def test_refused_calls_fall_back_or_say_why() -> None:
    rng = random.Random(7)
    case = draw(rng, torch.float32)
    while case["noise"] is None or min(case["latents"].shape[1:]) < 2:
        case = draw(rng, torch.float32)
    shape = case["latents"].shape
    refused = {
        "strided latents": {"latents": torch.randn(*shape[:3], 2 * shape[3])[..., ::2]},
        "half": {"out": case["out"].half(), "model_input": case["model_input"].half()},
        "double table": {"table": case["table"].double()},
        "strided step": {"step": case["step"].repeat_interleave(2)[::2]},
    }
    for why, change in refused.items():
        with pytest.raises(BackendUnavailable, match="guided_step: cpp: "):
            run(**case | change)

        def fallback(**given: Any) -> None:
            with use_backends(("cpp", "reference")):
                guided_step(**given)

        changed = case | change
        assert all(map(torch.equal, outcome(fallback, changed), outcome(guided_step.reference, changed))), why


def test_the_op_is_sound_for_torch_compile() -> None:
    case = draw(random.Random(8), torch.bfloat16)
    kernel = torch.ops.fastldm.cpp_guided_step.default
    torch.library.opcheck(kernel, tuple(case.values()))
    compiled = torch.compile(lambda **given: kernel(**given), fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, outcome(compiled, case), outcome(run, case)))
