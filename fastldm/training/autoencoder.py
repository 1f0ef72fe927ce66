"""The first stage: an autoencoder, KL or quantising. (Rombach et al. 2022, arXiv:2112.10752, section 3.1 and
appendix G)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.models.layers import Conv2d, channels_last
from fastldm.models.pixels import Autoencoder
from fastldm.models.vae import AutoencoderKL, DiagonalGaussian, PointMass, VAEConfig
from fastldm.models.vq import VQConfig, VQModel
from fastldm.scenes import KINDS
from fastldm.training.adversarial import adversarial_losses
from fastldm.training.config import AutoencoderSection
from fastldm.training.data import PictureData, share_loss, shares, to_model
from fastldm.training.fit import FitSettings
from fastldm.training.origin import NONE, digest
from fastldm.training.perceptual import LPIPS, Perceptual, laplacian_distance
from fastldm.training.session import Session


class AutoencoderTraining(nn.Module):
    """An autoencoder, and what is there for its training alone: a small head that reads the segmentation map
    from the latents, and, if the configuration has an adversary, its critic.

    Latents that mean something are much easier to generate. (Yao & Wang 2025, arXiv:2501.01423)
    """

    def __init__(self, vae: AutoencoderKL | VQModel, width: int = 48) -> None:
        super().__init__()
        self.vae = vae
        self.head = nn.ModuleList(
            [Conv2d(vae.config.latent_channels, width, 1), Conv2d(width, 1 + len(KINDS), 1)]
        )
        self.critic: nn.Module | None = None

    def alignment(self, latents: Tensor, segmentation: Tensor) -> Tensor:
        """Cross-entropy between the classes read in each cell and the share of its pixels that each has.

        latents [N, C, h, w]; segmentation uint8 [N, f·h, f·w].
        """
        wanted = shares(segmentation, self.vae.config.factor, 1 + len(KINDS))
        return share_loss(self.head[1](F.silu(self.head[0](latents))), wanted)


def drawn(posterior: DiagonalGaussian | PointMass, generator: torch.Generator, noise: float) -> Tensor:
    """A draw from the posterior, and on top of it noise of up to `noise` of the latents' deviation, by lot a
    row: what a decoder must see through, for generated latents are never quite right.
    """
    mean = posterior.mean
    latents = posterior.sample(torch.randn(mean.shape, generator=generator, dtype=mean.dtype).to(mean.device))
    if noise:
        level = noise * torch.rand((len(mean), 1, 1, 1), generator=generator)
        more = (level * torch.randn(mean.shape, generator=generator)).to(mean.device)
        latents = latents + mean.detach().std() * more
    return latents


def reconstruction_loss(images: Tensor, decoded: Tensor) -> Tensor:
    """mean |x − x̂| + mean (x − x̂)², in the pictures' dtype."""
    error = images - decoded.to(images.dtype)
    return error.abs().mean() + error.square().mean()


class AutoencoderLoss:
    """The loss of a configuration.

    Reconstruction, + kl_weight · mean over images of KL(q(z|x) ‖ N(0, 1)) or codebook_weight · the
    quantiser's loss, + alignment · reading the map, + from its start on the game against the critic.
    """

    def __init__(self, section: AutoencoderSection, device: torch.device) -> None:
        self.section = section
        self.distance: Perceptual = laplacian_distance
        if section.lpips is not None:
            self.distance = LPIPS.load(section.lpips).to(device)

    def reconstruction(self, images: Tensor, decoded: Tensor) -> Tensor:
        """mean |x − x̂| + mean (x − x̂)² + perceptual · mean distance, in float32 or wider."""
        decoded = decoded.to(images.dtype)
        loss = reconstruction_loss(images, decoded)
        if self.section.perceptual:
            loss = loss + self.section.perceptual * self.distance(images, decoded).mean()
        return loss

    def __call__(
        self,
        model: AutoencoderTraining,
        step: int,
        images: Tensor,
        segmentation: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """The loss of images [N, 3, H, W] in −1…1 and their maps uint8 [N, H, W]."""
        section, vae = self.section, model.vae
        if isinstance(vae, VQModel):
            latents = drawn(vae.encode(images).to(images.dtype), generator, section.noise)
            quantised = vae.quantize(latents)
            decoded = vae.decode(quantised.latents, force_not_quantize=True)
            rest = section.codebook_weight * quantised.loss
        else:
            posterior = vae.encode(images).to(images.dtype)
            latents = drawn(posterior, generator, section.noise)
            decoded = vae.decode(latents)
            rest = section.kl_weight * posterior.kl().mean()
        reconstruction = self.reconstruction(images, decoded)
        loss = reconstruction + rest
        if section.alignment:
            loss = loss + section.alignment * model.alignment(latents, segmentation)
        if section.adversary is not None and model.critic is not None and step >= section.adversary.start:
            last = vae.decoder.conv_out.weight
            game = adversarial_losses(section.adversary, model.critic, images, decoded, reconstruction, last)
            loss = loss + sum(game)
        return loss


@torch.inference_mode()
def encode_all(vae: Autoencoder, images: Tensor, batch: int = 32) -> tuple[Tensor, Tensor]:
    """Posterior means and standard deviations of pictures uint8 [N, H, W, 3], unscaled: float32 [N, C, h, w]
    each, on the CPU.
    """
    device = next((weight.device for weight in vae.parameters()), images.device)
    means, deviations = [], []
    for part in images.split(batch):
        posterior = vae.encode(to_model(part.to(device)))
        means.append(posterior.mean.contiguous().cpu())
        deviations.append(posterior.std.contiguous().cpu())
    return torch.cat(means), torch.cat(deviations)


def new_autoencoder(section: AutoencoderSection) -> AutoencoderKL | VQModel:
    """The autoencoder of a configuration, its weights drawn from the global generator."""
    shape: dict[str, Any] = {
        "block_out_channels": section.block_out_channels,
        "latent_channels": section.latent_channels,
        "layers_per_block": section.layers_per_block,
        "norm_num_groups": section.norm_num_groups,
        "attention_levels": section.attention_levels,
        "mid_block_add_attention": section.mid_attention,
    }
    if section.kind == "vq":
        return VQModel(VQConfig(**shape, num_vq_embeddings=section.codes))
    return AutoencoderKL(VAEConfig(**shape))


def train_autoencoder(
    session: Session, data: PictureData, vae: AutoencoderKL | VQModel | None = None
) -> AutoencoderKL | VQModel:
    """Train one from the seed, or go on with a given one, or resume; its scaling factor is set later, from
    the latents it makes. Without `autoencoder.fit` the given one stays as it is.
    """
    section = session.config.autoencoder
    settings = section.fit
    if settings is None:
        assert vae is not None  # the configuration says so
        return vae
    torch.manual_seed(session.config.seed)
    start = NONE if vae is None else digest(vae)
    if vae is None:
        vae = new_autoencoder(section)
    model = AutoencoderTraining(vae)
    if section.adversary is not None:
        model.critic = section.adversary.critic()
    model = channels_last(model).to(session.device)
    objective = AutoencoderLoss(section, session.device)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        images, segmentation = _batch(session, settings, data, step, generator)
        return objective(model, step, images, segmentation, generator)

    origin = {"set of pictures": data.pictures_digest, "network": digest(vae.config), "start": start}
    session.fit("autoencoder", model, loss, settings, seed=0, critic=model.critic, origin=origin)
    return vae


def train_decoder(session: Session, vae: AutoencoderKL | VQModel, data: PictureData) -> None:
    """Go on with the decoder alone, if the configuration says so; the encoder, and so every latent, stays."""
    section = session.config.autoencoder
    settings = section.decoder
    if settings is None:
        return
    objective = AutoencoderLoss(section, session.device)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        images, _ = _batch(session, settings, data, step, generator)
        with torch.no_grad():
            latents = drawn(vae.encode(images), generator, section.noise)
        return objective.reconstruction(images, vae.decode(latents))

    origin = {"set of pictures": data.pictures_digest, "autoencoder": digest(vae.config, vae)}
    session.fit("decoder", vae.decoder, loss, settings, seed=3, origin=origin)


def _batch(
    session: Session, settings: FitSettings, data: PictureData, step: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Crops, and in the last share of the steps whole pictures, as many pixels a batch."""
    section, size = session.config.autoencoder, data.images.shape[1]
    rows, side = settings.batch, section.crop
    if step >= round(settings.steps * (1 - section.whole)):
        rows, side = max(1, rows * side**2 // size**2), size
    images, maps = data.crops(rows, side, generator)
    return images.to(session.device), maps.to(session.device)
