"""fastldm.invert: picture → noise → picture, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastldm
from fastldm.diffusion import inverse_table, sample

PROMPT = "a large blue square on a white background"


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The RMS error in units of the RMS."""
    return ((got - wanted).square().mean() / wanted.square().mean()).sqrt().item()


def test_a_picture_returns() -> None:
    """The shipped model, 100 steps, guidance 1: the latents within 2 % RMS, the pixels with them."""
    pipe = fastldm.load()
    picture = pipe.generate(PROMPT, seed=3).images[0]
    noise = fastldm.invert(pipe, picture, PROMPT)
    again = {"latents": noise, "steps": 100, "guidance_scale": 1}
    back = pipe.generate(PROMPT, output_type="latent", **again).images
    with torch.inference_mode():
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
        mean = pipe.components.vae.encode(pixels).mean
    config = pipe.components.vae.config
    clean = (mean - config.shift_factor) * config.scaling_factor
    assert noise.dtype == torch.float32 and noise.shape == clean.shape
    assert off(back, clean) <= 0.02
    returned = pipe.generate(PROMPT, output_type="np", **again).images
    assert np.abs(returned - pipe.decode(clean, "np")).mean() <= 0.01
    twice = pipe.generate(PROMPT, output_type="latent", **again | {"latents": noise.flip(3)}).images
    assert off(twice, clean) > 0.1  # other noise makes another picture


def test_latents_return_under_guidance(pipe: fastldm.Pipeline) -> None:
    """Two prompts at once, guided, with a negative prompt: each row comes back, by more than one way."""
    prompts, guided = ["a cat", "a dog"], {"guidance_scale": 2.0, "negative_prompt": "blurry", "steps": 20}
    clean = pipe.generate(prompts, output_type="latent", seed=5, **guided).images
    noise = fastldm.invert(pipe, prompt=prompts, latents=clean, refinements=8, **guided)
    back = pipe.generate(prompts, latents=noise, output_type="latent", **guided).images
    assert off(back, clean) <= 1e-3
    wanted = torch.cat(
        [torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in (5, 6)]
    )
    assert off(noise, wanted) <= 0.02
    alone = fastldm.invert(pipe, prompt="a dog", latents=clean[1:], refinements=8, **guided)
    assert off(alone, noise[1:]) <= 1e-3


def test_slots_run_the_inverse_table_as_it_reads(pipe: fastldm.Pipeline) -> None:
    """The runtime beside the plain loop in float64 over the same UNet."""
    clean = pipe.generate("a cat", output_type="latent", steps=5, guidance_scale=1).images
    noise = fastldm.invert(pipe, prompt="a cat", latents=clean, steps=5, refinements=2)
    table = inverse_table(pipe.table(pipe.check("a cat", steps=5, guidance_scale=1)), 2)
    with pipe.turn():
        context = pipe.encode(pipe.check("a cat", guidance_scale=1)).context
        unet, first = pipe.components.unet, torch.zeros(1, dtype=torch.long)

        def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return unet(x.float(), unet.condition(context, t.float()[:, None]), first).double()

        wanted = sample(table, model, clean.double())
    assert off(noise.double(), wanted) <= 1e-5


def test_progress_counts_every_pass(pipe: fastldm.Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    clean = torch.zeros(1, 4, 16, 16)
    fastldm.invert(
        pipe, prompt="", latents=clean, steps=3, refinements=1, progress=lambda *now: seen.append(now)
    )
    assert seen == [(k, 6) for k in range(1, 7)]


def test_one_image_serves_several_prompts(pipe: fastldm.Pipeline) -> None:
    picture = pipe.generate("a cat", steps=2).images[0]
    both = fastldm.invert(pipe, picture, ["a cat", "a dog"], steps=4)
    alone = fastldm.invert(pipe, picture, "a dog", steps=4)
    assert both.shape == (2, 4, 16, 16) and off(both[1:], alone) <= 1e-4
    assert off(both[:1], both[1:]) > 1e-3


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("image", {}),
        ("latents", {"latents": torch.zeros(1, 4, 16, 16), "image": np.zeros((64, 64, 3), np.uint8)}),
        ("latents", {"latents": torch.zeros(1, 4, 5, 5)}),
        ("sampler", {"latents": torch.zeros(1, 4, 16, 16), "sampler": "dpmpp_2m"}),
        ("sampler", {"latents": torch.zeros(1, 4, 16, 16), "sampler": "euler_a"}),
        ("steps", {"latents": torch.zeros(1, 4, 16, 16), "steps": 0}),
        ("refinements", {"latents": torch.zeros(1, 4, 16, 16), "refinements": -1}),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(pipe: fastldm.Pipeline, name: str, arguments: dict[str, object]) -> None:
    with pytest.raises(fastldm.InvalidArgument) as caught:
        fastldm.invert(pipe, prompt="a cat", **arguments)
    assert caught.value.name == name
