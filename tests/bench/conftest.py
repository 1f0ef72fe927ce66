"""A small random model as a diffusers folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastldm.bench.models import write_random
from fastldm.models.clip import CLIPTextConfig
from fastldm.models.unet import UNetConfig
from fastldm.models.vae import VAEConfig
from fastldm.presets import SD15, Preset

SMALL = Preset(
    UNetConfig(
        block_out_channels=(16, 32),
        layers_per_block=1,
        heads=(2, 4),
        transformer_depth=(1, 0),
        cross_attention_dim=16,
        norm_num_groups=4,
        sample_size=8,
    ),
    VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4),
    CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2),
    SD15.scheduler,
)


@pytest.fixture(scope="session")
def preset() -> Preset:
    """16×16 pictures, f = 2, prompts of 77 tokens."""
    return SMALL


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder, in float32."""
    folder = tmp_path_factory.mktemp("small") / "model"
    write_random(SMALL, folder, torch.float32)
    return folder
