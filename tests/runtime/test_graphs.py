"""Graphs: captured once, replayed with the numbers of the eager run; captures that fail; memory.

Without a GPU a double captures, which sees whether a replay would touch other memory than the capture did.
"""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import fastldm
from fastldm import ops
from fastldm.ops.registry import order_in_force
from fastldm.pipeline import Pipeline
from fastldm.runtime.graphs import Function, Graphs, Work

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAIN: dict[str, Any] = {"prompt": "a red cat", "steps": 3, "seed": 1, "output_type": "pt"}
SAME_GRAPHS: list[dict[str, Any]] = [
    PLAIN,
    {**PLAIN, "prompt": "the big dog", "negative_prompt": "small"},
    {**PLAIN, "seed": 9, "steps": 40},
    {**PLAIN, "sampler": "euler_a", "guidance_scale": 3.0},
    {**PLAIN, "sampler": "dpmpp_2m", "guidance_scale": -1.0, "steps": 1},
    {**PLAIN, "sampler": "ddim", "eta": 0.5},
]


def both(pipe: Pipeline, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The images by replays and by an eager run."""
    return pipe.generate(**arguments).images, pipe.generate(**arguments, cuda_graph=False).images


def test_one_capture_serves_all_that_differs_in_data(captured: Pipeline, recorder: Any) -> None:
    for arguments in SAME_GRAPHS:
        assert torch.equal(*both(captured, arguments))
    assert recorder.captures == 3  # the step, the text encoder, the decoder
    steps = sum(arguments["steps"] for arguments in SAME_GRAPHS)
    texts = len({"a red cat", "the big dog", "small", ""})
    assert recorder.replays == steps + texts + len(SAME_GRAPHS)


@pytest.mark.parametrize(
    ("change", "captures"),
    [
        ({"guidance_scale": 1.0}, 1),
        ({"num_images": 2}, 1),
        ({"width": 32}, 2),  # the step and the decoder
        ({"prompt": "a red cat on the big house a red cat on the big house"}, 1),
        ({"num_images": 8, "prompt": ["a cat"], "seed": 3}, 1),
    ],
)
def test_other_sizes_have_other_graphs(
    captured: Pipeline, recorder: Any, change: dict[str, Any], captures: int
) -> None:
    captured.generate(**PLAIN)
    assert torch.equal(*both(captured, {**PLAIN, **change}))
    assert recorder.captures == 3 + captures
    captured.generate(**PLAIN)
    assert recorder.captures == 3 + captures


def test_weights_changed_in_place_are_seen_without_a_capture(captured: Pipeline, recorder: Any) -> None:
    seen = [captured.generate(**PLAIN).images]
    parts = captured.components
    for weight in (
        parts.unet.conv_out.weight,
        parts.text_encoder.text_model.embeddings.token_embedding.weight,
        parts.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight,
        parts.vae.decoder.conv_in.weight,
    ):
        with torch.inference_mode():
            weight.mul_(1.5)
        replayed, eager = both(captured, PLAIN)
        assert torch.equal(replayed, eager)
        assert all(not torch.equal(replayed, before) for before in seen)
        seen.append(replayed)
    assert recorder.captures == 3


def test_weights_put_elsewhere_are_captured_anew(captured: Pipeline, recorder: Any) -> None:
    captured.generate(**PLAIN)
    weight = captured.components.unet.conv_out.weight
    weight.data = weight.data * 2
    assert torch.equal(*both(captured, PLAIN))
    assert recorder.captures == 6


def test_a_failed_capture_leaves_the_eager_path(captured: Pipeline, recorder: Any) -> None:
    recorder.failure = RuntimeError("operation not permitted\nand a page of advice")
    result = captured.generate(**PLAIN)
    assert torch.equal(result.images, captured.generate(**PLAIN, cuda_graph=False).images)
    assert result.warnings == tuple(
        f"{name} runs without a CUDA graph: RuntimeError: operation not permitted"
        for name in ("the text encoder", "the step", "the decoder")
    )
    assert captured.graphs.held == 0
    with pytest.raises(fastldm.errors.BackendUnavailable, match="cuda_graph=True: .* not permitted"):
        captured.generate("a blue fish", cuda_graph=True)

    recorder.failure = None
    captured.generate(**PLAIN)
    assert recorder.captures == 0  # what failed is not tried at every call
    again = captured.generate(**{**PLAIN, "prompt": "a small fish"}, cuda_graph=True)
    assert recorder.captures == 3 and again.warnings == ()


def test_running_out_of_memory(captured: Pipeline, recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the warm-up it is the request's error, in the capture alone a reason to run without a graph."""
    with monkeypatch.context() as broken:

        def starve(*_: object) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        broken.setattr(type(captured.components.unet), "forward", starve)
        with pytest.raises(fastldm.OutOfMemory, match="1 images side by side"):
            captured.generate(**PLAIN)
    recorder.failure = torch.OutOfMemoryError("CUDA out of memory")
    replayed, eager = both(captured, {**PLAIN, "guidance_scale": 1.0})
    assert torch.equal(replayed, eager)
    recorder.failure = None
    assert torch.equal(*both(captured, PLAIN))


def test_cuda_graph_true_needs_a_gpu(pipe: Pipeline) -> None:
    if pipe.device.type == "cuda":
        assert pipe.generate(**PLAIN, cuda_graph=True).warnings == ()
    else:
        with pytest.raises(fastldm.InvalidArgument, match="cuda_graph=True.*runs on the CPU"):
            pipe.generate(**PLAIN, cuda_graph=True)


def test_a_callback_that_raises_frees_the_slots(captured: Pipeline) -> None:
    want = captured.generate(**PLAIN).images

    def fail(step: int, x0: Tensor) -> None:
        if step == 1:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        captured.generate(**{**PLAIN, "prompt": "a dog"}, callback=fail)
    assert torch.equal(captured.generate(**PLAIN).images, want)


def test_a_callback_may_use_the_graphs(captured: Pipeline, recorder: Any) -> None:
    seen: list[list[Tensor]] = []

    def look(step: int, x0: Tensor) -> None:
        seen.append([captured.decode(x0, "pt", cuda_graph=wanted) for wanted in (None, False)])

    captured.generate(**PLAIN)
    captured.generate(**PLAIN, callback=look)
    assert recorder.captures == 3 and len(seen) == PLAIN["steps"]
    assert all(torch.equal(replayed, eager) for replayed, eager in seen)


def test_threads_share_the_graphs(captured: Pipeline) -> None:
    calls = [{**SAME_GRAPHS[i % 6], "seed": i, "num_images": 1 + i % 2} for i in range(12)]
    serial = [captured.generate(**call).images for call in calls]
    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(lambda call: captured.generate(**call).images, calls))
    assert all(torch.equal(a, b) for a, b in zip(serial, threaded, strict=True))


def works(graphs: Graphs, recorder: Any, size: int) -> Work:
    x = torch.zeros(size, device=DEVICE)
    return graphs.get(("add", size), lambda: Function(lambda y: y + 1, (x,)))


def test_other_backends_have_other_graphs(recorder: Any) -> None:
    graphs, orders = Graphs(recorder, limit=1 << 30), [("reference",), order_in_force()]
    kept: list[Work] = []
    for order in orders * 2:
        with ops.use_backends(order):
            kept.append(works(graphs, recorder, 10))
    assert kept[:2] == kept[2:] and len({*map(id, kept)}) == len({*orders}) == recorder.captures


def test_memory_stays_under_the_limit(recorder: Any) -> None:
    graphs, recorder.grows = Graphs(recorder, limit=16 << 20), 1 << 20
    for i in range(100):
        work = works(graphs, recorder, 100_000 + i)  # 0.8 MB
        assert 0 < graphs.held <= 16 << 20
        assert works(graphs, recorder, 100_000 + i) is work
    assert 100 <= recorder.captures <= 120  # some twice, as the pool does not shrink


def test_the_least_recently_used_goes_first(recorder: Any) -> None:
    graphs = Graphs(recorder, limit=1 << 40)
    first, second = works(graphs, recorder, 10), works(graphs, recorder, 20)
    assert works(graphs, recorder, 10) is first
    graphs.limit = graphs.held
    works(graphs, recorder, 15)
    assert works(graphs, recorder, 10) is first
    assert works(graphs, recorder, 20) is not second
    graphs.clear()
    assert graphs.held == 0 and works(graphs, recorder, 10) is not first


def test_what_fails_before_the_capture_is_the_callers_error(recorder: Any) -> None:
    def fail(x: Tensor) -> Tensor:
        raise MemoryError("a step does not fit")

    graphs = Graphs(recorder, limit=1 << 30)
    with pytest.raises(MemoryError):
        graphs.call("work", fail, torch.zeros(3, device=DEVICE), wanted=None)
    assert not graphs.failures and graphs.held == 0


def test_fifty_failures_keep_nothing(recorder: Any) -> None:
    graphs = Graphs(recorder, limit=1 << 30)
    recorder.failure = RuntimeError("no")
    alive = []
    for size in range(1, 51):
        x = torch.zeros(size, device=DEVICE)
        made = graphs.call("work", lambda y: y + 1, x, wanted=None)
        assert torch.equal(made, x + 1)
        alive.append(size)
    del x, made
    gc.collect()
    assert graphs.held == 0 and len(graphs.failures) == len(alive)
    assert not [work for work in gc.get_objects() if type(work) is Function]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a test of the double")
@pytest.mark.parametrize(
    ("work", "why"),
    [
        (lambda x: x * float(x.sum()), "not permitted"),
        (lambda x: x * torch.tensor(2.0), "not permitted"),
        (lambda x: x[x.nonzero()[0]], "not permitted"),
    ],
    ids=["item", "tensor", "nonzero"],
)
def test_the_double_refuses_what_cuda_refuses(recorder: Any, work: Any, why: str) -> None:
    with pytest.raises(RuntimeError, match=why):
        Graphs(recorder, 1 << 30).call("work", work, torch.ones(4), wanted=True)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a test of the double")
def test_the_double_sees_memory_that_moves(recorder: Any) -> None:
    held = [torch.ones(4)]
    graphs = Graphs(recorder, 1 << 30)
    add = lambda x: x + held[0]  # noqa: E731
    graphs.call("work", add, torch.ones(4), wanted=True)
    held.append(held.pop().clone())
    with pytest.raises(AssertionError, match="stale memory"):
        graphs.call("work", add, torch.ones(4), wanted=True)
