"""A training step of a model's UNet and text encoder, ours and that of diffusers, on the same draws."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fastldm.checkpoint import load_components
from fastldm.checkpoint.hub import resolve
from fastldm.diffusion import Criterion, Objective
from fastldm.models.layers import channels_last
from fastldm.training.diffusion import TextToLatents
from fastldm.training.fit import FitSettings, advance, new_optimizer
from fastldm.training.samples import PROMPTS
from fastldm.training.text import token_ids

HINTED = 0.15  # share of the rows with a hint, as the shipped model's recipe has it


class Theirs(nn.Module):
    """As `TextToLatents`, of diffusers and transformers."""

    def __init__(self, folder: Path) -> None:
        import diffusers
        import transformers

        super().__init__()
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        self.unet = channels_last(unet)
        self.text_encoder = transformers.CLIPTextModel.from_pretrained(
            folder / "text_encoder", torch_dtype=torch.float32
        )

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, hint: Tensor) -> Tensor:
        context = self.text_encoder(ids).last_hidden_state
        given = torch.cat((noisy, hint), dim=1).contiguous(memory_format=torch.channels_last)
        return self.unet(given, timesteps, context, return_dict=False)[0]


class TrainingStep:
    """Called, it takes the next step as `fastldm train` does, EMA off, and returns the loss before it."""

    def __init__(self, model: str, theirs: bool, batch: int, bfloat16: bool = False) -> None:
        components, folder = load_components(model), resolve(model)
        mine = TextToLatents(channels_last(components.unet), components.text_encoder)
        self.module = (Theirs(folder) if theirs else mine).train().requires_grad_(True)
        self.bfloat16, self.done = bfloat16, 0
        self.settings = FitSettings(steps=10_000, batch=batch, learning_rate=1e-4, warmup=0)
        self.optimizer = new_optimizer(self.module, self.settings)
        self.criterion = Criterion(Objective(), components.scheduler)
        config, chance = components.unet.config, torch.Generator().manual_seed(1)
        shape = batch, config.in_channels, config.sample_size, config.sample_size
        drawn = torch.randn(shape, generator=chance)
        self.clean, hint = drawn.split([config.latent_channels, shape[1] - config.latent_channels], dim=1)
        self.hint = hint * (torch.rand((batch, 1, 1, 1), generator=chance) < HINTED)
        texts = [PROMPTS[row % len(PROMPTS)] for row in range(batch)]
        self.ids = token_ids(components.tokenizer, texts)

    def loss(self, step: int, generator: torch.Generator) -> Tensor:
        """The mean loss of the batch, its noise and times drawn anew."""
        return self.criterion(self.module, self.clean, self.ids, self.hint, generator=generator).mean()

    def __call__(self) -> Tensor:
        value = advance(
            self.module,
            self.optimizer,
            self.loss,
            self.settings,
            self.done,
            seed=0,
            bfloat16=self.bfloat16,
        )
        self.done += 1
        return torch.tensor(value)

    def gradients(self) -> dict[str, Tensor]:
        """Of the last step, clipped, by our names of the parameters."""
        named = self.module.named_parameters()
        return {name.replace("text_model.", ""): parameter.grad for name, parameter in named}
