"""LoRA fine-tuning: low-rank changes of a loaded model's weights, learned from latents and captions.

(Hu et al. 2021, arXiv:2106.09685; targets as in diffusers and peft)
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastldm.checkpoint import Components
from fastldm.checkpoint.lora import write_lora
from fastldm.checkpoint.lora_names import adaptable
from fastldm.diffusion import Criterion, Objective
from fastldm.errors import CheckpointError, InvalidArgument
from fastldm.models.unet import UNet
from fastldm.training.config import ATTENTION, LoraSettings
from fastldm.training.diffusion import TextToLatents
from fastldm.training.fit import fit
from fastldm.training.origin import Origin, digest
from fastldm.training.text import token_ids, without_some

Adaptable: TypeAlias = Mapping[str, nn.Linear | nn.Conv2d]  # by network and name: "unet.mid_block…"
Draw: TypeAlias = Callable[[torch.Generator], tuple[Tensor, list[str]]]
"""Draws a batch: latents as the UNet sees them, float32 [rows, C, h, w], and their captions."""

TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


class Adapter(nn.Module):
    """The factors of a LoRA, float32; drawn so that it changes nothing yet."""

    def __init__(self, modules: Adaptable, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.names, self.scale = tuple(modules), alpha / rank
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, module in modules.items():
            outputs, *inputs = module.weight.shape
            kernel = inputs[1:]
            bound = module.weight[0].numel() ** -0.5
            drawn = (2 * torch.rand(rank, *inputs, generator=generator) - 1) * bound
            place = module.weight.device
            self.down[_key(name)] = nn.Parameter(drawn.to(place))
            self.up[_key(name)] = nn.Parameter(torch.zeros(outputs, rank, *[1] * len(kernel), device=place))

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """A module's factors: down [rank, in, …kernel], up [out, rank, …1]."""
        return self.down[_key(name)], self.up[_key(name)]

    def weights(self, modules: Adaptable) -> dict[str, Tensor]:
        """W + alpha/rank · up · down of each module, in the dtype of W, by the name of its parameter; added
        up in float32, under autocast too.
        """
        made = {}
        for name in self.names:
            base, (down, up) = modules[name].weight, self.pair(name)
            with torch.autocast(base.device.type, enabled=False):
                total = torch.addmm(base.float().flatten(1), up.flatten(1), down.flatten(1), alpha=self.scale)
            made[f"{name}.weight"] = total.view(base.shape).to(base.dtype)
        return made


def _key(name: str) -> str:
    return name.replace(".", "/")  # no parameter may have a dot in its name


class LoraModel:
    """A loaded model with a LoRA in it, which alone learns; the model stays what it is.

    Raises InvalidArgument for a target that names no layer; CheckpointError for an inpainting model.
    """

    def __init__(self, components: Components, settings: LoraSettings, seed: int = 0) -> None:
        if components.unet.config.inpaints:
            why = f"is {components.unet.config.in_channels}: an inpainting model cannot be tuned yet"
            raise CheckpointError(components.path, "unet in_channels", why)
        _, text_encoder = components.text
        self.settings = settings
        self.alpha = float(settings.rank if settings.alpha is None else settings.alpha)
        self.modules = {
            **_choose("unet", components.unet, "targets", settings.targets),
            **_choose("text_encoder", text_encoder, "text_targets", settings.text_targets),
        }
        self.unet: UNet = components.unet
        self.base = TextToLatents(components.unet, text_encoder)
        generator = torch.Generator().manual_seed(seed)
        self.adapter = Adapter(self.modules, settings.rank, self.alpha, generator)

    def __call__(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """As the model itself."""
        given = noisy.to(self.unet.conv_in.weight.dtype), timesteps, ids
        return functional_call(self.base, self.adapter.weights(self.modules), given)

    def write(self, output: str | os.PathLike[str]) -> None:
        """Write the LoRA to the folder `output`; see `write_lora`."""
        factors: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        for full in self.adapter.names:
            part, _, name = full.partition(".")
            factors.setdefault(part, {})[name] = self.adapter.pair(full)
        write_lora(output, factors, self.alpha)


def fit_lora(
    model: LoraModel,
    components: Components,
    draw: Draw,
    folder: Path,
    seed: int,
    report: Callable[[str], None],
    origin: Origin | None = None,
    **options: Any,
) -> None:
    """Learn with L_simple, or L_hybrid where the model learnt its variance, or go on. `origin`: of the data,
    to which the model's is added; `options` as in `fit`, whose errors are raised.
    """
    settings, device = model.settings, model.unet.conv_in.weight.device
    tokenizer, _ = components.text
    learned = components.scheduler.variance_type.startswith("learned")
    criterion = Criterion(Objective("hybrid" if learned else "simple"), components.scheduler)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        clean, texts = draw(generator)
        ids = token_ids(tokenizer, without_some(texts, settings.caption_dropout, generator)).to(device)
        return criterion(model, clean.to(device), ids, generator=generator).mean()

    origin = {
        "start": digest(components.scheduler, model.base),
        "alpha": str(model.alpha),
        **(origin or {}),
    }
    fit("lora", model.adapter, loss, settings.fit, folder, seed, report, origin=origin, **options)


def train_lora(
    components: Components,
    data: Sequence[tuple[Tensor, str]],
    settings: LoraSettings,
    folder: Path,
    output: str | os.PathLike[str],
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> None:
    """Learn a LoRA with the model's own loss and write a folder that fastldm, diffusers and peft read.

    data: latents as the UNet sees them, [C, h, w] of one size, with their captions; anything with a length
    and an index. The model is the same afterwards; nobody else may run it meanwhile. `folder` keeps the state
    that a stopped run goes on from. Raises what `LoraModel` and `fit` do.
    """
    if not len(data):
        raise InvalidArgument("data", [], "at least one pair of latents and caption")
    model = LoraModel(components, settings, seed)

    def draw(generator: torch.Generator) -> tuple[Tensor, list[str]]:
        rows = torch.randint(len(data), (settings.fit.batch,), generator=generator)
        return _batch(data, rows.tolist(), components.unet.config.latent_channels)

    fit_lora(model, components, draw, folder, seed, report)
    model.write(output)


def _choose(part: str, network: nn.Module, argument: str, ends: Sequence[str]) -> Adaptable:
    """The modules of a network whose names end in one of these; each has to be there."""
    modules = adaptable({part: network})
    for end in ends:
        if not any(name.endswith(f".{end}") for name in modules):
            known = {re.sub(r".*\.(?=[a-z])", "", name) for name in modules}  # "to_out.0" and "proj"
            near = difflib.get_close_matches(end, sorted(known), 1, cutoff=0)[0]
            raise InvalidArgument(argument, end, f"the end of a layer's name; the nearest is {near}")
    return {name: module for name, module in modules.items() if any(name.endswith(f".{end}") for end in ends)}


def _batch(data: Sequence[tuple[Tensor, str]], rows: list[int], channels: int) -> tuple[Tensor, list[str]]:
    """These rows: float32 latents [rows, C, h, w], and captions."""
    pairs = [data[row] for row in rows]
    size = pairs[0][0].shape[1:]
    for row, (latents, _) in zip(rows, pairs, strict=True):
        if latents.shape != (channels, *size) or len(size) != 2:
            allowed = f"latents [{channels}, h, w], of one size in all"
            raise InvalidArgument(f"data[{row}]", list(latents.shape), allowed)
    return torch.stack([latents.float().cpu() for latents, _ in pairs]), [text for _, text in pairs]


__all__ = [
    "ATTENTION",
    "TEXT_ATTENTION",
    "Adapter",
    "LoraModel",
    "LoraSettings",
    "fit_lora",
    "train_lora",
]
