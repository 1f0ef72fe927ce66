"""A LoRA of a loaded model, learned from a folder of pictures or from scenes: `[lora]` in a configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastldm.checkpoint import Components, load_components
from fastldm.errors import InvalidArgument
from fastldm.models.layers import channels_last
from fastldm.scenes import IMAGE_SIZE
from fastldm.training.config import LoraConfig
from fastldm.training.data import PictureData, SceneData
from fastldm.training.folder import FolderData
from fastldm.training.latents import cached_latents
from fastldm.training.lora import LoraModel, fit_lora
from fastldm.training.parallel import joined, local_device
from fastldm.training.samples import PROMPTS, SHOWN, draw_samples


def learn_lora(config: LoraConfig, report: Callable[[str], None] = print, strict: bool = False) -> Path:
    """Learn it from the seed, or resume, and return the folder that it was written to.

    The pictures' latents are made once and kept in the run's folder. Raises InvalidArgument for a target
    that names no layer and for a side that the model's levels do not divide.
    """
    device = local_device(config.device)
    with joined(device) as workers:

        def say(text: str) -> None:
            if workers.leads:
                report(text)

        components = load_components(config.start, device=device)
        vae, scheduler = channels_last(components.vae), components.scheduler
        channels_last(components.unet)
        model = LoraModel(components, config.lora, config.seed)
        data = _pictures(config, components, strict, say)
        latents = cached_latents(workers, config.folder, vae, data)
        prompts = data.texts[:SHOWN] if isinstance(data, FolderData) else PROMPTS

        def draw(generator: torch.Generator) -> tuple[Tensor, list[str]]:
            rows = torch.randint(len(latents), (config.lora.fit.batch,), generator=generator)
            texts = [text for text, _ in data.captions(rows.tolist(), generator)]
            return latents.draw(rows, generator), texts

        def sample(step: int) -> None:
            file = config.folder / f"samples-{step}.png"
            draw_samples(file, vae, model, scheduler, components.text[0], prompts, latents.side)

        fit_lora(
            model,
            components,
            draw,
            config.folder,
            config.seed,
            report,
            origin={**latents.origin, "set of captions": data.captions_digest},
            bfloat16=config.bfloat16,
            workers=workers,
            sample=sample,
            tensorboard=config.tensorboard,
        )
        if workers.leads:
            model.write(config.output)
        workers.wait()
        say(f"wrote {config.output}")
    return config.output


def _pictures(
    config: LoraConfig, components: Components, strict: bool, say: Callable[[str], None]
) -> PictureData:
    """The folder's, of the configured side or of the model's own; or scenes."""
    unet, factor = components.unet.config, components.vae.config.factor
    side = config.side or (IMAGE_SIZE if config.data is None else unet.sample_size * factor)
    multiple = factor * 2 ** (len(unet.block_out_channels) - 1)
    if side % multiple:
        raise InvalidArgument("side", side, f"a multiple of {multiple}, which the model's levels divide")
    if config.data is not None:
        return FolderData.read(config.data, side, strict, say)
    say(f"drawing {config.pictures} pictures")
    return SceneData.draw(config.pictures, config.seed, config.stage)
