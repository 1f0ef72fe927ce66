"""The model that a run goes on from, and whether it is what the configuration says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastldm.checkpoint import Components, load_components
from fastldm.errors import CheckpointError, InvalidArgument
from fastldm.models.pixels import PixelAutoencoder
from fastldm.models.vq import VQModel
from fastldm.training.config import TrainConfig

_UNET = ("block_out_channels", "transformer_depth", "layers_per_block", "norm_num_groups")
_AUTOENCODER = (
    "block_out_channels",
    "latent_channels",
    "layers_per_block",
    "norm_num_groups",
    "attention_levels",
    "mid_attention",
)
"""Keys of a section that say what a network's own configuration says too."""
_NAMED_OTHERWISE = {"mid_attention": "mid_block_add_attention"}

Expect = Callable[[str, object, object, bool], None]


def started(config: TrainConfig, start: Path, device: torch.device) -> Components:
    """The model that a configuration starts from, with its own process, in which alone its weights have a
    meaning. InvalidArgument where the configuration asks for what the model is not: its shapes, latents or
    pixels, another prediction, another kind of variance, hints. CheckpointError for an inpainting model.
    """
    section = config.diffusion
    given = load_components(start, device=device)
    unet, vae, process = given.unet.config, given.vae, given.scheduler

    def expect(name: str, value: object, own: object, fits: bool) -> None:
        if not fits:
            raise InvalidArgument(name, value, f"{own}, as in {start}")

    of_pixels = isinstance(vae, PixelAutoencoder)
    kinds = ("pixels",) if of_pixels else ("kl", "vq") if isinstance(vae, VQModel) else ("kl",)
    asked = config.autoencoder.kind
    expect("autoencoder.kind", asked, kinds[-1], asked in kinds)
    if not isinstance(vae, PixelAutoencoder):
        _same_shape(config.autoencoder, vae.config, _AUTOENCODER, "autoencoder.", expect)
    _same_shape(section, unet, _UNET, "diffusion.", expect)
    heads = [
        tuple(count for count, depth in zip(counts, [*unet.transformer_depth[:-1], 1], strict=True) if depth)
        for counts in (section.heads, unet.heads)
    ]
    expect("diffusion.heads", _listed(section.heads), _listed(unet.heads), heads[0] == heads[1])
    loss, learns = section.objective.loss, unet.learned_variance
    own = "hybrid or vlb" if learns else "simple or absolute"
    expect("diffusion.objective.loss", loss, own, section.learns_variance == learns)
    fits = section.prediction in (None, process.prediction)
    expect("diffusion.prediction", section.prediction, process.prediction, fits)
    expect("diffusion.shift", section.shift, process.shift, section.shift in (1.0, process.shift))
    expect(
        "diffusion.hinted", section.hinted, 0, not section.hinted or unet.in_channels > unet.latent_channels
    )
    if unet.inpaints:
        raise CheckpointError(given.path, "unet in_channels", "an inpainting model cannot be trained on yet")
    section.check(process, "diffusion.")
    return given


def _same_shape(section: Any, own: Any, keys: Sequence[str], prefix: str, expect: Expect) -> None:
    """Expect these keys to say what the network has, or nothing: a default says nothing."""
    for key in keys:
        asked, has = getattr(section, key), getattr(own, _NAMED_OTHERWISE.get(key, key))
        unsaid = asked == getattr(type(section), key, None)
        expect(prefix + key, _listed(asked), _listed(has), unsaid or asked == has)


def _listed(value: Any) -> Any:
    """As TOML has it."""
    return list(value) if isinstance(value, tuple) else value
