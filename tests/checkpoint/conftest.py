"""Tiny random SD1 and SD2 models: folders that diffusers saved, single files transcribed from their names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastldm.checkpoint import convert, save_folder
from fastldm.models.clip import CLIPTextConfig, CLIPTextModel
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.unet import UNet, UNetConfig
from fastldm.models.vae import AutoencoderKL, VAEConfig

WORDS = Tokenizer.from_words(["a", "red", "cat"], 77)
WIDTHS = {"sd1": (32, 64), "sd2": (64, 128)}
SCHEDULERS = {
    "sd1": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "prediction_type": "epsilon"},
    "sd2": {"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "v_prediction"},
}
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Tiny:
    """A model in both layouts; `tensors` is what the single file holds."""

    family: str
    folder: Path
    file: Path
    tensors: dict[str, torch.Tensor]


def write_folder(folder: Path, family: str, *, in_channels: int = 4) -> None:
    """A diffusers folder with random weights, none of them zero, saved by diffusers and transformers."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(7)
    widths = WIDTHS[family]
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8 if family == "sd1" else [1, 2],
        cross_attention_dim=32,
        use_linear_projection=family == "sd2",
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=WORDS.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=1,
            hidden_act="quick_gelu" if family == "sd1" else "gelu",
            projection_dim=32,
        )
    )
    for network, name in ((unet, "unet"), (vae, "vae"), (text, "text_encoder")):
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.08)
        network.save_pretrained(folder / name)
    (folder / "tokenizer").mkdir()
    WORDS.save(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**SCHEDULERS[family], **BETAS}))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", SCHEDULERS[family]["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


# The tiny models' blocks, written out by hand from CompVis' module lists: diffusers name → single-file name.
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE = {
    "encoder.down_blocks.0.resnets.0": "encoder.down.0.block.0",
    "encoder.down_blocks.0.downsamplers.0": "encoder.down.0.downsample",
    "encoder.down_blocks.1.resnets.0": "encoder.down.1.block.0",
    "decoder.up_blocks.0.resnets.0": "decoder.up.1.block.0",
    "decoder.up_blocks.0.resnets.1": "decoder.up.1.block.1",
    "decoder.up_blocks.0.upsamplers.0": "decoder.up.1.upsample",
    "decoder.up_blocks.1.resnets.0": "decoder.up.0.block.0",
    "decoder.up_blocks.1.resnets.1": "decoder.up.0.block.1",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
}
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.": "",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.": "attn.",
}


def replaced(key: str, table: dict[str, str]) -> str:
    """The key with every piece of the table replaced, in order."""
    for old, new in table.items():
        key = key.replace(old, new)
    return key


def transcribe(folder: Path, family: str) -> dict[str, torch.Tensor]:
    """The single file's tensors of a tiny diffusers folder."""
    found = {}
    for key, tensor in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        block = next(name for name in UNET if key.startswith(f"{name}."))
        inner = key[len(block) :]
        found[
            f"model.diffusion_model.{UNET[block]}{replaced(inner, RESNET) if 'resnets' in block else inner}"
        ] = tensor
    for key, tensor in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        matrix = "attentions" in key and key.endswith("weight") and tensor.dim() == 2
        found[f"first_stage_model.{replaced(key, VAE)}"] = tensor[..., None, None] if matrix else tensor
    text = load_file(folder / "text_encoder" / "model.safetensors")
    text = {key.removeprefix("text_model."): tensor for key, tensor in text.items()}
    if family == "sd1":
        found |= {f"cond_stage_model.transformer.text_model.{key}": tensor for key, tensor in text.items()}
        return found
    for key, tensor in text.items():
        if "q_proj" in key:
            joined = torch.cat([text[key.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            name = replaced(key, OPEN_CLIP).replace("q_proj.", "in_proj_")
            found[f"cond_stage_model.model.{name}"] = joined
        elif "k_proj" not in key and "v_proj" not in key:
            found[f"cond_stage_model.model.{replaced(key, OPEN_CLIP)}"] = tensor
    return found


def harmless(family: str) -> dict[str, torch.Tensor]:
    """What real files hold beside the weights."""
    found = {
        "betas": torch.rand(1000),
        "alphas_cumprod_prev": torch.rand(1000),
        "sqrt_one_minus_alphas_cumprod": torch.rand(1000),
        "posterior_mean_coef1": torch.rand(1000),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
        "model_ema.diffusion_modeltime_embed0weight": torch.rand(3),
        "first_stage_model.loss.logvar": torch.tensor(0.0),
        "global_step": torch.tensor(470000),
    }
    if family == "sd1":
        found["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    else:  # OpenCLIP's last layer is in the file, and SD2 does not use it
        found |= {"cond_stage_model.model.text_projection": torch.rand(32, 32)}
        found |= {"cond_stage_model.model.logit_scale": torch.tensor(4.6)}
        for name, shape in (
            ("attn.in_proj_weight", (96, 32)),
            ("attn.in_proj_bias", (96,)),
            ("ln_1.weight", (32,)),
        ):
            found[f"cond_stage_model.model.transformer.resblocks.2.{name}"] = torch.rand(shape)
        found["cond_stage_model.model.transformer.resblocks.2.mlp.c_fc.weight"] = torch.rand(64, 32)
    return found


@pytest.fixture(scope="session", params=["sd1", "sd2"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny model of each family in both layouts; tests must not change the files."""
    return make_tiny(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The SD1 one alone."""
    return make_tiny(tmp_path_factory.mktemp("only-sd1"), "sd1")


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The SD2 one alone."""
    return make_tiny(tmp_path_factory.mktemp("only-sd2"), "sd2")


def make_tiny(place: Path, family: str) -> Tiny:
    """Write a tiny model in both layouts."""
    folder, file = place / "folder", place / "model.safetensors"
    write_folder(folder, family)
    tensors = transcribe(folder, family)
    save_file({key: tensor.contiguous() for key, tensor in {**tensors, **harmless(family)}.items()}, file)
    return Tiny(family, folder, file, tensors)


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest model: `folder`, `ours.safetensors`, and `foreign.safetensors` without our metadata."""
    place = tmp_path_factory.mktemp("mini")
    torch.manual_seed(3)
    unet = UNet(
        UNetConfig(
            block_out_channels=(32,),
            heads=(8,),
            transformer_depth=(1,),
            layers_per_block=1,
            cross_attention_dim=32,
        )
    )
    words = Tokenizer.from_words(["a", "red", "cat"], 8)  # CLIP's would make up most of its size
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words.vocab_size,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=8,
        )
    )
    vae = AutoencoderKL(VAEConfig(block_out_channels=(32,), layers_per_block=1))
    scheduler = {**SCHEDULERS["sd1"], **BETAS}
    save_folder(place / "folder", unet=unet, vae=vae, text_encoder=text, tokenizer=words, scheduler=scheduler)
    convert(place / "folder", place / "ours.safetensors")
    save_file(load_file(place / "ours.safetensors"), place / "foreign.safetensors")
    return place
