"""A tiny pipeline with random weights, made in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastldm.checkpoint import Components
from fastldm.diffusion import SchedulerConfig
from fastldm.models.clip import CLIPTextConfig, CLIPTextModel
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.unet import UNet, UNetConfig
from fastldm.models.vae import AutoencoderKL, VAEConfig
from fastldm.pipeline import Pipeline

WORDS = "a cat dog fish house red blue green on the big small".split()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tiny_components() -> Components:
    """16×16 pictures, f = 2, prompts of 8 tokens; weights of sane size, so that every part matters."""
    torch.manual_seed(5)
    unet = UNet(
        UNetConfig(
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
    text = CLIPTextModel(CLIPTextConfig(len(WORDS) + 4, 16, 32, 2, 2, 8))
    for network in (unet, vae, text):
        network.eval().requires_grad_(False)
        for parameter in network.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    scheduler = SchedulerConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return Components("sd1", unet, vae, text, Tokenizer.from_words(WORDS, 8), scheduler, (), Path("memory"))


def tiny_pipeline() -> Pipeline:
    return Pipeline(tiny_components(), DEVICE, torch.float32, None)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()
