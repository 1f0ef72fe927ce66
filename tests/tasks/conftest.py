"""A tiny model with a hint block, random weights, made in memory: every task of the shipped one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastldm.abilities import Abilities
from fastldm.checkpoint import Components
from fastldm.diffusion import SchedulerConfig
from fastldm.models.clip import CLIPTextConfig, CLIPTextModel
from fastldm.models.hints import hint_channels
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.unet import UNet, UNetConfig
from fastldm.models.vae import AutoencoderKL, VAEConfig
from fastldm.pipeline import Pipeline
from tests.conftest import sane_weights

LABELS = ("cat", "dog", "fish")
ABILITIES = Abilities(
    classes=3,
    labels=LABELS,
    layout=True,
    segmentation=("background", *LABELS),
    inpainting=True,
    upscaling=4,
)
WORDS = ["a", "red", *LABELS, "label", "layout", ",", *(f"p{i}" for i in range(32))]


def components() -> Components:
    """16×16 pictures, f = 2."""
    torch.manual_seed(3)
    unet = UNet(
        UNetConfig(
            in_channels=4 + hint_channels(4),
            block_out_channels=(16, 32),
            layers_per_block=1,
            heads=(2, 4),
            transformer_depth=(1, 0),
            cross_attention_dim=16,
            norm_num_groups=4,
            sample_size=8,
        )
    )
    vae = AutoencoderKL(VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4))
    text = CLIPTextModel(CLIPTextConfig(len(WORDS) + 4, 16, 32, 2, 2, 16))
    for network in (unet, vae, text):
        network.eval().requires_grad_(False)
        sane_weights(network)
    words = Tokenizer.from_words(WORDS, 16)
    return Components("sd1", unet, vae, text, words, SchedulerConfig(), (), Path("memory"), ABILITIES)


@pytest.fixture(scope="session")
def pipe() -> Pipeline:
    return Pipeline(components(), torch.device("cpu"), torch.float32, None)


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def mask() -> np.ndarray:
    made = np.zeros((16, 16), bool)
    made[3:11, 5:14] = True
    return made
