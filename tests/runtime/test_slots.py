"""Slots: whatever stands beside an image, wherever and since when, its numbers are those of its run alone."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fastldm import ops
from fastldm.models.unet import UNetCondition
from fastldm.pipeline import Pipeline
from fastldm.runtime.slots import WINDOW, Group, Run, Slots, smallest, split

REQUESTS: list[dict[str, Any]] = [
    {"prompt": "a red cat", "seed": 1, "steps": 3, "sampler": "ddim", "guidance_scale": 7.5},
    {"prompt": "a blue dog", "seed": 2, "steps": 7, "sampler": "euler_a", "guidance_scale": 3.0},
    {"prompt": "the big fish", "seed": 3, "steps": 5, "sampler": "dpmpp_2m", "guidance_scale": 1.0},
    {"prompt": "a house", "seed": 4, "steps": 4, "sampler": "ddim", "eta": 1.0, "guidance_scale": -2.0},
    {"prompt": "a red house", "negative_prompt": "blue", "seed": 5, "steps": 6, "sampler": "ddpm"},
    {"prompt": "a fish", "seed": 6, "steps": WINDOW + 5, "sampler": "euler"},
    {"prompt": ["a cat", "a dog"], "seed": 7, "steps": 2, "sampler": "euler_a"},
]


def group_of(pipe: Pipeline, arguments: dict[str, Any]) -> Group:
    """The images of a request, ready to be denoised."""
    request = pipe.check(**arguments)
    return next(pipe.stages(request, [range(request.count)]))


def alone(pipe: Pipeline, arguments: dict[str, Any], count: int) -> Tensor:
    with pipe.turn():
        group = group_of(pipe, arguments)
        return pipe.slots(group, count, guided=True).complete(group).latents


@pytest.fixture(scope="module")
def half_pipe(pipe: Pipeline) -> Pipeline:
    return Pipeline(copy.deepcopy(pipe.components), pipe.device, torch.bfloat16, None)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_joining_and_leaving_changes_no_bit(
    pipe: Pipeline, half_pipe: Pipeline, count: int, half: bool
) -> None:
    pipe = half_pipe if half else pipe
    chance = random.Random(count)
    want = [alone(pipe, arguments, count) for arguments in REQUESTS]
    waiting = [index for index in range(len(REQUESTS)) for _ in range(2)]
    chance.shuffle(waiting)
    places: set[int] = set()
    mixed = 0
    with pipe.turn():
        slots = pipe.slots(group_of(pipe, REQUESTS[0]), count, guided=True)
        running: dict[Run, int] = {}
        while waiting or running:
            while waiting and (not running or chance.random() < 0.6):
                group = group_of(pipe, REQUESTS[waiting[0]])
                if len(group.latents) > len(slots.free):
                    break
                run = slots.admit(group)
                running[run] = waiting.pop(0)
                places.update(run.places)
            mixed = max(mixed, len(running))
            slots.advance()
            for run, index in list(running.items()):
                outcome = slots.report(run)
                if outcome is not None:
                    slots.release(run)
                    del running[run]
                    assert torch.equal(outcome.latents, want[index]), REQUESTS[index]
                elif chance.random() < 0.03:
                    slots.release(run)  # gives up in the midst of it
                    del running[run]
    assert places == set(range(count)) and mixed >= min(count, 3)


@pytest.mark.parametrize("arguments", REQUESTS[:6], ids=lambda arguments: arguments["sampler"])
def test_equals_a_plain_loop(pipe: Pipeline, arguments: dict[str, Any]) -> None:
    """The model and `guided_step` called step by step on tables of full length, without slots or windows."""
    with pipe.turn():
        group = group_of(pipe, arguments)
        got = pipe.slots(group, 1, group.guided).complete(group).latents
        group = group_of(pipe, arguments)  # its generators are where the noise of the steps begins
        condition = UNetCondition(torch.stack(list(group.context)), group.time_bias[None])
        x = group.latents.contiguous(memory_format=torch.channels_last).clone()
        x0, model_input, table = torch.zeros_like(x), x.clone(), group.table[None].to(x.device)
        for i, draws in enumerate(group.draws):
            step = torch.tensor([i], device=x.device)
            out = pipe.components.unet(model_input, condition, step)
            noise = torch.randn(x.shape, generator=group.generators[0]).to(x.device) if draws else None
            ops.guided_step(x, x0, model_input, out, noise, table, step)
    torch.testing.assert_close(got, x, rtol=0, atol=2e-6 * float(x.abs().max()))


def test_a_finished_slot_rests(pipe: Pipeline) -> None:
    with pipe.turn():
        first, second = (group_of(pipe, REQUESTS[i]) for i in (0, 5))
        slots = pipe.slots(first, 2, guided=True)
        short, _ = slots.admit(first), slots.admit(second)
        for _ in first.draws:
            slots.advance()
        outcome = slots.report(short)
        assert outcome is not None
        slots.release(short)
        for _ in range(WINDOW):
            slots.advance()
            assert torch.equal(slots.latents[:1], outcome.latents)
        assert slots.step.tolist() == [WINDOW, len(first.draws)]


def test_watching_and_stopping(pipe: Pipeline) -> None:
    seen = []

    def watch(step: int, x0: Tensor) -> bool | None:
        seen.append((step, x0))
        return False if step == 2 else None

    result = pipe.generate("a cat", steps=5, num_images=2, callback=watch, output_type="latent")
    assert result.stopped and [step for step, _ in seen] == [0, 1, 2]
    assert torch.equal(result.images, seen[-1][1]) and not torch.equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize("guided", [True, False])
def test_an_image_is_the_same_wherever_it_stands(pipe: Pipeline, guided: bool) -> None:
    options = {"steps": 3, "guidance_scale": 5.0 if guided else 1.0, "output_type": "latent"}
    for size in (2, 4, 8):
        forward = pipe.generate("a cat", num_images=size, seed=list(range(size)), **options).images
        backward = pipe.generate("a cat", num_images=size, seed=list(range(size))[::-1], **options).images
        assert torch.equal(forward, backward.flip(0))


def test_the_loop_never_waits_for_the_device(captured: Pipeline, touched: Any) -> None:
    with captured.turn():
        groups = [group_of(captured, REQUESTS[i]) for i in (1, 5)]
        slots = captured.slots(groups[0], 2, guided=True, cuda_graph=False)
        with touched:  # refuses to read a number back
            runs = [slots.admit(group) for group in groups]
            for _ in range(len(groups[0].draws) - 1):
                slots.advance()
                assert [slots.report(run) for run in runs] == [None, None]
            slots.release(runs[0])
            while runs[1].done < WINDOW + 2:
                slots.advance()


def test_split() -> None:
    assert [len(group) for group in split(11)] == [8, 3]
    assert [len(group) for group in split(11, padded=False)] == [8, 2, 1]
    assert [len(group) for group in split(7, most=4)] == [4, 3]
    for count in range(1, 40):
        for padded in (True, False):
            assert [i for group in split(count, padded=padded) for i in group] == list(range(count))
    assert [smallest(count) for count in range(1, 9)] == [1, 2, 4, 4, 8, 8, 8, 8]


def test_a_long_run_needs_no_long_buffers(pipe: Pipeline) -> None:
    with pipe.turn():
        few, many = (group_of(pipe, {**REQUESTS[0], "steps": steps}) for steps in (2, 1000))
        sizes = [
            sum(x.nbytes for x in Slots(lambda *_: few.latents, group, 4, True, torch.float32).buffers())
            for group in (few, many)
        ]
    assert sizes[0] == sizes[1]
