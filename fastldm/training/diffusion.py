"""The second stage: a latent diffusion model with classifier-free guidance, trained with L_simple.

(Ho et al. 2020, arXiv:2006.11239; Rombach et al. 2022, arXiv:2112.10752; velocity target: Salimans & Ho
2022, arXiv:2202.00512; caption dropout: Ho & Salimans 2022, arXiv:2207.12598)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastldm.diffusion import Criterion
from fastldm.models.clip import CLIPTextModel
from fastldm.models.hints import hint_channels
from fastldm.models.layers import channels_last
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.unet import UNet, UNetConfig
from fastldm.training.data import PictureData
from fastldm.training.session import Session
from fastldm.training.text import token_ids


class TextToLatents(nn.Module):
    """The UNet and its text encoder, trained together."""

    def __init__(self, unet: UNet, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, hint: Tensor | None = None) -> Tensor:
        """noisy [rows, C, h, w], timesteps [rows], token ids [rows, L], hint [rows, C + 4, h, w] where the
        UNet has room for one → prediction.
        """
        rows = noisy.shape[0]
        condition = self.unet.condition(self.text_encoder(ids), timesteps.float()[:, None], hint)
        prediction: Tensor = self.unet(
            noisy, condition, torch.zeros(rows, dtype=torch.long, device=noisy.device)
        )
        return prediction


def new_unet(session: Session, latent_channels: int, context_width: int, side: int) -> UNet:
    """The UNet of a configuration, with a hint block, from the seed."""
    section = session.config.diffusion
    torch.manual_seed(session.config.seed + 2)
    unet = UNet(
        UNetConfig(
            in_channels=latent_channels + hint_channels(latent_channels),
            out_channels=latent_channels,
            block_out_channels=section.block_out_channels,
            layers_per_block=section.layers_per_block,
            heads=section.heads,
            transformer_depth=section.transformer_depth,
            cross_attention_dim=context_width,
            norm_num_groups=section.norm_num_groups,
            sample_size=side,
        )
    )
    nn.init.zeros_(unet.conv_out.weight)
    return channels_last(unet).to(session.device)


def train_diffusion(
    session: Session,
    data: PictureData,
    latents: tuple[Tensor, Tensor],
    hints: Tensor,
    tokenizer: Tokenizer,
    model: TextToLatents,
    sample: Callable[[int], None],
) -> None:
    """Train from the seed, or resume, on scaled latents, posterior means and deviations [N, C, h, w], and the
    hints of the first of them [n, C + 4, h, w].
    """
    section, device = session.config.diffusion, session.device
    means, deviations = latents
    criterion = Criterion(section.objective, section.scheduler)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        batch = section.fit.batch
        rows = torch.randint(len(means), (batch,), generator=generator)
        hinted = torch.rand(batch, generator=generator) < section.hinted
        rows = torch.where(hinted, rows % len(hints), rows)
        hint = hints[rows % len(hints)] * hinted[:, None, None, None]
        texts = [text for text, _ in data.captions(rows.tolist(), generator)]
        dropped = torch.rand(batch, generator=generator) < section.caption_dropout
        texts = ["" if drop else text for text, drop in zip(texts, dropped.tolist(), strict=True)]
        clean = means[rows] + deviations[rows] * torch.randn(means[rows].shape, generator=generator)
        ids = token_ids(tokenizer, texts).to(device)
        return criterion(model, clean.to(device), ids, hint.to(device), generator=generator).mean()

    session.fit("diffusion", model, loss, section.fit, seed=2, sample=sample)
