"""What is raced: a diffusers folder that all contenders load, with random weights for a preset's name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastldm import ops
from fastldm.bench.cases import Case, Model, read
from fastldm.checkpoint import convert, inspect, load_components, save_folder
from fastldm.checkpoint.container import write_safetensors
from fastldm.checkpoint.hub import resolve
from fastldm.checkpoint.save import WEIGHTS
from fastldm.checkpoint.tensors import payload
from fastldm.errors import InvalidArgument
from fastldm.models.clip import CLIPTextModel
from fastldm.models.hints import hint_channels
from fastldm.models.pixels import PIXELS
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.unet import UNet, UNetConfig
from fastldm.models.vae import AutoencoderKL, VAEConfig
from fastldm.presets import PRESETS, Preset


def open_model(name: str, dtype: torch.dtype, workshop: Path) -> Model:
    """A preset's name, "default", or what `fastldm.load` takes; what must be written goes into `workshop`."""
    if name in PRESETS:
        folder = workshop / name
        write_random(PRESETS[name], folder, dtype)
    else:
        folder = resolve(name)
        if not folder.is_dir():
            folder = convert(folder, workshop / "model")
        inspect(folder)
        if read(folder / "vae").get("_class_name") == PIXELS:
            raise InvalidArgument("model", name, "a model with an autoencoder")
    model = Model.of(name, folder)
    if model.in_channels == model.latent_channels + hint_channels(model.latent_channels):
        model = Model.of(name, without_hints(folder, workshop / "without hints"))
    if model.in_channels != model.latent_channels:
        raise InvalidArgument("model", name, "a model without an inpainting UNet's further channels")
    return model


def without_hints(folder: Path, target: Path) -> Path:
    """The model as its text alone needs it: without the channels of the hint block, zero then, which no other
    library knows.
    """
    model = load_components(folder)
    tokenizer, text_encoder = model.text
    unet, latent = model.unet, model.unet.config.latent_channels
    unet.config = replace(unet.config, in_channels=latent)
    unet.conv_in.weight = nn.Parameter(unet.conv_in.weight[:, :latent].contiguous(), requires_grad=False)
    save_folder(
        target,
        unet=unet,
        vae=model.vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=model.scheduler,
    )
    return target


def write_random(preset: Preset, folder: Path, dtype: torch.dtype) -> None:
    """The preset with random weights, the same in every run."""
    chance = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        networks: dict[str, Any] = {"unet": UNet(preset.unet), "vae": AutoencoderKL(preset.vae)}
        if preset.text is not None:
            networks["text_encoder"] = CLIPTextModel(preset.text)
    for network in networks.values():
        randomise(network.to(dtype).to_empty(device="cpu"), chance)
    if preset.text is not None:
        save_folder(folder, **networks, tokenizer=Tokenizer.clip(), scheduler=preset.scheduler)
        return
    for part, network in networks.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(network.config.to_dict()), encoding="utf-8")
        tensors = {key: payload(tensor) for key, tensor in network.state_dict().items()}
        write_safetensors(folder / part / WEIGHTS[part], tensors, {"format": "pt"})


@torch.no_grad()
def randomise(network: nn.Module, chance: torch.Generator) -> None:
    """Weights that keep the variance of what they read."""
    for parameter in network.parameters():
        bound = 1.0 if parameter.dim() == 1 else (3 / parameter[0].numel()) ** 0.5
        parameter.uniform_(-bound, bound, generator=chance)


def operations(part: str, model: Model, case: Case) -> int:
    """What the plain network does in one call, 2 a multiply-add: nothing shared, nothing left out."""
    side, folder = case.side // model.factor, Path(model.folder)
    with torch.device("meta"), ops.use_backends("reference"), FlopCounterMode(display=False) as counter:
        if part == "vae":
            vae = AutoencoderKL(VAEConfig.from_dict(read(folder / "vae")))
            vae.decode(torch.empty(case.batch, model.latent_channels, side, side))
        else:
            rows = 2 * case.batch
            unet = UNet(UNetConfig.from_dict(read(folder / "unet")))
            context = torch.empty(rows, model.tokens, model.context_width)
            condition = unet.condition(context, torch.empty(rows, 1))
            latents = torch.empty(rows, model.in_channels, side, side)
            unet(latents, condition, torch.zeros(rows, dtype=torch.long))
    return counter.get_total_flops()
