"""What the diffusion model learns: latents of pictures, made once and kept, or the pixels themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastldm.models.hints import hint_channels
from fastldm.models.pixels import Autoencoder, PixelAutoencoder, PixelConfig
from fastldm.models.vae import AutoencoderConfig
from fastldm.training.autoencoder import encode_all
from fastldm.training.data import PictureData, to_model
from fastldm.training.hints import make_hints
from fastldm.training.origin import Origin, digest
from fastldm.training.parallel import Workers
from fastldm.training.session import Session

FILE = "latents.pt"


@dataclass(frozen=True)
class Latents:
    """Posterior means and deviations, float32 [N, C, h, w] each, as the diffusion model sees them."""

    means: Tensor
    deviations: Tensor
    origin: Origin  # what they were made of

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
    origin: Origin  # what they were made of

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


def cached_latents(workers: Workers, folder: Path, vae: Autoencoder, data: PictureData) -> Learned:
    """Those of all pictures, kept in the folder, where a resumed run finds them; made anew where those kept
    are of other pictures or of another encoder.
    """
    origin = _origin(vae, data)
    if isinstance(vae, PixelAutoencoder):
        return Pixels(data.images, vae.config, origin)

    def make() -> dict[str, Any]:
        means, deviations = encode_all(vae, data.images)
        return {"latents": (scaled(vae.config, means), deviations * vae.config.scaling_factor)}

    means, deviations = _kept(workers, folder, len(data.images), origin, make)["latents"]
    return Latents(means, deviations, origin)


def latents_and_hints(session: Session, vae: Autoencoder, data: PictureData) -> tuple[Learned, Tensor]:
    """The latents of all pictures, and hints for the first of them, [n, C + 4, h, w]; kept in the run's
    folder, and made anew like `cached_latents`, or where other hints are asked for.

    Latents of an autoencoder that was trained here are scaled to zero mean and unit variance over all; its
    config takes up the scale and shift.
    """
    config, images, origin = session.config, data.images, _origin(vae, data)
    count = min(config.diffusion.hints, len(images)) if config.diffusion.hinted else 0

    def hints() -> Tensor:
        if not count:
            side = images.shape[1] // vae.config.factor
            return torch.zeros(1, hint_channels(vae.config.latent_channels), side, side)
        generator = torch.Generator().manual_seed(config.seed + 4)
        return make_hints(data, count, lambda part: scaled(vae.config, encode_all(vae, part)[0]), generator)

    if isinstance(vae, PixelAutoencoder):
        return Pixels(images, vae.config, origin), hints()

    def make() -> dict[str, Any]:
        means, deviations = encode_all(vae, images)
        if config.autoencoder.fit is not None:
            scale, shift = 1 / float(means.std()), float(means.mean())
            vae.config = replace(vae.config, scaling_factor=scale, shift_factor=shift)
        scaling = {"scaling_factor": vae.config.scaling_factor, "shift_factor": vae.config.shift_factor}
        latents = scaled(vae.config, means), deviations * vae.config.scaling_factor
        return {**scaling, "latents": latents, "hints": hints()}

    hinted = {"hints": f"{count} of seed {config.seed}"}
    kept = _kept(session.workers, config.folder, len(images), {**origin, **hinted}, make)
    scaling = {name: kept[name] for name in ("scaling_factor", "shift_factor")}
    vae.config = replace(vae.config, **scaling)
    means, deviations = kept["latents"]
    return Latents(means, deviations, origin), kept["hints"]


def _origin(vae: Autoencoder, data: PictureData) -> Origin:
    """What latents are made of; the decoder has no part in them."""
    encoder = {name: value for name, value in vae.state_dict().items() if not name.startswith("decoder.")}
    return {"set of pictures": data.pictures_digest, "encoder": digest(vae.config, encoder)}


def _kept(
    workers: Workers, folder: Path, count: int, origin: Origin, make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What the folder's file holds, made first where there is none, and anew where it is of another origin.
    A file of before origins were kept is taken for what it should be if it has as many pictures.
    """
    file = folder / FILE
    if workers.leads and file.exists():
        found = torch.load(file, weights_only=True, mmap=True)
        stale = found.get("origin", origin) != origin or len(found["latents"][0]) != count
        del found
        if stale:
            file.unlink()
    made: dict[str, Any] = workers.kept(file, lambda: {**make(), "origin": dict(origin)})
    return made
