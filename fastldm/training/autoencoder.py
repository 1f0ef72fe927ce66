"""The first stage: a KL autoencoder. (Rombach et al. 2022, arXiv:2112.10752, section 3.1 and appendix G)"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastldm.models.layers import channels_last
from fastldm.models.vae import AutoencoderKL, DiagonalGaussian, VAEConfig
from fastldm.training.config import AutoencoderSection, TrainConfig
from fastldm.training.data import SceneData, to_model
from fastldm.training.fit import FitSettings, fit


def autoencoder_loss(
    vae: AutoencoderKL, images: Tensor, generator: torch.Generator, kl_weight: float
) -> Tensor:
    """mean |x − x̂| + mean (x − x̂)² + kl_weight · mean over images of KL(q(z|x) ‖ N(0, 1))."""
    posterior = vae.encode(images)
    return reconstruction_loss(vae, images, posterior, generator) + kl_weight * posterior.kl().mean()


def reconstruction_loss(
    vae: AutoencoderKL, images: Tensor, posterior: DiagonalGaussian, generator: torch.Generator
) -> Tensor:
    """mean |x − x̂| + mean (x − x̂)² of a decoded draw from the posterior."""
    noise = torch.randn(posterior.mean.shape, generator=generator)
    error = images - vae.decode(posterior.sample(noise.to(images.dtype)))
    return error.abs().mean() + error.square().mean()


@torch.inference_mode()
def encode_all(vae: AutoencoderKL, data: SceneData, batch: int = 32) -> tuple[Tensor, Tensor]:
    """Posterior means and standard deviations of all pictures, unscaled: float32 [N, C, h, w] each."""
    means, deviations = [], []
    for images in data.images.split(batch):
        posterior = vae.encode(to_model(images))
        means.append(posterior.mean.contiguous())
        deviations.append(torch.exp(0.5 * posterior.logvar).contiguous())
    return torch.cat(means), torch.cat(deviations)


@torch.inference_mode()
def psnr(vae: AutoencoderKL, data: SceneData, batch: int = 16) -> float:
    """Peak signal-to-noise ratio of reconstructions from the posterior mean, in dB, over pictures."""
    values = []
    for images in data.images.split(batch):
        decoded = vae.decode(vae.encode(to_model(images)).mean).clamp(-1, 1)
        shown = (decoded.permute(0, 2, 3, 1) * 127.5 + 127.5).round()
        error = (shown - images.float()).square().mean(dim=(1, 2, 3)).clamp_min(1e-3)
        values.append(10 * torch.log10(255.0**2 / error))
    return float(torch.cat(values).mean())


def train_autoencoder(
    config: TrainConfig, data: SceneData, report: Callable[[str], None] = print
) -> AutoencoderKL:
    """Train from the seed, or resume; its scaling factor is set later, from the latents it makes."""
    section = config.autoencoder
    torch.manual_seed(config.seed)
    vae = channels_last(
        AutoencoderKL(
            VAEConfig(
                block_out_channels=section.block_out_channels,
                latent_channels=section.latent_channels,
                layers_per_block=section.layers_per_block,
                norm_num_groups=section.norm_num_groups,
            )
        )
    )

    def loss(step: int, generator: torch.Generator) -> Tensor:
        images = _batch(section, section.fit, data, step, generator)
        return autoencoder_loss(vae, images, generator, section.kl_weight)

    fit("autoencoder", vae, loss, section.fit, config.folder, config.seed, report)
    return vae


def train_decoder(
    config: TrainConfig, vae: AutoencoderKL, data: SceneData, report: Callable[[str], None] = print
) -> None:
    """Go on with the decoder alone, if the configuration says so; the encoder, and so every latent, stays."""
    section, settings = config.autoencoder, config.autoencoder.decoder
    if settings is None:
        return

    def loss(step: int, generator: torch.Generator) -> Tensor:
        images = _batch(section, settings, data, step, generator)
        with torch.no_grad():
            posterior = vae.encode(images)
        return reconstruction_loss(vae, images, posterior, generator)

    fit("decoder", vae.decoder, loss, settings, config.folder, config.seed + 3, report)


def _batch(
    section: AutoencoderSection, settings: FitSettings, data: SceneData, step: int, generator: torch.Generator
) -> Tensor:
    """Crops, and in the last share of the steps whole pictures, as many pixels a batch."""
    size = data.images.shape[1]
    if step < round(settings.steps * (1 - section.whole)):
        return data.crops(settings.batch, section.crop, generator)
    return data.crops(max(1, settings.batch * section.crop**2 // size**2), size, generator)
