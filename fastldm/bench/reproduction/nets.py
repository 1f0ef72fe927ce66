"""What is trained: diffusion models of five objectives in pixels or latents, and autoencoders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastldm.bench.reproduction.settings import FirstStage, Settings
from fastldm.bench.reproduction.world import CLASSES
from fastldm.diffusion import Objective, SchedulerConfig
from fastldm.models.layers import channels_last
from fastldm.models.unet import UNet
from fastldm.models.vae import AutoencoderKL, VAEConfig
from fastldm.models.vq import VQConfig, VQModel

OBJECTIVES: dict[str, tuple[Objective, dict[str, Any]]] = {
    "simple": (Objective(), {}),
    "hybrid": (Objective("hybrid"), {"variance_type": "learned_range"}),
    "velocity": (Objective(), {"prediction_type": "v_prediction"}),
    "flow": (Objective(), {"class_name": "FlowMatchEulerDiscreteScheduler"}),
    "flow-logit": (
        Objective(timesteps="logit_normal"),
        {"class_name": "FlowMatchEulerDiscreteScheduler"},
    ),
}


@dataclass(frozen=True)
class Model:
    """A diffusion model: at which factor, and what it is trained for."""

    factor: int = 4
    objective: str = "simple"

    @property
    def name(self) -> str:
        return f"f{self.factor}-{self.objective}"

    @property
    def learned(self) -> bool:
        """Whether it learns the variance."""
        return self.objective == "hybrid"

    def scheduler(self, settings: Settings) -> SchedulerConfig:
        """Its process: 1000 times, linear betas; x0 is held to the range of pixels, of latents not."""
        _, changes = OBJECTIVES[self.objective]
        plain = SchedulerConfig(num_train_timesteps=settings.timesteps, clip_sample=self.factor == 1)
        return replace(plain, **changes)


class Denoiser(nn.Module):
    """The UNet, whose context is one learned vector a class; the last class stands for none."""

    def __init__(self, settings: Settings, model: Model) -> None:
        super().__init__()
        self.unet = UNet(settings.unet(model.factor, model.learned))
        self.classes = nn.Embedding(CLASSES + 1, settings.context_width)
        nn.init.zeros_(self.unet.conv_out.weight)
        channels_last(self)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """x [rows, C, h, w], t [rows], labels int64 [rows], or [2 * rows] guided → a prediction a label."""
        dtype = self.classes.weight.dtype
        condition = self.unet.condition(self.classes(labels)[:, None], t[:, None])
        return self.unet(x.to(dtype), condition, torch.zeros(len(x), dtype=torch.long))


def new_denoiser(settings: Settings, model: Model, seed: int) -> Denoiser:
    """The net of a seed, before training."""
    torch.manual_seed(seed)
    return Denoiser(settings, model)


def new_autoencoder(settings: Settings, stage: FirstStage, seed: int) -> AutoencoderKL | VQModel:
    """The first stage of a seed, before training."""
    torch.manual_seed(seed)
    config = settings.autoencoder(stage)
    if isinstance(config, VQConfig):
        return channels_last(VQModel(config))
    assert isinstance(config, VAEConfig)
    return channels_last(AutoencoderKL(config))


@cache
def diffusion_flops(settings: Settings, model: Model) -> int:
    """Of one row through the net once, on the meta device."""
    with torch.device("meta"):
        net = Denoiser(settings, model)
        side = settings.side // model.factor
        x = torch.zeros(1, settings.shape(model.factor).channels, side, side)
        t, labels = torch.zeros(1), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            condition = net.unet.condition(net.classes(labels)[:, None], t[:, None])
            net.unet(x, condition, labels)
    return counter.get_total_flops()


@cache
def autoencoder_flops(settings: Settings, stage: FirstStage) -> int:
    """Of one picture there and back."""
    config = settings.autoencoder(stage)
    with torch.device("meta"):
        vae = VQModel(config) if isinstance(config, VQConfig) else AutoencoderKL(config)  # type: ignore[arg-type]
        x = torch.zeros(1, 3, settings.side, settings.side)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            latents = vae.encode(x).mean
            if isinstance(vae, VQModel):
                vae.decode(latents, force_not_quantize=True)
            else:
                vae.decode(latents)
    return counter.get_total_flops()


def steps_of(budget: float, flops: int, batch: int) -> int:
    """Training steps that a budget pays for: forward, and backward at twice its cost."""
    return max(1, round(budget / (3 * flops * batch)))
