"""A LoCon of rank 32 for every layer of SD1.5: read, merged and taken out, beside a copy of the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastldm.bench.models import randomise
from fastldm.checkpoint.lora_names import adaptable
from fastldm.lora import MergedLoras
from fastldm.models.clip import CLIPTextModel
from fastldm.models.layers import channels_last
from fastldm.models.unet import UNet
from fastldm.presets import PRESETS

RANK = 32


def test_loading_a_lora(race: Callable[..., Any], effort: int, tmp_path: Path) -> None:
    if not effort:
        pytest.skip("full size is not for --quick")
    preset, chance = PRESETS["sd15"], torch.Generator().manual_seed(1)
    assert preset.text is not None
    with torch.device("meta"):
        networks = {"unet": UNet(preset.unet), "text_encoder": CLIPTextModel(preset.text)}
    for network in networks.values():
        network.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
        randomise(channels_last(network), chance)
    modules, tensors = adaptable(networks), {}
    for name, module in modules.items():
        outputs, inputs, *kernel = module.weight.shape
        shapes = {"down": (RANK, inputs, *kernel), "up": (outputs, RANK, *(1 for _ in kernel))}
        for factor, shape in shapes.items():
            drawn = 0.01 * torch.randn(shape, generator=chance)
            tensors[f"{name}.lora_{factor}.weight"] = drawn.half()
    file = tmp_path / "locon.safetensors"
    save_file(tensors, file)
    loras = MergedLoras(**networks)

    def on_and_off() -> None:
        loras.add(loras.read(file, 0.8))
        loras.clear()

    def copied() -> None:
        for module in modules.values():
            module.weight.clone()

    size = sum(module.weight.nbytes for module in modules.values()) / 2**30
    race(
        f"LoCon of rank {RANK} in SD1.5, {len(modules)} layers, {size:.1f} GiB of bfloat16",
        {"load_lora, unload_lora": on_and_off, "a copy of the weights": copied},
        budget=40.0,
    )
