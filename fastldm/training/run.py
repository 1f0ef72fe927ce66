"""`fastldm train CONFIG.toml`: all stages of a run, each resumed where it stopped, ending with a model
folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from fastldm.abilities import Abilities
from fastldm.checkpoint import save_folder
from fastldm.diffusion import SchedulerConfig
from fastldm.models.layers import channels_last
from fastldm.models.pixels import Autoencoder, PixelAutoencoder, PixelConfig
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.vae import AutoencoderKL
from fastldm.models.vq import VQModel
from fastldm.scenes import KINDS, VOCABULARY
from fastldm.training.autoencoder import train_autoencoder, train_decoder
from fastldm.training.config import DiffusionSection, JudgeConfig, LoraConfig, TrainConfig, read_config
from fastldm.training.data import PictureData, SceneData
from fastldm.training.diffusion import TextToLatents, new_unet, train_diffusion
from fastldm.training.folder import FolderData
from fastldm.training.hints import UPSCALING
from fastldm.training.judge import train_judge
from fastldm.training.latents import latents_and_hints
from fastldm.training.lora_run import learn_lora
from fastldm.training.parallel import joined, local_device
from fastldm.training.reconstruction import reconstruction_report
from fastldm.training.samples import GUIDANCE, PROMPTS, SHOWN, draw_samples
from fastldm.training.session import Session
from fastldm.training.start import started
from fastldm.training.text import new_text_encoder, train_text_encoder

JUDGED = 100  # pictures that the autoencoder is measured on


def main(config_file: str | Path, report: Callable[[str], None] = print, strict: bool = False) -> Path:
    """Train the model of a TOML configuration and return the folder it was written to, in the diffusers
    layout, bfloat16; of a LoRA's, its folder; of a judge's, the file.

    Run it again after an interruption: it goes on from the last saved state and ends with the same weights.
    Under torchrun the processes share the work. `strict`: a picture that cannot be used is an error.
    """
    config = read_config(Path(config_file))
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        if isinstance(config, JudgeConfig):
            return train_judge(config, report)
        if isinstance(config, LoraConfig):
            return learn_lora(config, report, strict)
        return _train(config, report, strict)
    finally:
        torch.set_num_threads(before)


def _train(config: TrainConfig, report: Callable[[str], None], strict: bool) -> Path:
    device = local_device(config.device)
    with joined(device) as workers:
        session = Session(config, device, workers, report)
        folder = None
        if config.data is not None:
            folder = FolderData.read(config.data, config.side, strict, session.say)
        vae, tokenizer, model, scheduler = first_stages(session, folder)
        section = config.diffusion
        if folder is None:
            session.say(f"drawing {section.pictures} pictures to learn")
        data = folder or scenes_to_learn(config)
        latents, hints = latents_and_hints(session, vae, data)
        prompts = PROMPTS if folder is None else folder.texts[:SHOWN]

        def sample(step: int) -> None:
            file = config.folder / f"samples-{step}.png"
            draw_samples(file, vae, model, scheduler, tokenizer, prompts, latents.side)

        train_diffusion(session, data, latents, hints, tokenizer, model, scheduler, sample)
        if workers.leads:
            save_folder(
                config.output,
                unet=model.unet,
                vae=vae,
                text_encoder=model.text_encoder,
                tokenizer=tokenizer,
                scheduler=scheduler,
                dtype=torch.bfloat16,
                abilities=abilities(data, section),
            )
        workers.wait()
        session.say(f"wrote {config.output}")
    return config.output


def scenes_to_learn(config: TrainConfig) -> SceneData:
    """The scenes that the diffusion model of a configuration learns."""
    section = config.diffusion
    return SceneData.draw(section.pictures, config.seed + 2, section.stage, section.arranged)


def abilities(data: PictureData, section: DiffusionSection) -> Abilities:
    """What a model trained on this data can be asked for: tasks that it has seen hints of, and on scenes
    labels and layouts, which are among their captions.
    """
    hinted = section.hinted > 0
    learned = Abilities(upscaling=UPSCALING if hinted else 0)
    if not isinstance(data, SceneData):
        return learned
    return replace(
        learned,
        classes=len(KINDS),
        labels=KINDS,
        layout=True,
        segmentation=("background", *KINDS) if hinted else (),
        guidance_scale=GUIDANCE,
    )


class Begun(NamedTuple):
    """What the diffusion model is trained with, and the process that it is trained for."""

    vae: Autoencoder
    tokenizer: Tokenizer
    model: TextToLatents
    scheduler: SchedulerConfig


def first_stages(session: Session, folder: FolderData | None) -> Begun:
    """The autoencoder and the text encoder, trained or resumed, and a UNet that starts from nothing; or all
    from the model folder that the configuration starts from, the autoencoder trained on if it says so.

    A model of pixels has an autoencoder that does nothing. Raises what `started` does.
    """
    config = session.config
    section = config.autoencoder
    vae: Autoencoder
    if config.start is not None:
        given = started(config, config.start, session.device)
        tokenizer, text_encoder = given.text
        model = TextToLatents(channels_last(given.unet), text_encoder).requires_grad_(True)
        vae = channels_last(given.vae).requires_grad_(True)
        if not isinstance(vae, PixelAutoencoder) and section.learns:
            _train_autoencoder(session, folder, _pictures(session, folder), vae)
        return Begun(vae, tokenizer, model, given.scheduler)
    data = _pictures(session, folder)
    tokenizer = Tokenizer.from_words(folder.vocabulary() if folder else VOCABULARY, config.text.length)
    text_encoder = new_text_encoder(session, tokenizer)
    if isinstance(data, SceneData):
        train_text_encoder(session, tokenizer, text_encoder, data)
    vae = PixelAutoencoder(PixelConfig())
    if not section.of_pixels:
        vae = _train_autoencoder(session, folder, data)
    side = data.images.shape[1] // vae.config.factor
    unet = new_unet(session, vae.config.latent_channels, text_encoder.config.hidden_size, side)
    return Begun(vae, tokenizer, TextToLatents(unet, text_encoder), config.scheduler)


def _train_autoencoder(
    session: Session,
    folder: FolderData | None,
    data: PictureData,
    vae: AutoencoderKL | VQModel | None = None,
) -> AutoencoderKL | VQModel:
    """Both its turns, then what it gives back of fresh pictures, or of the folder's first."""
    config = session.config
    vae = train_autoencoder(session, data, vae)
    train_decoder(session, vae, data)
    seen = folder or SceneData.draw(JUDGED, config.seed + 1, config.stage)
    what = "the first" if folder else "fresh"
    session.say(f"reconstruction of {what} pictures: {reconstruction_report(vae, seen.images[:JUDGED])}")
    return vae


def _pictures(session: Session, folder: FolderData | None) -> PictureData:
    """What the first stages learn from."""
    if folder is not None:
        return folder
    config = session.config
    session.say(f"drawing {config.pictures} pictures")
    return SceneData.draw(config.pictures, config.seed, config.stage)
