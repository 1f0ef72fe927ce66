"""The rename tables against diffusers' own converters, on the full key lists of SD1.5 and SD2.1."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders import single_file_utils

from fastldm.checkpoint.rename import (
    CLIP,
    OPEN_CLIP,
    SHORT_CLIP,
    harmless,
    modern_text_key,
    modern_vae_key,
    text_names,
    unet_names,
    vae_names,
)
from fastldm.models.clip import CLIP_L, OPENCLIP_H, CLIPTextModel
from fastldm.models.unet import UNet, UNetConfig
from fastldm.models.vae import AutoencoderKL, VAEConfig

SD21 = UNetConfig(heads=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True)
DEEP = UNetConfig(
    block_out_channels=(32, 64, 64),
    heads=(1, 1, 1),
    transformer_depth=(0, 2, 3),
    mid_depth=3,
    layers_per_block=1,
    use_linear_projection=True,
)


def keys(network: type[torch.nn.Module], config: object) -> dict[str, torch.Tensor]:
    """The tensors of a network, without storage."""
    with torch.device("meta"):
        return network(config).state_dict()


@pytest.mark.parametrize("config", [UNetConfig(), SD21, DEEP], ids=["sd15", "sd21", "deep"])
def test_unet_names_equal_diffusers(config: UNetConfig) -> None:
    tensors = keys(UNet, config)
    names = unet_names(config)
    single = {names.to_single(key): torch.tensor(i) for i, key in enumerate(tensors)}
    assert None not in single and len(single) == len(tensors)
    converted = single_file_utils.convert_ldm_unet_checkpoint(
        dict(single), {**config.to_dict(), "class_embed_type": None}
    )
    assert {key: int(value) for key, value in converted.items()} == {key: i for i, key in enumerate(tensors)}
    assert [names.to_folder(key) for key in single] == [(key,) for key in tensors]


@pytest.mark.parametrize(
    "config",
    [VAEConfig(), VAEConfig(block_out_channels=(32, 64), layers_per_block=1)],
    ids=["sd", "tiny"],
)
def test_vae_names_equal_diffusers(config: VAEConfig) -> None:
    tensors = keys(AutoencoderKL, config)
    names = vae_names(config.to_dict())
    single = {names.to_single(key): tensor for key, tensor in tensors.items()}
    assert None not in single and len(single) == len(tensors)
    marked = {key: torch.full((1, 1), i) for i, key in enumerate(single)}
    converted = single_file_utils.convert_ldm_vae_checkpoint(marked, config.to_dict())
    found = {key: int(value.flatten()[0]) for key, value in converted.items()}
    assert found == {key: i for i, key in enumerate(tensors)}
    assert [names.to_folder(key) for key in single] == [(key,) for key in tensors]


@pytest.mark.parametrize("stage", [CLIP, SHORT_CLIP])
def test_clip_names(stage: str) -> None:
    tensors = keys(CLIPTextModel, CLIP_L)
    names = text_names(CLIP_L.to_dict(), stage)
    single = {key: names.to_single(key) for key in tensors}
    assert all(name == stage + key.removeprefix("text_model.") for key, name in single.items())
    assert [names.to_folder(name) for name in single.values() if name] == [(key,) for key in tensors]


def test_open_clip_names_equal_diffusers() -> None:
    tensors = keys(CLIPTextModel, OPENCLIP_H)
    names = text_names(OPENCLIP_H.to_dict(), OPEN_CLIP)
    single = list(dict.fromkeys(names.to_single(key) for key in tensors))
    assert len(single) == 4 + 23 * 12
    marked = {}
    for i, key in enumerate(single):
        assert key is not None
        rows = 3 * 1024 if len(names.to_folder(key)) == 3 else 1
        marked[key] = i + torch.arange(rows, dtype=torch.float64)[:, None] / 4096
    model = torch.nn.Module()
    model.config = OPENCLIP_H
    converted = single_file_utils.convert_open_clip_checkpoint(model, dict(marked))
    converted.pop("text_model.embeddings.position_ids", None)
    assert converted.keys() == tensors.keys()
    for i, key in enumerate(single):
        assert key is not None
        for part, name in enumerate(names.to_folder(key)):
            assert names.to_single(name) == key
            assert float(converted[name].flatten()[0]) == i + part * 1024 / 4096


@pytest.mark.parametrize(
    "key", ["", ".", "conv_in", "down_blocks.9.resnets.0.norm1.weight", "output_blocks.2.3.conv.weight"]
)
def test_unknown_keys_have_no_name(key: str) -> None:
    names = unet_names(UNetConfig())
    assert names.to_folder(key) == ()
    assert names.to_single(key) == ("model.diffusion_model.input_blocks.0.0" if key == "conv_in" else None)


def test_old_spellings() -> None:
    old = "decoder.mid_block.attentions.0.{}.weight"
    pairs = {
        "query": "to_q",
        "key": "to_k",
        "value": "to_v",
        "proj_attn": "to_out.0",
        "group_norm": "group_norm",
    }
    assert {name: modern_vae_key(old.format(name)) for name in pairs} == {
        n: old.format(m) for n, m in pairs.items()
    }
    assert modern_vae_key("encoder.key.weight") == "encoder.key.weight"
    assert modern_text_key("encoder.layers.0.mlp.fc1.bias") == "text_model.encoder.layers.0.mlp.fc1.bias"
    assert modern_text_key("text_model.final_layer_norm.bias") == "text_model.final_layer_norm.bias"


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("cond_stage_model.transformer.text_model.embeddings.position_ids", "position_ids"),
        ("cond_stage_model.model.attn_mask", "attn_mask"),
        ("betas", "schedule"),
        ("alphas_cumprod_prev", "schedule"),
        ("sqrt_recipm1_alphas_cumprod", "schedule"),
        ("posterior_log_variance_clipped", "schedule"),
        ("log_one_minus_alphas_cumprod", "schedule"),
        ("lvlb_weights", "schedule"),
        ("logvar", "schedule"),
        ("global_step", "schedule"),
        ("scale_factor", "scale_factor"),
        ("model_ema.decay", "model_ema"),
        ("model_ema.diffusion_modelinput_blocks00weight", "model_ema"),
        ("first_stage_model.loss.perceptual_loss.lin0.model.1.weight", "loss"),
        ("cond_stage_model.model.logit_scale", "logit_scale"),
        ("cond_stage_model.model.text_projection", "text_projection"),
        ("model.diffusion_model.betas", None),
        ("first_stage_model.lossy.weight", None),
        ("model.diffusion_model.out.2.weight", None),
        ("alphas_cumprod.weight", None),
    ],
)
def test_harmless_keys(key: str, kind: str | None) -> None:
    assert harmless(key) == kind
