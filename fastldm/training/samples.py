"""Pictures of a model in training: a grid that shows how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastldm import ops
from fastldm.checkpoint.atomic import replacing
from fastldm.diffusion import SchedulerConfig, build_table
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.vae import AutoencoderKL
from fastldm.models.vq import VQModel
from fastldm.scenes import contact_sheet
from fastldm.training.diffusion import TextToLatents
from fastldm.training.text import token_ids

STEPS = 25
GUIDANCE = 3.0
COLUMNS = 4
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
    model: TextToLatents, scheduler: SchedulerConfig, tokenizer: Tokenizer, prompts: Sequence[str], seed: int
) -> Tensor:
    """Scaled latents [prompts, C, h, w] by the scheduler's own sampler, guided."""
    device = next(model.parameters()).device
    table = build_table(scheduler, STEPS, guidance_scale=GUIDANCE)
    rows = table.rows[None].to(device)
    ids = token_ids(tokenizer, [""] * len(prompts) + list(prompts)).to(device)
    condition = model.unet.condition(model.text_encoder(ids), table.timesteps.float().to(device))
    side = model.unet.config.sample_size
    shape = (len(prompts), model.unet.config.latent_channels, side, side)
    x = table.initial_scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    clean, model_input = torch.zeros_like(x), x.clone()
    for i in range(STEPS):
        step = torch.full((len(prompts),), i, device=device)
        out = model.unet(model_input, condition, step)
        ops.guided_step(x, clean, model_input, out, None, rows, step)
    return x


@torch.no_grad()
def draw_samples(
    file: Path,
    vae: AutoencoderKL | VQModel,
    model: TextToLatents,
    scheduler: SchedulerConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
) -> None:
    """Write a grid of pictures, one a prompt, the same noise every time."""
    latents = sample_latents(model, scheduler, tokenizer, prompts, seed=0)
    images = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).clamp(-1, 1)
    pixels = (images.permute(0, 2, 3, 1) * 127.5 + 127.5).round().to(torch.uint8).cpu().numpy()
    with replacing(file) as temporary:
        contact_sheet(list(pixels), COLUMNS).save(temporary, format="png")
