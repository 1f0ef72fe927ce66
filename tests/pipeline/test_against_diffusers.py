"""Whole pipelines against diffusers: the same folder, prompts, seeds and steps; float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastldm
from fastldm.checkpoint import convert

diffusers = pytest.importorskip("diffusers")

PROMPT, NEGATIVE = "a (very) large red fish, 4k", "blurry"


def theirs(folder: Path, kind: str = "StableDiffusionPipeline") -> object:
    made = getattr(diffusers, kind).from_pretrained(
        folder, safety_checker=None, requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    return made


def their_seed(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def difference(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.abs(got.astype(np.float64) - want).max())


def test_text_to_image_25_steps(tiny_folder: Path) -> None:
    want = theirs(tiny_folder)(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=25,
        guidance_scale=7.5,
        generator=their_seed(5),
        output_type="np",
    ).images
    ours = fastldm.load(tiny_folder)
    got = ours.generate(
        PROMPT, negative_prompt=NEGATIVE, steps=25, guidance_scale=7.5, seed=5, output_type="np"
    ).images
    assert difference(got, want) <= 1e-4


def test_single_file_gives_the_same_image(tiny_folder: Path, tmp_path: Path) -> None:
    single = tmp_path / "model.safetensors"
    convert(tiny_folder, single)
    from_folder = fastldm.load(tiny_folder).generate(PROMPT, steps=4, seed=1, output_type="np").images
    from_file = fastldm.load(single).generate(PROMPT, steps=4, seed=1, output_type="np").images
    assert np.array_equal(from_folder, from_file)


@pytest.mark.parametrize(
    ("sampler", "scheduler", "options"),
    [
        ("ddim", "DDIMScheduler", {"eta": 0.7}),
        ("ddpm", "DDPMScheduler", {}),
        ("euler", "EulerDiscreteScheduler", {}),
        ("euler_a", "EulerAncestralDiscreteScheduler", {}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {}),
    ],
)
def test_every_sampler_and_batches(
    tiny_eps: Path, sampler: str, scheduler: str, options: dict[str, float]
) -> None:
    oracle = theirs(tiny_eps)
    oracle.scheduler = getattr(diffusers, scheduler).from_config(oracle.scheduler.config)
    prompts = ["a boat", "two (2) cars at night"]
    want = oracle(
        prompts,
        num_inference_steps=8,
        guidance_scale=4.0,
        generator=[their_seed(11), their_seed(12)],
        output_type="np",
        **options,
    ).images
    got = fastldm.load(tiny_eps).generate(
        prompts, steps=8, guidance_scale=4.0, seed=11, sampler=sampler, output_type="np", **options
    )
    assert difference(got.images, want) <= 1e-4
    assert got.seeds == [11, 12]


def test_image_to_image_draws_the_posterior_first(tiny_eps: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    want = theirs(tiny_eps, "StableDiffusionImg2ImgPipeline")(
        PROMPT, image=picture, strength=0.6, num_inference_steps=10, generator=their_seed(3), output_type="np"
    ).images
    got = (
        fastldm.load(tiny_eps)
        .generate(PROMPT, image=picture, strength=0.6, steps=10, seed=3, output_type="np")
        .images
    )
    assert difference(got, want) <= 1e-4


def test_latents_embeddings_and_no_guidance(tiny_eps: Path) -> None:
    oracle = theirs(tiny_eps)
    latents = torch.randn(1, 4, 12, 20, generator=their_seed(2))
    positive, negative = oracle.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    pipe = fastldm.load(tiny_eps)
    for scale in (1.0, 3.0):
        want = oracle(
            prompt_embeds=positive,
            negative_prompt_embeds=negative,
            latents=latents,
            width=80,
            height=48,
            num_inference_steps=5,
            guidance_scale=scale,
            output_type="np",
        ).images
        got = pipe.generate(
            prompt_embeds=positive,
            negative_prompt_embeds=negative,
            latents=latents,
            width=80,
            height=48,
            steps=5,
            guidance_scale=scale,
            output_type="np",
        ).images
        assert difference(got, want) <= 1e-4
