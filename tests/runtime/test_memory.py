"""What is kept between calls: text by its words, up to so many bytes, until weights change."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import fastldm
from fastldm import ops
from fastldm.ops.registry import order_in_force
from fastldm.pipeline import Pipeline
from fastldm.runtime import memory
from fastldm.runtime.memory import TensorCache, out_of_memory, to_device, to_host

FAST: dict[str, Any] = {"steps": 2, "output_type": "pt"}


@pytest.fixture
def fresh(pipe: Pipeline) -> Pipeline:
    """The same model, with nothing remembered."""
    return Pipeline(copy.deepcopy(pipe.components), pipe.device, pipe.dtype, None)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, fresh: Pipeline) -> list[str]:
    """Each run of the text encoder, each projection of its output to keys and values."""
    done: list[str] = []
    for part, name in ((fresh.components.text_encoder, "forward"), (fresh.components.unet, "keys_values")):
        method = getattr(part, name)
        monkeypatch.setattr(part, name, lambda x, method=method, name=name: (done.append(name), method(x))[1])
    return done


def test_a_prompt_is_computed_once(fresh: Pipeline, work: list[str]) -> None:
    first = fresh.generate("a red cat", **FAST).images
    assert sorted(work) == ["forward"] * 2 + ["keys_values"] * 2  # the prompt, and the empty negative
    assert torch.equal(fresh.generate("a red cat", **FAST).images, first)
    fresh.generate("a red cat", num_images=3, steps=5, sampler="euler", guidance_scale=2.0)
    fresh.generate("a red cat", negative_prompt="", guidance_scale=1.0, steps=1)
    assert len(work) == 4
    fresh.generate("a blue dog", **FAST)
    assert len(work) == 6
    fresh.generate("a blue dog", negative_prompt="a red cat", **FAST)
    assert len(work) == 6


def test_remembered_and_computed_images_are_equal(fresh: Pipeline, work: list[str]) -> None:
    prompts = ["a red cat", "a blue dog", "a big red fish on a house a big red fish on a house", "a red cat"]
    want = fresh.generate(prompts, seed=[1, 2, 3, 4], **FAST).images
    for order in ([3, 0, 1, 2], [2, 1, 0, 3]):
        chosen = [prompts[i] for i in order]
        got = fresh.generate(chosen, seed=[1 + i for i in order], **FAST).images
        assert torch.equal(got, want[order])
    # Chunks of 6 words: one each of three texts, of which one is empty, three of the long one.
    assert (work.count("forward"), work.count("keys_values")) == (6, 4)


def test_changed_weights_are_seen(fresh: Pipeline, work: list[str]) -> None:
    before = fresh.generate("a red cat", **FAST).images
    for change in (lambda weight: weight.mul_(2), lambda weight: weight.mul_(0.5)):
        count = len(work)
        change(fresh.components.text_encoder.text_model.encoder.layers[0].mlp.fc1.weight)
        after = fresh.generate("a red cat", **FAST).images
        assert len(work) == count + 4
    assert torch.equal(after, before)
    fresh.components.unet.conv_in.weight.data = fresh.components.unet.conv_in.weight.data.clone()
    fresh.generate("a red cat", **FAST)
    assert len(work) == count + 8


def test_what_other_backends_made_is_not_theirs(fresh: Pipeline, work: list[str]) -> None:
    orders = ("reference",), order_in_force()
    for count in (len({*orders}), 0):
        work.clear()
        for order in orders:
            with ops.use_backends(order):
                fresh.generate("a red cat", **FAST)
        assert len(work) == 4 * count


def test_uncounted_weights_are_never_trusted(pipe: Pipeline) -> None:
    """Changes of tensors made in inference mode are counted nowhere."""
    with torch.inference_mode():
        components = copy.deepcopy(pipe.components)
    fresh = Pipeline(components, pipe.device, pipe.dtype, None)
    weight = components.text_encoder.text_model.encoder.layers[0].mlp.fc1.weight
    assert weight.is_inference()
    before = fresh.generate("a red cat", **FAST).images
    with torch.inference_mode():
        weight.mul_(4)
    assert not torch.equal(fresh.generate("a red cat", **FAST).images, before)


def test_embeddings_given_are_not_remembered(fresh: Pipeline) -> None:
    embeds = torch.randn(1, 8, 16)
    first = fresh.generate(prompt_embeds=embeds, **FAST).images
    embeds.mul_(2)
    assert not torch.equal(fresh.generate(prompt_embeds=embeds, **FAST).images, first)


def test_the_cache_keeps_what_was_used_last() -> None:
    cache = TensorCache(limit=100)
    made: list[int] = []

    def get(key: int, size: int = 10) -> torch.Tensor:  # 4 bytes each
        return cache.get(key, lambda: (made.append(key), torch.full((size,), float(key)))[1])

    get(1), get(2), get(1), get(3)
    assert made == [1, 2, 3] and cache.held == 80
    get(1), get(2)
    assert made == [1, 2, 3, 2]
    assert get(4, size=1000).eq(4).all() and cache.held == 0  # too large to keep
    cache.clear()
    get(1)
    assert made[-1] == 1 and cache.held == 40


def test_threads_share_a_cache() -> None:
    cache = TensorCache(limit=2000)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: cache.get(i % 9, lambda: torch.full((100,), i % 9)), range(500)))
    assert all(tensor.eq(i % 9).all() for i, tensor in enumerate(made))
    assert cache.held == 1600


def test_out_of_memory_is_typed_and_nothing_else_is() -> None:
    for error in (
        MemoryError("full"),
        torch.OutOfMemoryError("full"),
        RuntimeError("not enough memory: full"),
    ):
        with pytest.raises(fastldm.OutOfMemory, match="^two images: .*full"), out_of_memory("two images"):
            raise error
    with pytest.raises(RuntimeError, match="^other$"), out_of_memory("two images"):
        raise RuntimeError("other")
    with pytest.raises(fastldm.OutOfMemory, match="^inside"), out_of_memory("outside"):
        with out_of_memory("inside"):
            raise MemoryError


def test_there_and_back(pipe: Pipeline) -> None:
    x = torch.randn(3, 5).t()
    there = to_device(x, pipe.device)
    assert there.device.type == pipe.device.type and torch.equal(to_host(there), x)


def test_a_text_encoder_that_visits_makes_the_same_images(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = copy.deepcopy(pipe.components)
    visits = Pipeline(components, pipe.device, pipe.dtype, pipe.backends, offload_text_encoder=True)
    moved: list[torch.Size] = []
    plain = memory.to_device
    monkeypatch.setattr(memory, "to_device", lambda x, device: moved.append(x.shape) or plain(x, device))
    assert torch.equal(pipe.generate("a fish", **FAST).images, visits.generate("a fish", **FAST).images)
    weights = [weight.shape for weight in visits.components.text_encoder.parameters()]
    assert len(weights) and all(moved.count(shape) >= 2 for shape in weights)  # prompt and negative
    before = len(moved)
    visits.generate("a fish", **FAST)
    assert len(moved) - before < len(weights)  # remembered: no visit

    request = visits.check("a fish")
    there, away = pipe.footprint(request), visits.footprint(request)
    size = sum(weight.nbytes for weight in visits.components.text_encoder.parameters())
    assert there.weights - away.weights == size == away.text - there.text
