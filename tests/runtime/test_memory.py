"""What is kept between calls: text by its words, up to so many bytes, until weights change."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import fastldm
from fastldm import ops
from fastldm.ops.registry import order_in_force
from fastldm.pipeline import Pipeline
from fastldm.runtime import memory
from fastldm.runtime.memory import TensorCache, available_bytes, out_of_memory, to_device, to_host

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


def test_what_torch_holds_in_reserve_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"mem_get_info": (10, 100), "memory_reserved": 7, "memory_allocated": 4}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert available_bytes(torch.device("cuda", 0)) == 13


@pytest.mark.parametrize("names", [memory.VERSION_2, memory.VERSION_1], ids=["v2", "v1"])
def test_the_limits_of_control_groups_count(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unified, device = names is memory.VERSION_2, torch.device("cpu")
    (tmp_path / "own").write_text("5:cpuset:/a\n" + ("0::/a/b\n" if unified else "4:memory:/a/b\n0::/\n"))
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "none")
    without = available_bytes(device)
    assert without > 1 << 20
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    assert available_bytes(device) == pytest.approx(without, rel=0.2)  # as there is no such group
    top = tmp_path if unified else tmp_path / "memory"
    for folder, limit, taken in (
        ("a/b", "max" if unified else "9223372036854771712", 300),
        ("a", "1000", 400),
    ):
        group = top / folder
        group.mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, (limit, taken), strict=False):
            (group / name).write_text(f"{value}\n")
        (group / "memory.stat").write_text(f"anon 5\n{names[2]} 30\n{names[3]} 70\n")
    assert available_bytes(device) == 1000 - 400 + 30 + 70
    (top / "a" / names[0]).write_text("200\n")
    assert available_bytes(device) == 0


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
