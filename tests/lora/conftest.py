"""The recorded LoRAs, and the tiny Stable Diffusion 1 that they are for, as a diffusers folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import fastldm
from fastldm.checkpoint import save_folder
from fastldm.models.clip import CLIPTextConfig, CLIPTextModel
from fastldm.models.layers import channels_last
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.unet import UNet, UNetConfig
from fastldm.models.vae import AutoencoderKL, VAEConfig

FIXTURES = Path(__file__).parents[1] / "fixtures" / "lora"
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def read(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a fixture."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


@pytest.fixture
def recorded() -> Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]:
    return read


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded base, with a random autoencoder of 8 × 8 latents and a small vocabulary."""
    tensors, metadata = read("base_sd15")
    config = json.loads(metadata["config"])
    unet = UNet(UNetConfig.from_dict(config["unet"]))
    text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(config["text_encoder"] | {"projection_dim": 24}))
    for part, network in (("unet", unet), ("text_encoder", text_encoder)):
        start = f"weight.{part}."
        network.load_state_dict(
            {
                key.removeprefix(start): value.float()
                for key, value in tensors.items()
                if key.startswith(start)
            }
        )
    torch.manual_seed(5)
    vae = AutoencoderKL(VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4))
    folder = tmp_path_factory.mktemp("base") / "model"
    save_folder(
        folder,
        unet=channels_last(unet),
        vae=channels_last(vae),
        text_encoder=text_encoder,
        tokenizer=Tokenizer.from_words("a the red blue green square circle on white cat".split(), 13),
        scheduler=SCHEDULER,
    )
    return folder


@pytest.fixture
def pipe(base_folder: Path) -> fastldm.Pipeline:
    """Freshly loaded: a test may change its weights."""
    return fastldm.load(base_folder)


def networks_of(pipe: fastldm.Pipeline) -> dict[str, nn.Module]:
    return {"unet": pipe.components.unet, "text_encoder": pipe.components.text_encoder}


@pytest.fixture(scope="session")
def networks(base_folder: Path) -> dict[str, nn.Module]:
    """For tests that leave the weights as they are."""
    return networks_of(fastldm.load(base_folder))


@pytest.fixture
def bits() -> Callable[[fastldm.Pipeline], dict[str, Tensor]]:
    """A copy of every weight."""

    def copy(pipe: fastldm.Pipeline) -> dict[str, Tensor]:
        return {
            f"{part}.{name}": weight.detach().clone()
            for part, network in networks_of(pipe).items()
            for name, weight in network.named_parameters()
        }

    return copy


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(tensors, metadata, name): a safetensors file."""

    def make(
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str] | None = None,
        name: str = "lora.safetensors",
    ) -> Path:
        save_file(
            {key: value.contiguous().clone() for key, value in tensors.items()}, tmp_path / name, metadata
        )
        return tmp_path / name

    return make
