"""The second stage: a latent diffusion model with classifier-free guidance. (Rombach et al. 2022,
arXiv:2112.10752)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastldm.diffusion import Criterion, SchedulerConfig
from fastldm.models.bert import BERTModel
from fastldm.models.clip import CLIPTextModel
from fastldm.models.hints import hint_channels
from fastldm.models.layers import Conv2d, channels_last
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.unet import UNet, UNetConfig
from fastldm.scenes import COLOURS, KINDS
from fastldm.training.data import PictureData, SceneData, share_loss
from fastldm.training.latents import Learned
from fastldm.training.origin import NONE, Origin, digest
from fastldm.training.session import Session
from fastldm.training.text import token_ids, vocabulary_digest, without_some


class TextToLatents(nn.Module):
    """The UNet and its text encoder, trained together."""

    def __init__(self, unet: UNet, text_encoder: CLIPTextModel | BERTModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    @property
    def takes_hints(self) -> bool:
        """Whether the UNet has channels for a hint beside the latents."""
        return self.unet.config.in_channels > self.unet.config.latent_channels

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, hint: Tensor | None = None) -> Tensor:
        """noisy [rows, C, h, w], timesteps [rows], token ids [rows, L], hint [rows, C + 4, h, w] where the
        UNet has room for one → prediction, of 2C channels where it learns the variance.
        """
        rows = noisy.shape[0]
        condition = self.unet.condition(self.text_encoder(ids), timesteps.float()[:, None], hint)
        prediction: Tensor = self.unet(
            noisy, condition, torch.zeros(rows, dtype=torch.long, device=noisy.device)
        )
        return prediction


class Reading(nn.Module):
    """A head that reads from the UNet's features what stands in each cell of the clean picture: the classes,
    then the colours. It is for training alone.

    The noise hides what the caption tells, so the features must take it from there: this teaches the UNet to
    listen to the text long before the loss on the latents would. (Yu et al. 2024, arXiv:2410.06940)
    """

    def __init__(self, model: TextToLatents) -> None:
        super().__init__()
        self.model = model
        widths = model.unet.config.block_out_channels[:2]
        self.head = Conv2d(widths[-1], 2 + len(KINDS) + len(COLOURS), 1)
        self.features: Tensor | None = None
        model.unet.up_blocks[-len(widths)].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, given: tuple[Any, ...], made: Tensor) -> None:
        self.features = made

    def loss(self, wanted: Tensor) -> Tensor:
        """Of the last call of the model, wanted as `SceneData.cells` gives it: classes plus colours."""
        assert self.features is not None
        sizes = [1 + len(KINDS), 1 + len(COLOURS)]
        parts = zip(self.head(self.features).split(sizes, 1), wanted.split(sizes, 1), strict=True)
        kinds, colours = (share_loss(logits, shares) for logits, shares in parts)
        return kinds + colours


def new_unet(session: Session, latent_channels: int, context_width: int, side: int) -> UNet:
    """The UNet of a configuration, with a hint block, from the seed."""
    section = session.config.diffusion
    torch.manual_seed(session.config.seed + 2)
    unet = UNet(
        UNetConfig(
            in_channels=latent_channels + hint_channels(latent_channels),
            out_channels=latent_channels * (1 + section.learns_variance),
            block_out_channels=section.block_out_channels,
            layers_per_block=section.layers_per_block,
            heads=section.heads,
            transformer_depth=section.transformer_depth,
            cross_attention_dim=context_width,
            norm_num_groups=section.norm_num_groups,
            sample_size=side,
            learned_variance=section.learns_variance,
        )
    )
    nn.init.zeros_(unet.conv_out.weight)
    return channels_last(unet).to(session.device)


def train_diffusion(
    session: Session,
    data: PictureData,
    latents: Learned,
    hints: Tensor,
    tokenizer: Tokenizer,
    model: TextToLatents,
    scheduler: SchedulerConfig,
    sample: Callable[[int], None],
) -> None:
    """Train from the seed, or resume, on latents and the hints of the first of them [n, C + 4, h, w]."""
    section, device = session.config.diffusion, session.device
    criterion = Criterion(section.objective, scheduler, session.workers.gathered)
    origin = {
        **latents.origin,
        "set of captions": data.captions_digest,
        "vocabulary": vocabulary_digest(tokenizer),
        **_origin(session, model, scheduler),
    }
    reading, cells = None, torch.empty(0)
    if section.reading and isinstance(data, SceneData):
        reading = Reading(model).to(device)
        cells = data.cells(data.images.shape[1] // latents.side)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        batch = section.fit.batch
        rows = torch.randint(len(latents), (batch,), generator=generator)
        hinted = torch.rand(batch, generator=generator) < section.hinted
        rows = torch.where(hinted, rows % len(hints), rows)
        hint = hints[rows % len(hints)] * hinted[:, None, None, None]
        texts = [text for text, _ in data.captions(rows.tolist(), generator)]
        texts = without_some(texts, section.caption_dropout, generator)
        clean = latents.draw(rows, generator)
        ids = token_ids(tokenizer, texts).to(device)
        beside = hint.to(device) if model.takes_hints else None
        error = criterion(model, clean.to(device), ids, beside, generator=generator).mean()
        if reading is None:
            return error
        return error + section.reading * reading.loss(cells[rows].to(device))

    session.fit(
        "diffusion",
        reading or model,
        loss,
        section.fit,
        seed=2,
        sample=sample,
        memory=criterion,
        origin=origin,
    )


def _origin(session: Session, model: TextToLatents, scheduler: SchedulerConfig) -> Origin:
    """What the diffusion model itself begins from; weights drawn from the seed are known by it."""
    starts, reads = session.config.start is not None, session.config.text.fit is not None
    return {
        "network": digest(model.unet.config, model.text_encoder.config),
        "start": digest(model.unet) if starts else NONE,
        "text encoder": digest(model.text_encoder) if starts or reads else NONE,
        "prediction": scheduler.prediction,
        "noise schedule": digest(scheduler),
    }
