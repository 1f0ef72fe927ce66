"""The batcher: every request gets the images of its run alone, whatever others do beside it."""

from __future__ import annotations

import random
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from typing import Any

import pytest
import torch
from torch import Tensor

import fastldm
from fastldm.pipeline import Pipeline
from fastldm.runtime import Batcher

OUT: dict[str, Any] = {"output_type": "pt"}
REQUESTS: list[dict[str, Any]] = [
    {**OUT, "prompt": "a red cat", "seed": 1, "steps": 3, "sampler": "ddim", "guidance_scale": 7.5},
    {**OUT, "prompt": "a blue dog", "seed": 2, "steps": 7, "sampler": "euler_a", "guidance_scale": 3.0},
    {**OUT, "prompt": "the big fish", "seed": 3, "steps": 5, "sampler": "dpmpp_2m", "guidance_scale": 1.0},
    {**OUT, "prompt": "a house", "seed": 4, "steps": 40, "sampler": "ddim", "eta": 1.0},
    {**OUT, "prompt": "a cat", "negative_prompt": "blue", "seed": 5, "steps": 6, "sampler": "ddpm"},
    {**OUT, "prompt": ["a cat", "a dog"], "seed": 7, "steps": 2, "sampler": "euler_a"},
    {**OUT, "prompt": "a fish", "seed": 8, "steps": 2, "num_images": 7},
    {**OUT, "prompt": "a fish", "seed": 9, "steps": 3, "width": 32},
    {**OUT, "prompt": "a red fish on the big house a red fish on a house", "seed": 10, "steps": 3},
    {**OUT, "prompt_embeds": torch.linspace(-1, 1, 8 * 16).view(1, 8, 16), "seed": 11, "steps": 2},
]


class Gate:
    """A callback that holds the batcher after its first step until others have been submitted."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, step: int, x0: Tensor) -> None:
        self.reached.set()
        assert self.opened.wait(60)


@pytest.fixture(scope="module")
def alone(pipe: Pipeline) -> list[Tensor]:
    """The images of each request when nothing runs beside it, in 4 slots."""
    with Batcher(pipe, slots=4) as batcher:
        return [batcher.submit(**arguments).result().images for arguments in REQUESTS]


@pytest.mark.parametrize("seed", range(3))
def test_random_joins_and_leaves_change_no_bit(pipe: Pipeline, alone: list[Tensor], seed: int) -> None:
    chance = random.Random(seed)
    order = [index for index in range(len(REQUESTS)) for _ in range(3)]
    chance.shuffle(order)
    gate = Gate()
    with Batcher(pipe, slots=4) as batcher:
        first = batcher.submit("a dog", steps=8, callback=gate)
        with ThreadPoolExecutor(4) as pool:
            futures = list(pool.map(lambda index: batcher.submit(**REQUESTS[index]), order))
        given_up = [future.cancel() for future in futures if chance.random() < 0.2]
        gate.opened.set()
        assert first.result().image.size == (16, 16) and given_up and all(given_up)
        for index, future in zip(order, futures, strict=True):
            if not future.cancelled():
                assert torch.equal(future.result().images, alone[index]), REQUESTS[index]


def test_the_bits_are_those_of_generate_in_as_many_slots(pipe: Pipeline) -> None:
    together = pipe.generate("a red cat", steps=3, num_images=4, seed=20, **OUT).images
    with Batcher(pipe, slots=4) as batcher:
        futures = [batcher.submit("a red cat", steps=3, seed=20 + i, **OUT) for i in (2, 0, 3, 1)]
        for i, future in zip((2, 0, 3, 1), futures, strict=True):
            assert torch.equal(future.result().images[0], together[i])


def test_requests_really_run_side_by_side(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    forward = type(pipe.components.unet).forward
    monkeypatch.setattr(
        type(pipe.components.unet),
        "forward",
        lambda self, latents, *rest: (rows.append(len(latents)), forward(self, latents, *rest))[1],
    )
    gate = Gate()
    with Batcher(pipe, slots=4) as batcher:
        futures = [batcher.submit("a dog", steps=4, callback=gate)]
        assert gate.reached.wait(60)
        futures += [batcher.submit("a cat", steps=3, seed=i) for i in range(3)]
        gate.opened.set()
    assert all(future.done() for future in futures)
    assert rows == [4] * 4  # all within the four steps of the first


def test_each_request_has_its_progress_and_callback(pipe: Pipeline) -> None:
    counted: dict[str, list[Any]] = {"a": [], "b": [], "seen": []}
    with Batcher(pipe, slots=2) as batcher:
        one = batcher.submit("a cat", steps=3, progress=lambda *at: counted["a"].append(at))
        two = batcher.submit(
            "a dog",
            steps=2,
            num_images=3,
            progress=lambda *at: counted["b"].append(at),
            callback=lambda step, x0: counted["seen"].append((step, tuple(x0.shape))),
        )
        assert len(one.result().images) == 1 and len(two.result().images) == 3
    assert counted["a"] == [(1, 3), (2, 3), (3, 3)]
    assert counted["b"] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    shape = (4, 8, 8)
    assert counted["seen"] == [(0, (2, *shape)), (1, (2, *shape)), (2, (1, *shape)), (3, (1, *shape))]


def test_who_fails_or_stops_goes_alone(pipe: Pipeline, alone: list[Tensor]) -> None:
    def fail(step: int, x0: Tensor) -> None:
        raise KeyError("mine")

    gate = Gate()
    with Batcher(pipe, slots=4) as batcher:
        first = batcher.submit("a dog", steps=2, callback=gate)
        failing = batcher.submit("a cat", callback=fail)
        stopping = batcher.submit("a cat", steps=9, callback=lambda step, x0: step < 1)
        healthy = [batcher.submit(**arguments) for arguments in REQUESTS]
        gate.opened.set()
        with pytest.raises(KeyError, match="mine"):
            failing.result()
        assert stopping.result().stopped and stopping.result().image.size == (16, 16)
        assert not first.result().stopped
        for future, want in zip(healthy, alone, strict=True):
            assert torch.equal(future.result().images, want)


def test_errors_on_the_way_are_the_requests_own(
    pipe: Pipeline, alone: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, encode = type(pipe).decode, type(pipe).encode

    def starve(self: Pipeline, latents: Tensor, *rest: Any) -> Any:
        if len(latents) == 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return decode(self, latents, *rest)

    def refuse(self: Pipeline, request: Any) -> Any:
        if request.prompts == ["a dog"]:
            raise RuntimeError("no text")
        return encode(self, request)

    monkeypatch.setattr(type(pipe), "decode", starve)
    monkeypatch.setattr(type(pipe), "encode", refuse)
    with Batcher(pipe, slots=4) as batcher:
        no_text = batcher.submit("a dog", steps=2)
        no_picture = batcher.submit("a cat", steps=2, num_images=2)
        nan = batcher.submit("a cat", steps=2, latents=torch.full((1, 4, 8, 8), 3e38))
        healthy = batcher.submit(**REQUESTS[0])
        assert isinstance(no_text.exception(), RuntimeError)
        assert isinstance(no_picture.exception(), fastldm.OutOfMemory)
        assert isinstance(nan.exception(), fastldm.NonFiniteOutput)
        assert torch.equal(healthy.result().images, alone[0])


def test_a_failing_step_ends_those_in_it(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    with Batcher(pipe, slots=2) as batcher:
        inside = [batcher.submit("a dog", steps=3, callback=gate), batcher.submit("a dog", steps=3)]
        assert gate.reached.wait(60)
        with monkeypatch.context() as broken:

            def fail(*_: object) -> Tensor:
                raise RuntimeError("the device is gone")

            broken.setattr(type(pipe.components.unet), "forward", fail)
            gate.opened.set()
            assert all("gone" in str(future.exception()) for future in inside)
        assert batcher.submit("a cat", steps=2).result().image.size == (16, 16)


def test_cancelling_a_pending_and_a_running_request(pipe: Pipeline) -> None:
    gate = Gate()
    with Batcher(pipe, slots=1) as batcher:
        running = batcher.submit("a dog", steps=1000, callback=gate)
        pending = batcher.submit("a cat", steps=1000)
        after = batcher.submit("a cat", steps=2)
        assert gate.reached.wait(60)
        assert pending.cancel() and running.cancel()
        gate.opened.set()
        done, left = wait([running, pending, after], timeout=60)
        assert not left and len(done) == 3
        assert after.result().image.size == (16, 16)
        with pytest.raises(CancelledError):
            running.result()
        assert not after.cancel()


def test_bad_requests_are_refused_at_once(pipe: Pipeline) -> None:
    with Batcher(pipe) as batcher:
        for arguments, name in (
            ({"steps": 0}, "steps"),
            ({"sampler": "ddpm", "eta": 1.0}, "eta"),
            ({"cuda_graph": False}, "cuda_graph"),
        ):
            with pytest.raises(fastldm.InvalidArgument) as caught:
                batcher.submit("a cat", **arguments)
            assert caught.value.name == name
        with pytest.raises(TypeError, match="steps"):
            batcher.submit("a cat", num_inference_steps=3)
    for slots in (0, 3, 16, True, "4"):
        with pytest.raises(fastldm.InvalidArgument, match="slots="):
            Batcher(pipe, slots=slots)


def test_closing_waits_or_gives_up(pipe: Pipeline) -> None:
    with Batcher(pipe) as batcher:
        future = batcher.submit("a cat", steps=4)
    assert future.result(timeout=0).image.size == (16, 16)
    with pytest.raises(fastldm.FastLDMError, match="closed"):
        batcher.submit("a cat")
    batcher.close()

    gate = Gate()
    batcher = Batcher(pipe, slots=1)
    futures = [batcher.submit("a cat", steps=1000, callback=gate), batcher.submit("a dog")]
    assert gate.reached.wait(60)
    gate.opened.set()
    batcher.close(cancel=True)
    assert all(future.cancelled() for future in futures)
    assert not [thread for thread in threading.enumerate() if thread.name == "fastldm batcher"]


def test_others_get_their_turn(pipe: Pipeline) -> None:
    want = pipe.generate("a red cat", steps=2, **OUT).images
    gate, stop = Gate(), threading.Event()
    with Batcher(pipe, slots=2) as batcher:

        def again(_: object = None) -> None:
            if not stop.is_set():  # there is always one that waits
                batcher.submit("a dog", steps=3).add_done_callback(again)

        batcher.submit("a dog", steps=2, callback=gate)
        again()
        again()
        assert gate.reached.wait(60)
        gate.opened.set()
        with ThreadPoolExecutor(3) as pool:
            made = list(pool.map(lambda _: pipe.generate("a red cat", steps=2, **OUT).images, range(3)))
        stop.set()
    assert all(torch.equal(images, want) for images in made)


def test_weights_change_between_requests_not_within(pipe: Pipeline) -> None:
    """Whoever waits for the turn gets it when all that was begun is done: here 7 images in four groups."""
    weight = pipe.components.unet.conv_out.weight
    want = pipe.generate("a fish", num_images=2, steps=2, **OUT).images
    gate = Gate()
    with Batcher(pipe, slots=2) as batcher:
        begun = batcher.submit("a fish", num_images=7, steps=2, callback=gate, **OUT)
        after = batcher.submit("a fish", num_images=2, steps=2, **OUT)
        assert gate.reached.wait(60)

        def change() -> None:
            with pipe.turn():
                assert begun.done() and not after.done()
                weight.mul_(2)

        with ThreadPoolExecutor(1) as pool:
            changed = pool.submit(change)
            while not pipe.turns.awaited:
                pass
            gate.opened.set()
            changed.result()
        assert torch.equal(begun.result().images[:2], want)
        assert not torch.equal(after.result().images, want)
    with pipe.turn():
        weight.mul_(0.5)
    assert torch.equal(pipe.generate("a fish", num_images=2, steps=2, **OUT).images, want)


def test_a_callback_cannot_wait_for_its_own_pipeline(pipe: Pipeline) -> None:
    with Batcher(pipe) as batcher:
        future = batcher.submit("a cat", callback=lambda step, x0: pipe.generate("a dog"))
        with pytest.raises(RuntimeError, match="cannot run the pipeline"):
            future.result()


def test_one_graph_serves_them_all(captured: Pipeline, recorder: Any) -> None:
    with Batcher(captured, slots=4) as batcher:
        first = batcher.submit(**REQUESTS[0]).result()
        futures = [batcher.submit(**arguments) for arguments in REQUESTS[:7]]
        assert all(future.result().warnings == () for future in futures)
    assert torch.equal(first.images, futures[0].result().images)
    assert recorder.captures == 3  # the step, the text encoder, the decoder
