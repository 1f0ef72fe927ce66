"""The second stage: a latent diffusion model with classifier-free guidance, trained with L_simple.

(Ho et al. 2020, arXiv:2006.11239; Rombach et al. 2022, arXiv:2112.10752; velocity target: Salimans & Ho
2022, arXiv:2202.00512; caption dropout: Ho & Salimans 2022, arXiv:2207.12598)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastldm.diffusion import SchedulerConfig, add_noise, alphas_cumprod, simple_loss, target
from fastldm.models.clip import CLIPTextModel
from fastldm.models.layers import channels_last
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.unet import UNet, UNetConfig
from fastldm.training.config import TrainConfig
from fastldm.training.data import SceneData
from fastldm.training.fit import fit
from fastldm.training.text import token_ids

# A flat picture of 16 × 16 latents shows through much noise, so half of the steps have to be noisier than
# the cosine schedule makes them. It ends in pure noise, so that a background of any colour can be drawn;
# velocity is defined there, ε is not. (Lin et al. 2023, arXiv:2305.08891)
SCHEDULER = SchedulerConfig.from_dict(
    {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "num_train_timesteps": 1000,
        "clip_sample": False,
        "set_alpha_to_one": True,
    }
)


class TextToLatents(nn.Module):
    """The UNet and its text encoder, trained together."""

    def __init__(self, unet: UNet, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """noisy [rows, C, h, w], timesteps [rows], token ids [rows, L] → prediction."""
        rows = noisy.shape[0]
        condition = self.unet.condition(self.text_encoder(ids), timesteps.float()[:, None])
        prediction: Tensor = self.unet(
            noisy, condition, torch.zeros(rows, dtype=torch.long, device=noisy.device)
        )
        return prediction


def train_diffusion(
    config: TrainConfig,
    data: SceneData,
    latents: tuple[Tensor, Tensor],
    tokenizer: Tokenizer,
    text_encoder: CLIPTextModel,
    report: Callable[[str], None] = print,
) -> TextToLatents:
    """Train from the seed, or resume, on scaled latents: posterior means and deviations [N, C, h, w]."""
    section = config.diffusion
    means, deviations = latents
    channels, side = means.shape[1], means.shape[-1]
    torch.manual_seed(config.seed + 2)
    unet = channels_last(
        UNet(
            UNetConfig(
                in_channels=channels,
                out_channels=channels,
                block_out_channels=section.block_out_channels,
                layers_per_block=section.layers_per_block,
                heads=section.heads,
                transformer_depth=section.transformer_depth,
                cross_attention_dim=text_encoder.config.hidden_size,
                norm_num_groups=section.norm_num_groups,
                sample_size=side,
            )
        )
    )
    nn.init.zeros_(unet.conv_out.weight)
    model = TextToLatents(unet, text_encoder)
    kept = alphas_cumprod(SCHEDULER)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(data.scenes), (section.fit.batch,), generator=generator)
        texts, _ = data.captions(rows.tolist(), generator)
        dropped = torch.rand(len(texts), generator=generator) < section.caption_dropout
        texts = ["" if drop else text for text, drop in zip(texts, dropped.tolist(), strict=True)]
        shape = (len(texts), channels, side, side)
        clean = means[rows] + deviations[rows] * torch.randn(shape, generator=generator)
        noise = torch.randn(shape, generator=generator)
        times = torch.randint(len(kept), (len(texts),), generator=generator)
        alpha, sigma = kept[times].sqrt().float(), (1 - kept[times]).sqrt().float()
        predicted = model(add_noise(clean, noise, alpha, sigma), times, token_ids(tokenizer, texts))
        return simple_loss(predicted, target(SCHEDULER.prediction, clean, noise, alpha, sigma)).mean()

    fit("diffusion", model, loss, section.fit, config.folder, config.seed + 2, report)
    return model
