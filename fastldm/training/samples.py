"""Pictures of a model in training: a grid that shows how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastldm.checkpoint.atomic import replacing
from fastldm.diffusion import SchedulerConfig, build_table, sample
from fastldm.models.pixels import Autoencoder
from fastldm.models.tokenizer import Tokenizer
from fastldm.scenes import contact_sheet
from fastldm.training.diffusion import TextToLatents
from fastldm.training.lora import LoraModel
from fastldm.training.reconstruction import to_pixels
from fastldm.training.text import token_ids

STEPS = 25
GUIDANCE = 3.0
COLUMNS, SHOWN = 4, 8
PROMPTS = (
    "a red circle on a white background",
    "a large blue house",
    "a yellow star on a purple background",
    "a green tree on the left",
    "two orange fish",
    "four black cars",
    "a white moon above a red car",
    "a flower on a beach at sunset",
)


@torch.no_grad()
def sample_latents(
    model: TextToLatents | LoraModel,
    scheduler: SchedulerConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    side: int,
    seed: int,
) -> Tensor:
    """Scaled latents [prompts, C, side, side] by DDIM, or Euler's method for a flow, guided."""
    device = next(model.unet.parameters()).device
    sampler = "flow_euler" if scheduler.prediction == "flow" else "ddim"
    table = build_table(scheduler, STEPS, sampler=sampler, guidance_scale=GUIDANCE)
    ids = token_ids(tokenizer, [""] * len(prompts) + list(prompts)).to(device)
    shape = (len(prompts), model.unet.config.latent_channels, side, side)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)

    def predict(x: Tensor, times: Tensor) -> Tensor:
        return model(torch.cat((x, x)), torch.cat((times, times)), ids)

    return sample(table, predict, table.initial_scale * noise)


@torch.no_grad()
def draw_samples(
    file: Path,
    vae: Autoencoder,
    model: TextToLatents | LoraModel,
    scheduler: SchedulerConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    side: int,
) -> None:
    """Write a grid of pictures, one a prompt, of latents of this side; the same noise every time."""
    latents = sample_latents(model, scheduler, tokenizer, prompts, side, seed=0)
    images = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor)
    pixels = to_pixels(images).cpu().numpy()
    with replacing(file) as temporary:
        contact_sheet(list(pixels), COLUMNS).save(temporary, format="png")
