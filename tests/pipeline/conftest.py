"""Tiny Stable Diffusion models with random weights, as diffusers saves them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastldm
from fastldm.models.tokenizer import Tokenizer


def save_tiny(folder: Path, prediction: str) -> None:
    """A diffusers folder: 64×64 pictures, f = 4; CLIP's own tokenizer."""
    import diffusers
    import transformers

    torch.manual_seed(7)
    v2 = prediction == "v_prediction"
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=[1, 2] if v2 else 4,
        use_linear_projection=v2,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32),
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=49408,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_act="gelu" if v2 else "quick_gelu",
            eos_token_id=49407,
            bos_token_id=49406,
        )
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    tokenizer_folder = folder.parent / f"{folder.name}-tokenizer"
    tokenizer_folder.mkdir()
    Tokenizer.clip(pad_id=0 if v2 else 49407).save(tokenizer_folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tokenizer_folder)
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


@pytest.fixture(scope="session", params=["epsilon", "v_prediction"])
def tiny_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / str(request.param)
    save_tiny(folder, request.param)
    return folder


@pytest.fixture(scope="session")
def tiny_eps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "eps"
    save_tiny(folder, "epsilon")
    return folder


@pytest.fixture(scope="session")
def pipe(tiny_eps: Path) -> fastldm.Pipeline:
    return fastldm.load(tiny_eps)
