"""`fastldm train CONFIG.toml`: all stages of a run, each resumed where it stopped, ending with a model
folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastldm.checkpoint import load_components, save_folder
from fastldm.checkpoint.atomic import replacing
from fastldm.models.layers import channels_last
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.vae import AutoencoderKL
from fastldm.training.autoencoder import encode_all, psnr, train_autoencoder, train_decoder
from fastldm.training.config import JudgeConfig, TrainConfig, read_config
from fastldm.training.data import SceneData
from fastldm.training.diffusion import SCHEDULER, TextToLatents, new_unet, train_diffusion
from fastldm.training.hints import make_hints
from fastldm.training.judge import train_judge
from fastldm.training.text import train_text_encoder


def main(config_file: str | Path, report: Callable[[str], None] = print) -> Path:
    """Train the model of a TOML configuration and return the folder it was written to, in the diffusers
    layout, bfloat16; of a judge's, the file.

    Run it again after an interruption: it goes on from the last saved state and ends with the same weights.
    """
    config = read_config(Path(config_file))
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        if isinstance(config, JudgeConfig):
            return train_judge(config, report)
        vae, tokenizer, model = first_stages(config, report)
        section = config.diffusion
        report(f"drawing {section.pictures} pictures to learn")
        data = SceneData.draw(section.pictures, config.seed + 2, section.stage)
        latents, hints = scaled_latents(vae, data, section.hints, config)
        train_diffusion(config, data, latents, hints, tokenizer, model, report)
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


def first_stages(
    config: TrainConfig, report: Callable[[str], None] = print
) -> tuple[AutoencoderKL, Tokenizer, TextToLatents]:
    """The autoencoder and the text encoder, trained or resumed, and a UNet that starts from nothing; or all
    of them from the model folder that the configuration starts from.
    """
    if config.start is not None:
        given = load_components(config.start)
        model = TextToLatents(channels_last(given.unet), given.text_encoder).requires_grad_(True)
        return channels_last(given.vae), given.tokenizer, model
    report(f"drawing {config.pictures} pictures")
    data = SceneData.draw(config.pictures, config.seed, config.stage)
    tokenizer, text_encoder = train_text_encoder(config, data, report)
    vae = train_autoencoder(config, data, report)
    train_decoder(config, vae, data, report)
    fresh = SceneData.draw(100, config.seed + 1, config.stage)
    report(f"reconstruction of fresh pictures: {psnr(vae, fresh):.2f} dB")
    side = data.images.shape[1] // vae.config.factor
    unet = new_unet(config, vae.config.latent_channels, text_encoder.config.hidden_size, side)
    return vae, tokenizer, TextToLatents(unet, text_encoder)


def scaled_latents(
    vae: AutoencoderKL, data: SceneData, hinted: int, config: TrainConfig
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Posterior means and deviations of all pictures, scaled to zero mean and unit variance over all, and
    hints for the first `hinted`.

    A new autoencoder's config takes up the scale and shift. Kept in the run's folder, where a resumed run
    finds them.
    """
    cache = config.folder / "latents.pt"
    if not cache.exists():
        means, deviations = encode_all(vae, data.images)
        if config.start is None:
            scale, shift = 1 / float(means.std()), float(means.mean())
            vae.config = replace(vae.config, scaling_factor=scale, shift_factor=shift)
        generator = torch.Generator().manual_seed(config.seed + 4)
        hints = make_hints(data, hinted, lambda images: _scaled(vae, encode_all(vae, images)[0]), generator)
        config.folder.mkdir(parents=True, exist_ok=True)
        with replacing(cache) as temporary:
            scaling = {"scaling_factor": vae.config.scaling_factor, "shift_factor": vae.config.shift_factor}
            latents = _scaled(vae, means), deviations * vae.config.scaling_factor
            torch.save({**scaling, "latents": latents, "hints": hints}, temporary)
    kept = torch.load(cache, weights_only=True)
    latents, hints = kept.pop("latents"), kept.pop("hints")
    vae.config = replace(vae.config, **kept)
    return latents, hints


def _scaled(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor
