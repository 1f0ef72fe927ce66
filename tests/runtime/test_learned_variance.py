"""A model that learnt its variance, in the slots: the noise of each step is as large as it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastldm
from fastldm import ops
from fastldm.checkpoint import Components, convert, load_components, save_folder
from fastldm.diffusion import build_table, sample
from fastldm.diffusion.parameterization import log_variance
from fastldm.models.unet import UNet
from fastldm.pipeline import Pipeline
from fastldm.runtime.graphs import Graphs
from fastldm.runtime.slots import WINDOW
from tests.conftest import sane_weights
from tests.runtime.conftest import DEVICE, tiny_components

ASKED: dict[str, Any] = {"steps": 5, "sampler": "ddpm", "guidance_scale": 4.0, "output_type": "latent"}


def learned_components(variance: str = "learned_range") -> Components:
    """The tiny model, which answers with the place of the log variance too."""
    plain = tiny_components()
    torch.manual_seed(6)
    config = replace(plain.unet.config, out_channels=8, learned_variance=True)
    unet = UNet(config).eval().requires_grad_(False)
    sane_weights(unet)
    scheduler = replace(plain.scheduler, variance_type=variance, class_name="DDPMScheduler")
    return replace(plain, unet=unet, scheduler=scheduler)


@pytest.fixture(scope="module")
def learned() -> Pipeline:
    return Pipeline(learned_components(), DEVICE, torch.float32, None)


def by_the_loop(
    pipe: Pipeline, prompt: str, seed: int, asked: dict[str, Any], scales: list[float] | None = None
) -> Tensor:
    """The latents as `diffusion.sample` makes them, on tables in float64; `scales`: of each step."""
    components = pipe.components
    table = build_table(
        components.scheduler,
        asked["steps"],
        sampler=asked["sampler"],
        guidance_scale=asked["guidance_scale"],
    )
    if scales is not None:
        table.rows64[: len(scales), ops.sampling.GUIDANCE] = torch.tensor(scales, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 4, 8, 8)

    def drawn() -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    tokenizer, encoder = components.text
    chunks = [tokenizer.encode(text).chunks[0] for text in ("", prompt)]
    context = encoder(torch.tensor(chunks, device=DEVICE))

    def model(x: Tensor, t: Tensor) -> Tensor:
        condition = components.unet.condition(context, t[:1])
        return components.unet(x, condition, torch.zeros(1, dtype=torch.long, device=DEVICE))

    start = drawn() * table.initial_scale
    with torch.no_grad():
        return sample(table, model, start, iter(drawn, None))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler_a"])
@pytest.mark.parametrize("steps", [1, 5, WINDOW + 3])
def test_latents_are_those_of_the_loop(learned: Pipeline, sampler: str, steps: int) -> None:
    """Samplers that need no variance leave it."""
    asked = {**ASKED, "sampler": sampler, "steps": steps}
    got = learned.generate("a red cat", seed=3, **asked).images
    want = by_the_loop(learned, "a red cat", 3, asked)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_the_variance_is_the_models(learned: Pipeline) -> None:
    """The same net without its second half draws otherwise."""
    pipe = Pipeline(learned_components("fixed_small"), DEVICE, torch.float32, None)
    fixed, own = (p.generate("a red cat", seed=3, **ASKED).images for p in (pipe, learned))
    assert (fixed - own).abs().max() > 1e-3


def test_an_image_is_the_same_whatever_stands_beside_it(learned: Pipeline) -> None:
    for size in (2, 4):
        seeds = list(range(size))
        forward = learned.generate("a cat", num_images=size, seed=seeds, **ASKED).images
        backward = learned.generate("a cat", num_images=size, seed=seeds[::-1], **ASKED).images
        assert torch.equal(forward, backward.flip(0))
        alone = learned.generate("a cat", seed=seeds[1], **ASKED).images
        torch.testing.assert_close(forward[1:2], alone, rtol=0, atol=1e-5)


def test_guidance_for_a_part_of_the_steps(learned: Pipeline) -> None:
    """Each segment takes its own steps' bounds along."""
    part = learned.generate("a red cat", seed=3, shortcuts={"guidance_interval": (0.4, 0.8)}, **ASKED).images
    want = by_the_loop(learned, "a red cat", 3, ASKED, [1.0, 1.0, 4.0, 4.0, 1.0])
    torch.testing.assert_close(part, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_a_graph_replays_it(learned: Pipeline, recorder: Any) -> None:
    """Replays touch the memory of the capture alone, also when a window is refilled."""
    backends = None if DEVICE.type == "cuda" else ("reference",)
    pipe = Pipeline(learned_components(), DEVICE, torch.float32, backends)
    pipe.graphs = Graphs(recorder, 1 << 30)
    asked = {**ASKED, "steps": WINDOW + 3}
    made = pipe.generate("a red cat", seed=3, cuda_graph=True, **asked).images
    assert recorder.captures and recorder.replays
    assert torch.equal(made, pipe.generate("a red cat", seed=3, cuda_graph=False, **asked).images)


def test_noise_of_a_place_between_the_bounds() -> None:
    torch.manual_seed(0)
    noise, place = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4) * 2 - 1
    bounds, step = torch.randn(2, 5, 2), torch.tensor([1, 4])
    got = ops.learned_noise(noise, place, bounds, step)
    for slot in range(2):
        low, high = bounds[slot, step[slot]].double().tolist()
        want = noise[slot].double() * (0.5 * log_variance(place[slot].double(), low, high)).exp()
        torch.testing.assert_close(got[slot].double(), want, rtol=1e-6, atol=1e-6)


def test_a_folder_tells_it_by_the_latents_channels(learned: Pipeline, tmp_path: Path) -> None:
    """There and back, and through a single file."""
    own = learned.components
    save_folder(
        tmp_path / "model",
        unet=own.unet,
        vae=own.vae,
        text_encoder=own.text_encoder,
        tokenizer=own.tokenizer,
        scheduler=own.scheduler,
    )
    again = fastldm.load(tmp_path / "model", device=str(DEVICE), dtype="fp32")
    assert again.components.unet.config == own.unet.config and again.limits.latent_channels == 4
    assert again.components.family == "sd1"
    want = learned.generate("a red cat", seed=3, **ASKED).images
    assert torch.equal(again.generate("a red cat", seed=3, **ASKED).images, want)
    convert(tmp_path / "model", tmp_path / "one.safetensors")
    one = load_components(tmp_path / "one.safetensors", device=DEVICE)
    assert one.unet.config == own.unet.config and one.scheduler.variance_type == "learned_range"


def test_a_unet_that_learnt_no_variance_has_none_to_sample_with() -> None:
    plain = tiny_components()
    scheduler = replace(plain.scheduler, variance_type="learned_range")
    pipe = Pipeline(replace(plain, scheduler=scheduler), DEVICE, torch.float32, None)
    with pytest.raises(fastldm.InvalidArgument, match="learnt no variance"):
        pipe.generate("a cat", **ASKED)
    same = {**ASKED, "sampler": "ddim"}
    want = Pipeline(plain, DEVICE, torch.float32, None).generate("a cat", seed=1, **same).images
    assert torch.equal(pipe.generate("a cat", seed=1, **same).images, want)
