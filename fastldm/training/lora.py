"""LoRA fine-tuning: low-rank changes of a loaded model's weights, learned from latents and captions.

(Hu et al. 2021, arXiv:2106.09685; targets as in diffusers and peft)
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastldm.checkpoint import Components
from fastldm.checkpoint.lora import write_lora
from fastldm.checkpoint.lora_names import adaptable
from fastldm.checks import integer, number
from fastldm.diffusion import Criterion, Objective
from fastldm.errors import CheckpointError, InvalidArgument
from fastldm.training.diffusion import TextToLatents
from fastldm.training.fit import FitSettings, fit
from fastldm.training.text import token_ids, without_some

Adaptable: TypeAlias = Mapping[str, nn.Linear | nn.Conv2d]  # by network and name: "unet.mid_block…"

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
MAX_RANK = 4096


@dataclass(frozen=True)
class LoraSettings:
    """What is learned, and how. Modules are chosen by the ends of their names, as peft does."""

    fit: FitSettings
    rank: int = 8
    alpha: float | None = None  # None: the rank, so that nothing is scaled
    targets: tuple[str, ...] = ATTENTION  # in the UNet
    text_targets: tuple[str, ...] = ()  # in the text encoder, such as TEXT_ATTENTION; none: it stays
    caption_dropout: float = 0.1


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
        """W + alpha/rank · up · down of each module, in the dtype of W, by the name of its parameter."""
        made = {}
        for name in self.names:
            base, (down, up) = modules[name].weight, self.pair(name)
            total = torch.addmm(base.float().flatten(1), up.flatten(1), down.flatten(1), alpha=self.scale)
            made[f"{name}.weight"] = total.view(base.shape).to(base.dtype)
        return made


def _key(name: str) -> str:
    return name.replace(".", "/")  # no parameter may have a dot in its name


def train_lora(
    components: Components,
    data: Sequence[tuple[Tensor, str]],
    settings: LoraSettings,
    folder: Path,
    output: str | os.PathLike[str],
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> None:
    """Learn a LoRA with L_simple and write it to the folder `output`, for fastldm, diffusers and peft.

    data: latents as the UNet sees them, [C, h, w] of one size, with their captions; anything with a length
    and an index. The model is the same afterwards; nobody else may run it meanwhile. `folder` keeps the state
    that a stopped run goes on from. Raises InvalidArgument; CheckpointError for an inpainting model; and what
    `fit` raises.
    """
    channels = components.unet.config.latent_channels
    if components.unet.config.inpaints:
        why = f"is {components.unet.config.in_channels}: an inpainting model cannot be tuned yet"
        raise CheckpointError(components.path, "unet in_channels", why)
    rank = integer("rank", settings.rank, 1, MAX_RANK)
    alpha = float(rank) if settings.alpha is None else number("alpha", settings.alpha, 1e-6, 1e6)
    dropout = number("caption_dropout", settings.caption_dropout, 0, 1)
    if not len(data):
        raise InvalidArgument("data", [], "at least one pair of latents and caption")
    chosen = {
        **_choose("unet", components.unet, "targets", settings.targets),
        **_choose("text_encoder", components.text_encoder, "text_targets", settings.text_targets),
    }
    if not chosen:
        raise InvalidArgument("targets", (), "at least one, or text_targets")
    model = TextToLatents(components.unet, components.text_encoder)
    first = next(iter(chosen.values())).weight
    device, dtype = first.device, first.dtype
    adapter = Adapter(chosen, rank, alpha, torch.Generator().manual_seed(seed))
    criterion = Criterion(Objective(), components.scheduler)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(data), (settings.fit.batch,), generator=generator)
        clean, texts = _batch(data, rows.tolist(), channels)
        texts = without_some(texts, dropout, generator)
        ids = token_ids(components.tokenizer, texts).to(device)

        def predict(noisy: Tensor, times: Tensor) -> Tensor:
            return functional_call(model, adapter.weights(chosen), (noisy.to(dtype), times, ids))

        return criterion(predict, clean.to(device), generator=generator).mean()

    fit("lora", adapter, loss, settings.fit, folder, seed, report)
    factors: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for full in adapter.names:
        part, _, name = full.partition(".")
        factors.setdefault(part, {})[name] = adapter.pair(full)
    write_lora(output, factors, alpha)


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
