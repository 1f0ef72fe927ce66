"""`fastldm train CONFIG.toml`: all stages of a run, each resumed where it stopped, ending with a model
folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastldm.checkpoint import save_folder
from fastldm.checkpoint.atomic import replacing
from fastldm.models.vae import AutoencoderKL
from fastldm.training.autoencoder import encode_all, psnr, train_autoencoder, train_decoder
from fastldm.training.config import read_config
from fastldm.training.data import SceneData
from fastldm.training.diffusion import SCHEDULER, train_diffusion
from fastldm.training.text import train_text_encoder


def main(config_file: str | Path, report: Callable[[str], None] = print) -> Path:
    """Train the model of a TOML configuration and return the folder it was written to, in the diffusers
    layout, bfloat16.

    Run it again after an interruption: it goes on from the last saved state and ends with the same weights.
    """
    config = read_config(Path(config_file))
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        report(f"drawing {config.pictures} pictures")
        data = SceneData.draw(config.pictures, config.seed)
        vae = train_autoencoder(config, data, report)
        train_decoder(config, vae, data, report)
        report(f"reconstruction of fresh pictures: {psnr(vae, SceneData.draw(100, config.seed + 1)):.2f} dB")
        tokenizer, text_encoder = train_text_encoder(config, data, report)
        section = config.diffusion
        data = SceneData.draw(section.pictures, config.seed + 2, section.sizes, section.centred)
        latents = scaled_latents(vae, data, config.folder / "latents.pt")
        model = train_diffusion(config, data, latents, tokenizer, text_encoder, report)
    finally:
        torch.set_num_threads(before)
    save_folder(
        config.output,
        unet=model.unet,
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        scheduler=SCHEDULER,
        dtype=torch.bfloat16,
    )
    report(f"wrote {config.output}")
    return config.output


def scaled_latents(vae: AutoencoderKL, data: SceneData, cache: Path) -> tuple[Tensor, Tensor]:
    """Posterior means and deviations of all pictures, scaled to zero mean and unit variance over all.

    The autoencoder's config takes up the scale and shift. Kept in `cache`, where a resumed run finds them.
    """
    if not cache.exists():
        encoded = encode_all(vae, data)
        with replacing(cache) as temporary:
            torch.save(encoded, temporary)
    means, deviations = torch.load(cache, weights_only=True)
    shift, scale = float(means.mean()), 1 / float(means.std())
    vae.config = replace(vae.config, scaling_factor=scale, shift_factor=shift)
    return (means - shift) * scale, deviations * scale
