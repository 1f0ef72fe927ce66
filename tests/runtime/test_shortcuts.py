"""Shortcuts: what they leave out and nothing else, and what is left out by none of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastldm
from fastldm import Shortcuts, ops
from fastldm.models.unet import UNet, UNetCondition
from fastldm.pipeline import Pipeline
from fastldm.runtime import Batcher
from fastldm.runtime.segments import segments
from fastldm.runtime.slots import Group, Slots

LATENT: dict[str, Any] = {"prompt": "a red cat", "steps": 10, "seed": 1, "output_type": "latent"}
SOME = [
    Shortcuts((0.2, 0.7)),
    Shortcuts(whole_every=3),
    Shortcuts((0.0, 0.5), 2),
    Shortcuts((0.3, 1.0), 99),
    Shortcuts((0.41, 0.42)),  # of ten steps, none
]


def group_of(pipe: Pipeline, arguments: dict[str, Any]) -> Group:
    request = pipe.check(**arguments)
    return next(pipe.stages(request, [range(request.count)]))


def plain(pipe: Pipeline, arguments: dict[str, Any], shortcuts: Shortcuts) -> Tensor:
    """One image of a run without slots or segments: the model and `guided_step`, called step by step."""
    group, unet = group_of(pipe, arguments), pipe.components.unet
    x = group.latents.contiguous(memory_format=torch.channels_last).clone()
    x0, model_input, table = torch.zeros_like(x), x.clone(), group.table[None].to(x.device)
    steps = len(group.draws)
    first, end = (round(share * steps) for share in shortcuts.guidance_interval)
    counted, deep = 0, None
    for i, draws in enumerate(group.draws):
        guided = group.guided and first <= i < end
        if first < end and i in (first, end):
            counted = 0
        context = torch.stack(list(group.context if guided else group.context[-1:]))
        condition, step = UNetCondition(context, group.time_bias[None]), torch.tensor([i], device=x.device)
        if counted % shortcuts.whole_every:
            assert deep is not None
            out = unet.shallow(model_input, condition, step, deep)
        else:
            deep = torch.empty_like(model_input[:, :1]).repeat(len(context), 16, 1, 1)
            deep = deep.contiguous(memory_format=torch.channels_last)
            out = unet(model_input, condition, step, deep)
        noise = torch.randn(x.shape, generator=group.generators[0]).to(x.device) if draws else None
        ops.guided_step(x, x0, model_input, out, noise, table, step)
        counted += 1
    return x


@pytest.mark.parametrize("shortcuts", SOME, ids=str)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "ddim_compvis", "euler", "euler_a", "dpmpp_2m"])
def test_equals_a_plain_loop(pipe: Pipeline, sampler: str, shortcuts: Shortcuts) -> None:
    assert sampler in pipe.limits.samplers and len(pipe.limits.samplers) == 6
    arguments = {**LATENT, "sampler": sampler}
    got = pipe.generate(**arguments, shortcuts=shortcuts)
    with pipe.turn():
        want = plain(pipe, arguments, shortcuts)
    torch.testing.assert_close(got.images, want, rtol=0, atol=2e-6 * float(want.abs().max()))
    assert got.shortcuts == shortcuts
    exact = pipe.generate(**arguments).images
    assert float((got.images - exact).abs().max()) > 1e-3  # it is another picture


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_identity_settings_are_exact(pipe: Pipeline, guidance_scale: float) -> None:
    arguments = {**LATENT, "guidance_scale": guidance_scale, "sampler": "euler_a", "num_images": 3}
    exact = pipe.generate(**arguments)
    assert exact.shortcuts == Shortcuts()
    settings = [Shortcuts(), {"whole_every": 1}, {"guidance_interval": [0, 1]}]
    for shortcuts in settings:
        assert torch.equal(pipe.generate(**arguments, shortcuts=shortcuts).images, exact.images)


def test_the_exact_way_does_not_pay(pipe: Pipeline) -> None:
    with pipe.turn():
        group = group_of(pipe, LATENT)
        slots = pipe.slots(group, 1, guided=True)
    assert next(segments(group, range(10))) is group
    assert type(slots) is Slots and slots.also == ()


@pytest.mark.parametrize("count", [1, 2])
def test_whole_steps_of_caching_slots_are_exact(pipe: Pipeline, count: int) -> None:
    """One step, so the only one is whole: the features kept beside it change no bit."""
    arguments = {**LATENT, "steps": 1, "num_images": count}
    kept = pipe.generate(**arguments, shortcuts=Shortcuts(whole_every=2)).images
    assert torch.equal(kept, pipe.generate(**arguments).images)


def test_without_guidance_an_interval_leaves_nothing_out(pipe: Pipeline) -> None:
    arguments = {**LATENT, "guidance_scale": 1.0}
    cut = pipe.generate(**arguments, shortcuts=Shortcuts((0.2, 0.4))).images
    assert torch.equal(cut, pipe.generate(**arguments).images)


def counted(method: Any, kind: str, made: list[tuple[str, int]]) -> Any:
    def call(unet: UNet, latents: Tensor, condition: UNetCondition, *rest: Any, **deep: Any) -> Tensor:
        made.append((kind, len(condition.context)))
        return method(unet, latents, condition, *rest, **deep)

    return call


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The evaluations of the model: whole or cached, and of how many rows."""
    made: list[tuple[str, int]] = []
    monkeypatch.setattr(UNet, "forward", counted(UNet.forward, "whole", made))
    monkeypatch.setattr(UNet, "shallow", counted(UNet.shallow, "cached", made))
    return made


def test_the_evaluations_are_those_asked_for(pipe: Pipeline, evaluated: list[tuple[str, int]]) -> None:
    eager = {**LATENT, "cuda_graph": False}  # a replay would not be seen
    pipe.generate(**eager, shortcuts=Shortcuts((0.2, 0.7), 2))
    unguided, guided = [("whole", 1), ("cached", 1)], [("whole", 2), ("cached", 2)]
    assert evaluated == [*unguided, *guided, *guided, guided[0], *unguided, unguided[0]]
    evaluated.clear()
    pipe.generate(**eager, num_images=3, shortcuts=Shortcuts(whole_every=5))
    sizes = [8] if pipe.device.type == "cuda" else [4, 2]
    assert evaluated == [("whole" if i % 5 == 0 else "cached", rows) for rows in sizes for i in range(10)]
    evaluated.clear()
    image = torch.rand(16, 16, 3).numpy()
    pipe.generate(**eager, image=image, strength=0.6, shortcuts=Shortcuts((0.5, 1.0)))
    assert evaluated == [("whole", 1)] * 3 + [("whole", 2)] * 3  # shares of the steps that run


def test_progress_callback_and_stop_go_through_all_segments(pipe: Pipeline) -> None:
    done: list[tuple[int, int]] = []
    seen: list[tuple[int, Tensor]] = []
    shortcuts = Shortcuts((0.3, 0.6), 2)
    pipe.generate(**LATENT, shortcuts=shortcuts, progress=lambda *at: done.append(at))
    assert done == [(i + 1, 10) for i in range(10)]

    def watch(step: int, x0: Tensor) -> bool | None:
        seen.append((step, x0))
        return False if step == 4 else None

    result = pipe.generate(**LATENT, shortcuts=shortcuts, callback=watch)
    assert result.stopped and [step for step, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(result.images, seen[-1][1])


def test_an_image_is_the_same_wherever_it_stands(pipe: Pipeline) -> None:
    options = {**LATENT, "num_images": 4, "shortcuts": Shortcuts((0.2, 0.7), 2), "sampler": "dpmpp_2m"}
    forward = pipe.generate(**{**options, "seed": [0, 1, 2, 3]}).images
    backward = pipe.generate(**{**options, "seed": [3, 2, 1, 0]}).images
    assert torch.equal(forward, backward.flip(0))


def test_long_runs_cross_windows(pipe: Pipeline) -> None:
    arguments, shortcuts = {**LATENT, "steps": 100, "sampler": "euler_a"}, Shortcuts((0.1, 0.9), 3)
    got = pipe.generate(**arguments, shortcuts=shortcuts).images
    with pipe.turn():
        want = plain(pipe, arguments, shortcuts)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_graphs_give_the_eager_images_and_are_kept(captured: Pipeline, recorder: Any) -> None:
    calls: list[dict[str, Any]] = [
        {**LATENT, "shortcuts": Shortcuts(whole_every=2)},
        {**LATENT, "shortcuts": Shortcuts(whole_every=3), "prompt": "a big dog", "steps": 40},
        {**LATENT, "shortcuts": Shortcuts((0.0, 0.5))},
        {**LATENT},
        {**LATENT, "shortcuts": Shortcuts((0.2, 0.7), 4), "sampler": "dpmpp_2m"},
    ]
    for arguments in calls * 2:
        replayed = captured.generate(**arguments, cuda_graph=True).images
        assert torch.equal(replayed, captured.generate(**arguments, cuda_graph=False).images)
    # The text encoder; exact steps, guided and not; steps whose features are kept and cached ones, as well.
    assert recorder.captures == 1 + 2 + 4


def test_a_failed_capture_leaves_the_eager_path(captured: Pipeline, recorder: Any) -> None:
    arguments = {**LATENT, "shortcuts": Shortcuts(whole_every=2)}
    captured.generate(**LATENT)
    before, capture, calls = captured.graphs.held, recorder.capture, []

    def second_fails(launch: Any, pool: object) -> Any:
        calls.append(launch)
        recorder.failure = RuntimeError("no room") if len(calls) == 2 else None
        return capture(launch, pool)

    recorder.capture = second_fails
    result = captured.generate(**arguments)
    name = "the step and a cached one"
    assert result.warnings == (f"{name} runs without a CUDA graph: RuntimeError: no room",)
    assert torch.equal(result.images, captured.generate(**arguments, cuda_graph=False).images)
    assert captured.graphs.held == before and len(calls) == 2


def test_weights_changed_in_place_are_seen(captured: Pipeline) -> None:
    arguments = {**LATENT, "shortcuts": Shortcuts(whole_every=2)}
    first = captured.generate(**arguments).images
    with torch.inference_mode():
        captured.components.unet.up_blocks[-1].resnets[-1].conv2.weight.mul_(1.5)
    second = captured.generate(**arguments).images
    assert not torch.equal(first, second)
    assert torch.equal(second, captured.generate(**arguments, cuda_graph=False).images)


def test_a_batcher_refuses_them(pipe: Pipeline) -> None:
    with (
        Batcher(pipe, slots=2) as batcher,
        pytest.raises(fastldm.InvalidArgument, match="shortcuts=.*allowed is None: requests share one step"),
    ):
        batcher.submit("a cat", shortcuts=Shortcuts(whole_every=2))
