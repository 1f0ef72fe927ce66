"""The estimate of a request's memory against what the process takes, and what is refused by it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch

import fastldm
from fastldm import footprint, ops, pipeline
from fastldm.footprint import Counter, estimate
from fastldm.runtime import Batcher

MEASURE = """
import sys
import fastldm

def resident(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))

path, dtype, unit = sys.argv[1], sys.argv[2], int(sys.argv[3])
fastldm.load(path, dtype=dtype)  # imports, and all that is made once
anonymous = resident("RssAnon")
pipe = fastldm.load(path, dtype=dtype)
networks = pipe.components.unet, pipe.components.vae, pipe.components.text_encoder
weights = sum(weight.nbytes for network in networks for weight in network.parameters())
print("load", resident("RssAnon") - anonymous, weights)
for output_type, side, images in (("latent", 6 * unit, 2), ("pt", 4 * unit, 1), ("pt", 3 * unit, 3)):
    asked = {"prompt": "a red circle", "steps": 1, "width": side, "height": side, "num_images": images}
    pipe.generate(**asked, output_type=output_type)
    stages = pipe.footprint(pipe.check(**asked, output_type=output_type))
    assert stages.kept == 0  # packed by the call before
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    result = pipe.generate(**asked, output_type=output_type)
    print(output_type, resident("VmHWM") - before, stages.needed)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux's high-water mark")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["default", "tiny"])
def test_a_tenth_of_what_is_measured(model: str, dtype: str, request: pytest.FixtureRequest) -> None:
    path = str(request.getfixturevalue("tiny_eps")) if model == "tiny" else model
    unit = "48" if model == "tiny" else "96"
    # Each map in its own pages, so that freed is gone.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    lines = subprocess.run(
        [sys.executable, "-c", MEASURE, path, dtype, unit],
        env=environment | {"PYTHONPATH": str(Path(fastldm.__file__).parents[1])},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    (_, held, weights), *stages = (line.split() for line in lines)
    # One copy of the weights at most; CLIP's tokenizer takes 10 MB.
    assert int(held) <= int(weights) + (16 << 20), lines
    for name, measured, estimated in stages:
        assert int(measured) == pytest.approx(int(estimated), rel=0.1), (name, lines)


@pytest.fixture(scope="module")
def pipe() -> fastldm.Pipeline:
    return fastldm.load(dtype="bf16", backends=("cpp", "reference"))


def test_the_largest_stage_counts(pipe: fastldm.Pipeline) -> None:
    with ops.use_backends("reference"):
        one = estimate(pipe.components, pipe.dtype, width=256, height=128)
        two = estimate(pipe.components, pipe.dtype, width=256, height=128, images=2, together=2)
        plain = estimate(pipe.components, pipe.dtype, width=256, height=128, guided=False)
        many = estimate(pipe.components, pipe.dtype, width=256, height=128, images=20, together=2)
        latents = estimate(pipe.components, pipe.dtype, width=256, height=128, to_pixels=False)
        image = estimate(pipe.components, pipe.dtype, width=256, height=128, from_image=True)
    assert one.kept == 0 and one.needed == max(one.text, one.denoise, one.decode)
    assert two.denoise == pytest.approx(2 * one.denoise, rel=0.1)
    assert plain.denoise == pytest.approx(one.denoise / 2, rel=0.1)
    assert many.denoise == two.denoise and many.decode > two.decode
    assert latents.needed == one.denoise and latents.decode == 0
    assert image.encode > 3 * 256 * 128 * 2 * 16 and one.encode == 0


def test_packed_weights_count_until_they_are_made() -> None:
    fresh = fastldm.load(dtype="bf16", backends=("cpp", "reference"))
    request = fresh.check("a cat", steps=1, width=128, height=128)
    before = fresh.footprint(request)
    assert 0 < before.kept < before.weights and before.needed > before.kept + before.text
    fresh.generate("a cat", steps=1, width=128, height=128)
    after = fresh.footprint(request)
    assert after.kept == 0 and after.decode == before.decode


def test_what_is_dropped_is_not_counted() -> None:
    def run() -> None:
        x = torch.empty(1000, dtype=torch.uint8, device="meta")
        x = x.view(10, 100)[:5]  # the same memory
        y = torch.cat((x, x))  # 1000 more
        del x
        torch.cat((y, y))  # 2000, after the first 1000 are gone

    counter = Counter()
    assert counter.peak(run) == 3000
    assert counter.peak(run) == 3000  # nothing is left of the first


def test_what_does_not_fit_is_refused_before_work(
    pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = pipe.footprint(pipe.check("a cat", steps=2)).needed
    work: list[object] = []
    monkeypatch.setattr(type(pipe), "encode", lambda *_: work.append(1))
    monkeypatch.setattr(pipeline, "available_bytes", lambda device: needed - 1)
    with pytest.raises(fastldm.OutOfMemory, match="1 images of 128x128: .* GiB are needed, .* are free"):
        pipe.generate("a cat", steps=2)
    assert not work
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "available_bytes", lambda device: needed)
    assert pipe.generate("a cat", steps=2).image.size == (128, 128)


def test_a_batcher_needs_memory_for_all_its_slots(
    pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = pipe.check("a cat", steps=1, guidance_scale=1)
    needed = pipe.footprint(request, slots=8).needed
    assert needed > 4 * pipe.footprint(request).denoise
    encode, work = type(pipe).encode, []
    monkeypatch.setattr(type(pipe), "encode", lambda *given: work.append(1) or encode(*given))
    with Batcher(pipe, slots=8) as batcher:
        monkeypatch.setattr(pipeline, "available_bytes", lambda device: needed - 1)
        with pytest.raises(fastldm.OutOfMemory, match="1 images of 128x128: .* are needed"):
            batcher.submit("a cat", steps=1, guidance_scale=1).result()
        assert not work
        monkeypatch.setattr(pipeline, "available_bytes", lambda device: needed)
        assert batcher.submit("a cat", steps=1, guidance_scale=1).result().image.size == (128, 128)


@pytest.mark.parametrize(("asked", "free"), [("1 images", 1 << 20), ("9 images", 15 << 19)])
def test_what_is_encoded_beforehand_is_refused_too(
    pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch, asked: str, free: int
) -> None:
    """The picture of an inversion, the prompts of an interpolation."""
    picture = pipe.generate("a cat", steps=1).image

    def call() -> None:
        if asked.startswith("1"):
            fastldm.invert(pipe, picture, "a cat", steps=2)
        else:
            fastldm.interpolate(pipe, ["a cat", "a fish"], 1, 9, steps=2)

    work: list[str] = []

    def starve(self: object, right: Callable[..., Any], x: torch.Tensor) -> Any:
        if x.is_meta:  # of an estimate
            return right(self, x)
        work.append("begun")
        raise MemoryError("full")

    networks = pipe.components.vae, pipe.components.text_encoder
    for kind, name in zip(map(type, networks), ("encode", "forward"), strict=True):
        monkeypatch.setattr(kind, name, partialmethod(starve, getattr(kind, name)))
    with pytest.raises(fastldm.OutOfMemory, match=f"{asked} of 128x128: full"):
        call()
    work.clear()
    monkeypatch.setattr(pipeline, "available_bytes", lambda device: free)
    with pytest.raises(fastldm.OutOfMemory, match=f"{asked} of 128x128: .* are needed"):
        call()
    assert not work


def test_a_request_that_fits_by_far_is_not_estimated(
    pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "available_bytes", lambda device: 1 << 30)
    monkeypatch.setattr(footprint, "of", footprint.packed_weights)  # a call fails: it takes no argument
    assert pipe.generate("a cat", steps=1).image.size == (128, 128)
    with pytest.raises(TypeError):
        pipe.generate("a cat", steps=1, width=2048, height=2048)
