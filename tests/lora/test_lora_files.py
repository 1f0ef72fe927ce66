"""LoRA files of every kind against what their own programs made of them, and against W + s·BA in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastldm
from fastldm.checkpoint.lora import merged, read_lora, write_lora

FIXTURES = Path(__file__).parents[1] / "fixtures" / "lora"
FILES = [
    "peft",
    "peft_alpha_in_metadata",
    "diffusers_down_up",
    "old_attn_procs",
    "kohya_sd15",
    "kohya_sd15_mixed",
]
# A module of each kind, and its names in the files of each program.
MODULES = {
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (32, 24),
    "unet.down_blocks.1.resnets.0.conv1": (32, 32, 3, 3),
    "unet.up_blocks.1.resnets.0.conv_shortcut": (32, 64, 1, 1),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (24, 24),
}


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", FILES)
def test_a_merged_model_is_the_recorded_one(
    pipe: fastldm.Pipeline, recorded: Callable[..., tuple[dict[str, Tensor], dict[str, str]]], name: str, strength: float
) -> None:
    inputs = recorded("base_sd15")[0]
    expected, notes = recorded(f"expected_{name}")
    tolerance = json.loads(notes["tol"])
    before = {key: weight.clone() for key, weight in pipe.components.unet.state_dict().items()}
    before = {f"unet.{key}": value for key, value in before.items()} | {
        f"text_encoder.{key}": value.clone() for key, value in pipe.components.text_encoder.state_dict().items()
    }
    pipe.load_lora(FIXTURES / f"lora_{name}.safetensors", strength)

    def close(got: Tensor, key: str, allowed: float) -> None:
        want = expected[f"out.scale{strength}.{key}"]
        assert (got - want).abs().max() <= allowed * want.abs().max(), key

    deltas = [key.partition(".delta.")[2] for key in expected if f"scale{strength}.delta" in key]
    assert bool(deltas) == (strength == 1.0)
    now = {f"unet.{key}": value for key, value in pipe.components.unet.state_dict().items()} | {
        f"text_encoder.{key}": value for key, value in pipe.components.text_encoder.state_dict().items()
    }
    for key in deltas:
        close(now[key] - before[key], f"delta.{key}", tolerance["delta"])
    changed = {key for key, value in now.items() if not torch.equal(value, before[key])}
    assert changed == set(json.loads(notes["config"])["changed_weights"])

    unet = pipe.components.unet
    with torch.inference_mode():
        context = pipe.components.text_encoder(inputs["in.input_ids"])
        rows = torch.zeros(2, dtype=torch.long)
        sample = unet(
            inputs["in.x"], unet.condition(context, inputs["in.t"].float()[:, None]), rows
        )
    close(context, "context", tolerance["default"])
    close(sample, "sample", tolerance["default"])
