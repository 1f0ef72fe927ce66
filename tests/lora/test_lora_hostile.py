"""Damaged and foreign LoRA files: each is a CheckpointError that names the file and the key."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastldm.checkpoint.lora import read_lora
from fastldm.errors import CheckpointError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "lora"
TO_K = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"  # [32, 24]
CONV = "down_blocks.1.resnets.0.conv1"  # [32, 32, 3, 3]
A, B, ALPHA = f"unet.{TO_K}.lora_A.weight", f"unet.{TO_K}.lora_B.weight", f"unet.{TO_K}.alpha"
GOOD = {A: torch.ones(4, 24), B: torch.ones(32, 4)}
NAN, INF = float("nan"), float("inf")

CASES: dict[str, tuple[dict[str, Tensor], str, str]] = {
    "no tensors": ({}, "", "holds no LoRA"),
    "rank 0": ({A: torch.ones(0, 24), B: torch.ones(32, 0)}, A, "rank is 0"),
    "ranks disagree": ({A: torch.ones(4, 24), B: torch.ones(32, 3)}, B, r"needs \[32, 4\]"),
    "another width": ({A: torch.ones(4, 768), B: torch.ones(32, 4)}, A, "another base model"),
    "another height": ({A: torch.ones(4, 24), B: torch.ones(64, 4)}, B, r"needs \[32, 4\]"),
    "transposed": ({A: torch.ones(24, 4), B: torch.ones(32, 4)}, A, r"needs \[24, 24\]"),
    "scalar": ({A: torch.tensor(1.0), B: torch.ones(32, 4)}, A, "rank is 0"),
    "five axes": ({A: torch.ones(4, 24, 1, 1, 1), B: torch.ones(32, 4)}, A, "needs"),
    "kernel on a matrix": ({A: torch.ones(4, 24, 3, 3), B: torch.ones(32, 4)}, A, "needs"),
    "no up": ({A: torch.ones(4, 24)}, A, "lacks its up"),
    "no down": ({B: torch.ones(32, 4)}, B, "lacks its down"),
    "alpha alone": ({ALPHA: torch.tensor(1.0)}, ALPHA, "lacks its down"),
    "nan": ({**GOOD, A: torch.full((4, 24), NAN)}, A, "NaN or Inf"),
    "inf": ({**GOOD, B: torch.full((32, 4), INF)}, B, "NaN or Inf"),
    "alpha nan": ({**GOOD, ALPHA: torch.tensor(NAN)}, ALPHA, "NaN or Inf"),
    "alpha 0": ({**GOOD, ALPHA: torch.tensor(0.0)}, ALPHA, "above 0"),
    "alpha negative": ({**GOOD, ALPHA: torch.tensor(-1.0)}, ALPHA, "above 0"),
    "alpha a negative integer": ({**GOOD, ALPHA: torch.tensor(-2)}, ALPHA, "is -2; expected above 0"),
    "alpha a truth": ({**GOOD, ALPHA: torch.tensor(True)}, ALPHA, "BOOL"),
    "alpha of two": ({**GOOD, ALPHA: torch.ones(2)}, ALPHA, "one number"),
    "integers": ({**GOOD, A: torch.ones(4, 24, dtype=torch.int32)}, A, "I32"),
    "twice": ({**GOOD, f"base_model.model.{TO_K}.lora_A.weight": GOOD[A]}, "", "given twice"),
    "mid on a matrix": ({**GOOD, f"unet.{TO_K}.lora_mid.weight": torch.ones(4, 4, 3, 3)}, "mid", "needs"),
    "mid of another rank": (
        {
            f"unet.{CONV}.lora_down.weight": torch.ones(4, 32, 1, 1),
            f"unet.{CONV}.lora_mid.weight": torch.ones(5, 4, 3, 3),
            f"unet.{CONV}.lora_up.weight": torch.ones(32, 4, 1, 1),
        },
        "lora_mid",
        r"needs \[4, 4, 3, 3\]",
    ),
    "unknown module": (
        {**GOOD, "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_kk.lora_A.weight": GOOD[A]},
        "to_kk",
        rf"no module of this model; the nearest is \S*{TO_K}$",
    ),
    "unknown kohya module": (
        {"lora_unet_down_blocks_7_resnets_0_conv1.alpha": torch.tensor(1.0)},
        "down_blocks_7",
        r"the nearest is lora_unet_down_blocks_\d_resnets_0_conv1$",
    ),
    "sdxl": (
        {f"lora_te2_text_model_encoder_layers_0_mlp_fc{i}.alpha": torch.tensor(1.0) for i in (1, 2)},
        "lora_te2",
        "so do 1 more",
    ),
    "a bias": ({**GOOD, f"unet.{TO_K}.lora_B.bias": torch.ones(32)}, "bias", "names no factor of a LoRA"),
    "a whole weight": ({f"unet.{TO_K}.weight": torch.ones(32, 24)}, TO_K, "names no factor of a LoRA"),
    "a norm": ({"unet.conv_norm_out.lora_A.weight": torch.ones(1, 32)}, "conv_norm_out", "no module"),
    "autoencoder": ({"vae.encoder.conv_in.lora_A.weight": torch.ones(1, 3, 3, 3)}, "vae", "no module"),
    "dora": ({**GOOD, f"unet.{TO_K}.dora_scale": torch.ones(32, 1)}, "dora_scale", "DoRA"),
    "peft's dora": ({**GOOD, f"unet.{TO_K}.lora_magnitude_vector": torch.ones(32)}, "magnitude", "DoRA"),
    "loha": ({"lora_unet_mid_block_resnets_0_conv1.hada_w1_a": torch.ones(4, 4)}, "hada", "LoHa"),
    "lokr": ({"lora_unet_mid_block_resnets_0_conv1.lokr_w1": torch.ones(4, 4)}, "lokr", "LoKr"),
    "full difference": ({"lora_unet_mid_block_resnets_0_conv1.diff": torch.ones(4)}, "diff", "full weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_named(
    networks: dict[str, nn.Module], write: Callable[..., Path], case: str
) -> None:
    tensors, key, why = CASES[case]
    file = write(tensors)
    with pytest.raises(CheckpointError, match=why) as caught:
        read_lora(file, networks)
    assert caught.value.file == str(file) and key in (caught.value.key or "")


def test_the_base_model_that_a_file_tells_of_is_told(
    networks: dict[str, nn.Module], write: Callable[..., Path]
) -> None:
    notes = {"ss_base_model_version": "sdxl_base_v1-0"}
    for tensors in (CASES["sdxl"][0], CASES["another width"][0]):
        with pytest.raises(CheckpointError, match="made for 'sdxl_base_v1-0'"):
            read_lora(write(tensors, notes), networks)


SETTINGS = {
    "peft_type": "LOHA",
    "use_dora": True,
    "fan_in_fan_out": True,
    "lora_alpha": 0,
    "alpha_pattern": {"(a+)+$": 1},
    "alpha_pattern to_k": {"to_k": -1},
    "layer_replication": [[0, 2]],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_peft_that_mean_something_else(
    networks: dict[str, nn.Module], write: Callable[..., Path], name: str
) -> None:
    field = name.split()[0]
    file = write({f"base_model.model.{TO_K}.lora_{k}.weight": GOOD[v] for k, v in (("A", A), ("B", B))})
    config = file.with_name("adapter_config.json")
    config.write_text(json.dumps({field: SETTINGS[name]}))
    with pytest.raises(CheckpointError) as caught:
        read_lora(file, networks)
    assert (caught.value.file, caught.value.key) == (str(config), name)
    config.write_text("[")
    with pytest.raises(CheckpointError, match="JSON"):
        read_lora(file, networks)
    for text in ("[]", "{", json.dumps({f"unet.{field}": SETTINGS[name]})):
        with pytest.raises(CheckpointError) as caught:
            read_lora(write(GOOD, {"lora_adapter_metadata": text}), networks)
        assert caught.value.file == str(file)


def test_many_unknown_keys_are_refused_quickly(
    networks: dict[str, nn.Module], write: Callable[..., Path]
) -> None:
    tensors = {f"unet.{'a.' * 200}{i}.lora_A.weight": torch.ones(1) for i in range(3000)}
    file = write(tensors)
    began = time.process_time()
    with pytest.raises(CheckpointError, match="so do 2999 more"):
        read_lora(file, networks)
    assert time.process_time() - began <= 2


def test_what_is_no_lora_file(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    pickle = tmp_path / "old.pt"
    torch.save(GOOD, pickle)
    for path, why in (
        (pickle, "pickle"),
        (tmp_path / "none.safetensors", "cannot be read"),
        (tmp_path, "holds neither"),
        (FIXTURES / "base_sd15.safetensors", "names no factor"),
    ):
        with pytest.raises(CheckpointError, match=why) as caught:
            read_lora(path, networks)
        assert caught.value.file == str(path)


@settings(max_examples=150)
@given(data=st.data())
def test_a_mutated_file_is_refused_or_whole(
    networks: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes changed, cut out or put in: a CheckpointError, or finite factors that fit."""
    whole = (FIXTURES / "lora_kohya_sd15_mixed.safetensors").read_bytes()
    header = int.from_bytes(whole[:8], "little")
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1) | st.integers(8, 8 + header))
        kind = data.draw(st.sampled_from(["set", "cut", "insert"]))
        if kind == "set":
            damaged[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del damaged[at : at + data.draw(st.integers(1, 64))]
        else:
            damaged[at:at] = data.draw(st.binary(max_size=8))
    file = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    file.write_bytes(damaged)
    try:
        lora = read_lora(file, networks)
    except CheckpointError as error:
        assert error.file == str(file)
        return
    for module, change in lora.changes.items():
        part, _, name = module.partition(".")
        weight = networks[part].get_submodule(name).weight
        assert change.up.shape[1] == change.down.shape[0]
        assert (change.up.shape[0], change.down.shape[1]) == (len(weight), weight[0].numel())
        assert torch.isfinite(change.up).all() and torch.isfinite(change.down).all()
        assert 0 < change.scale < float("inf")
