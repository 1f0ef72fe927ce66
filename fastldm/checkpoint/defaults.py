"""What files do not say: the schedulers of single files, those of Stable Diffusion's own folders, and what a
family can be asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastldm.abilities import Abilities
from fastldm.checkpoint.networks import read_network_config
from fastldm.checkpoint.source import ABILITIES
from fastldm.models.bert import BERTConfig
from fastldm.models.conditioners import ClassEmbedderConfig, RescalerConfig

_BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "trained_betas": None,
}
DDIM = {
    "_class_name": "DDIMScheduler",
    **_BETAS,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_PNDM = {
    "_class_name": "PNDMScheduler",
    **_BETAS,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

SCHEDULERS: dict[str, dict[str, Any]] = {
    "sd1": _PNDM,
    "sd1-inpaint": DDIM,
    "sd2": DDIM,
    "sd2-inpaint": DDIM,
}


def default_abilities(family: str, configs: Mapping[str, Mapping[str, Any]]) -> Abilities:
    """What a model of a family can be asked for, with these config.json of its networks."""
    if family.startswith("ldm"):
        return _paper_abilities(family, configs)
    return Abilities(needs="mask") if family.endswith("-inpaint") else Abilities()


def _paper_abilities(family: str, configs: Mapping[str, Mapping[str, Any]]) -> Abilities:
    """What a model of the latent diffusion paper can be asked for, which was trained for one task."""
    plain = Abilities(prompt=False, guides=False)
    if family == "ldm-text":
        return Abilities(guidance_scale=5.0)
    if family == "ldm-class":
        embedder = ClassEmbedderConfig.from_dict(configs["class_embedder"])
        guided = replace(plain, guides=embedder.null_class, guidance_scale=3.0)
        return replace(guided, classes=embedder.classes, needs="label")
    if family == "ldm-layout":
        words = BERTConfig.from_dict(configs["text_encoder"]).vocab_size
        return replace(plain, classes=words - 1, layout=True, needs="layout")
    if family == "ldm-semantic":
        channels = RescalerConfig.from_dict(configs["rescaler"]).in_channels
        classes = tuple(str(number) for number in range(channels))
        return replace(plain, segmentation=classes, inpainting=False, needs="segmentation")
    if family == "ldm-inpaint":
        return replace(plain, inpainting=True, needs="mask")
    if family == "ldm-upscale":
        factor = read_network_config("vae", configs["vae"], Path("vae/config.json")).factor
        return replace(plain, upscaling=factor, inpainting=False, needs="image")
    return plain


def read_abilities(
    family: str, configs: Mapping[str, Mapping[str, Any]], stated: object, file: Path
) -> Abilities:
    """What a model says that it can be asked for, else what its family can; CheckpointError names a wrong
    field.
    """
    if stated is None:
        return default_abilities(family, configs)
    return Abilities.from_dict(stated, str(file), ABILITIES)
