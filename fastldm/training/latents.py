"""What the diffusion model learns: latents of pictures, made once and kept, or the pixels themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastldm.errors import CheckpointError
from fastldm.models.hints import hint_channels
from fastldm.models.pixels import Autoencoder, PixelAutoencoder, PixelConfig
from fastldm.models.vae import AutoencoderConfig
from fastldm.training.autoencoder import encode_all
from fastldm.training.data import PictureData, to_model
from fastldm.training.hints import make_hints
from fastldm.training.parallel import Workers
from fastldm.training.session import Session

FILE = "latents.pt"


@dataclass(frozen=True)
class Latents:
    """Posterior means and deviations, float32 [N, C, h, w] each, as the diffusion model sees them."""

    means: Tensor
    deviations: Tensor

    def __len__(self) -> int:
        return len(self.means)

    @property
    def side(self) -> int:
        """Of each, square."""
        return self.means.shape[-1]

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """A draw from the posterior of each of these rows."""
        means = self.means[rows]
        return means + self.deviations[rows] * torch.randn(means.shape, generator=generator)


@dataclass(frozen=True)
class Pixels:
    """Pictures uint8 [N, S, S, 3] as their own latents: only those drawn become floats."""

    images: Tensor
    config: PixelConfig

    def __len__(self) -> int:
        return len(self.images)

    @property
    def side(self) -> int:
        """Of each, square."""
        return self.images.shape[1]

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """These rows, scaled; nothing is left to chance."""
        return scaled(self.config, to_model(self.images[rows]))


Learned: TypeAlias = Latents | Pixels


def scaled(config: AutoencoderConfig | PixelConfig, latents: Tensor) -> Tensor:
    """An autoencoder's latents as the diffusion model sees them."""
    return (latents - config.shift_factor) * config.scaling_factor


def cached_latents(workers: Workers, folder: Path, vae: Autoencoder, images: Tensor) -> Learned:
    """Those of pictures uint8 [N, S, S, 3], kept in the folder, where a resumed run finds them."""
    if isinstance(vae, PixelAutoencoder):
        return Pixels(images, vae.config)

    def make() -> dict[str, Any]:
        means, deviations = encode_all(vae, images)
        return {"latents": (scaled(vae.config, means), deviations * vae.config.scaling_factor)}

    return Latents(*_kept(workers, folder, images, make)["latents"])


def latents_and_hints(session: Session, vae: Autoencoder, data: PictureData) -> tuple[Learned, Tensor]:
    """The latents of all pictures, and hints for the first of them, [n, C + 4, h, w]; kept in the run's
    folder.

    Latents of an autoencoder that was trained here are scaled to zero mean and unit variance over all; its
    config takes up the scale and shift.
    """
    config, images = session.config, data.images

    def hints() -> Tensor:
        if not config.diffusion.hinted:
            side = images.shape[1] // vae.config.factor
            return torch.zeros(1, hint_channels(vae.config.latent_channels), side, side)
        generator = torch.Generator().manual_seed(config.seed + 4)
        count = min(config.diffusion.hints, len(images))
        return make_hints(data, count, lambda part: scaled(vae.config, encode_all(vae, part)[0]), generator)

    if isinstance(vae, PixelAutoencoder):
        return Pixels(images, vae.config), hints()

    def make() -> dict[str, Any]:
        means, deviations = encode_all(vae, images)
        if config.autoencoder.fit is not None:
            scale, shift = 1 / float(means.std()), float(means.mean())
            vae.config = replace(vae.config, scaling_factor=scale, shift_factor=shift)
        scaling = {"scaling_factor": vae.config.scaling_factor, "shift_factor": vae.config.shift_factor}
        latents = scaled(vae.config, means), deviations * vae.config.scaling_factor
        return {**scaling, "latents": latents, "hints": hints()}

    kept = _kept(session.workers, config.folder, images, make)
    latents, given = Latents(*kept.pop("latents")), kept.pop("hints")
    vae.config = replace(vae.config, **kept)
    return latents, given


def _kept(workers: Workers, folder: Path, images: Tensor, make: Callable[[], dict[str, Any]]) -> Any:
    """What the folder's file holds, made first where there is none; CheckpointError if of other pictures."""
    file = folder / FILE
    kept = workers.kept(file, make)
    count = len(kept["latents"][0])
    if count != len(images):
        why = f"holds latents of {count} pictures, and there are {len(images)}; remove it"
        raise CheckpointError(file, None, why)
    return kept
