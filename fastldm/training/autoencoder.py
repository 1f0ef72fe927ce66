"""The first stage: a KL autoencoder. (Rombach et al. 2022, arXiv:2112.10752, section 3.1 and appendix G)"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.models.layers import Conv2d, channels_last
from fastldm.models.vae import AutoencoderKL, DiagonalGaussian, VAEConfig
from fastldm.scenes import KINDS
from fastldm.training.config import AutoencoderSection
from fastldm.training.data import PictureData, share_loss, shares, to_model
from fastldm.training.fit import FitSettings
from fastldm.training.reconstruction import psnr, to_pixels
from fastldm.training.session import Session


class Alignment(nn.Module):
    """An autoencoder whose latents also tell what stands where: a small head reads the segmentation map.

    Latents that mean something are much easier to generate. The head is for training alone.
    (Yao & Wang 2025, arXiv:2501.01423)
    """

    def __init__(self, vae: AutoencoderKL, width: int = 48) -> None:
        super().__init__()
        self.vae = vae
        self.head = nn.ModuleList(
            [Conv2d(vae.config.latent_channels, width, 1), Conv2d(width, 1 + len(KINDS), 1)]
        )

    def loss(self, latents: Tensor, segmentation: Tensor) -> Tensor:
        """Cross-entropy between the classes read in each cell and the share of its pixels that each has.

        latents [N, C, h, w]; segmentation uint8 [N, f·h, f·w].
        """
        wanted = shares(segmentation, self.vae.config.factor, 1 + len(KINDS))
        return share_loss(self.head[1](F.silu(self.head[0](latents))), wanted)


def reconstruction_loss(images: Tensor, decoded: Tensor) -> Tensor:
    """mean |x − x̂| + mean (x − x̂)², in float32 or wider."""
    error = images - decoded.to(images.dtype)
    return error.abs().mean() + error.square().mean()


def drawn(posterior: DiagonalGaussian, generator: torch.Generator, noise: float) -> Tensor:
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


def autoencoder_loss(
    model: Alignment,
    images: Tensor,
    segmentation: Tensor,
    generator: torch.Generator,
    section: AutoencoderSection,
) -> Tensor:
    """Reconstruction + kl_weight · mean over images of KL(q(z|x) ‖ N(0, 1)) + alignment · reading the map."""
    posterior = model.vae.encode(images)
    posterior = DiagonalGaussian(posterior.mean.to(images.dtype), posterior.logvar.to(images.dtype))
    latents = drawn(posterior, generator, section.noise)
    loss = reconstruction_loss(images, model.vae.decode(latents)) + section.kl_weight * posterior.kl().mean()
    if section.alignment:
        loss = loss + section.alignment * model.loss(latents, segmentation)
    return loss


@torch.inference_mode()
def encode_all(vae: AutoencoderKL, images: Tensor, batch: int = 32) -> tuple[Tensor, Tensor]:
    """Posterior means and standard deviations of pictures uint8 [N, H, W, 3], unscaled: float32 [N, C, h, w]
    each, on the CPU.
    """
    device = next(vae.parameters()).device
    means, deviations = [], []
    for part in images.split(batch):
        posterior = vae.encode(to_model(part.to(device)))
        means.append(posterior.mean.contiguous().cpu())
        deviations.append(torch.exp(0.5 * posterior.logvar).contiguous().cpu())
    return torch.cat(means), torch.cat(deviations)


@torch.inference_mode()
def mean_psnr(vae: AutoencoderKL, images: Tensor, batch: int = 16) -> float:
    """Of reconstructions from the posterior mean, in dB: the mean over pictures uint8 [N, H, W, 3]."""
    device = next(vae.parameters()).device
    parts = [
        psnr(part, to_pixels(vae.decode(vae.encode(to_model(part.to(device))).mean)).cpu())
        for part in images.split(batch)
    ]
    return float(torch.cat(parts).mean())


def train_autoencoder(session: Session, data: PictureData) -> AutoencoderKL:
    """Train from the seed, or resume; its scaling factor is set later, from the latents it makes."""
    section = session.config.autoencoder
    torch.manual_seed(session.config.seed)
    vae = AutoencoderKL(
        VAEConfig(
            block_out_channels=section.block_out_channels,
            latent_channels=section.latent_channels,
            layers_per_block=section.layers_per_block,
            norm_num_groups=section.norm_num_groups,
        )
    )
    model = channels_last(Alignment(vae)).to(session.device)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        images, segmentation = _batch(session, section.fit, data, step, generator)
        return autoencoder_loss(model, images, segmentation, generator, section)

    session.fit("autoencoder", model, loss, section.fit, seed=0)
    return vae


def train_decoder(session: Session, vae: AutoencoderKL, data: PictureData) -> None:
    """Go on with the decoder alone, if the configuration says so; the encoder, and so every latent, stays."""
    section = session.config.autoencoder
    settings = section.decoder
    if settings is None:
        return

    def loss(step: int, generator: torch.Generator) -> Tensor:
        images, _ = _batch(session, settings, data, step, generator)
        with torch.no_grad():
            posterior = vae.encode(images)
        return reconstruction_loss(images, vae.decode(drawn(posterior, generator, section.noise)))

    session.fit("decoder", vae.decoder, loss, settings, seed=3)


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
