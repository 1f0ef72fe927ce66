"""What `train_lora` writes, as peft and diffusers read it; and a file of theirs, merged by both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastldm
from fastldm.training.fit import FitSettings
from fastldm.training.lora import ATTENTION, TEXT_ATTENTION, LoraSettings, train_lora

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

FIXTURES = Path(__file__).parents[1] / "fixtures" / "lora"


@pytest.fixture(scope="module")
def trained(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of both networks, of convolutions too, with alpha ≠ rank."""
    folder = tmp_path_factory.mktemp("trained")
    drawn = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    data = [(latents, "a red circle") for latents in drawn]
    settings = LoraSettings(
        FitSettings(steps=5, batch=4, learning_rate=0.05, warmup=1),
        rank=3,
        alpha=7.0,
        targets=(*ATTENTION, "conv1", "proj_in"),
        text_targets=TEXT_ATTENTION,
    )
    components = fastldm.load(base_folder).components
    train_lora(components, data, settings, folder, folder / "lora", report=lambda line: None)
    return folder / "lora"


def assert_same(ours: torch.nn.Module, theirs: dict[str, torch.Tensor], plain: torch.nn.Module) -> None:
    """The same merged weights, up to the order of a float32 sum; and more than a few that changed."""
    mine, before = ours.state_dict(), plain.state_dict()
    changed = 0
    for key, want in theirs.items():
        got = mine.get(key, mine.get(f"text_model.{key}"))
        if got is None:
            assert "position_ids" in key
            continue
        old = before.get(key, before.get(f"text_model.{key}"))
        changed += not torch.equal(got, old)
        assert (got - want).abs().max() <= 4e-6 * want.abs().max(), key
    assert changed >= 3


def test_peft_reads_what_is_written(base_folder: Path, trained: Path) -> None:
    pipe, plain = fastldm.load(base_folder), fastldm.load(base_folder)
    pipe.load_lora(trained, 1.0)
    unet = diffusers.UNet2DConditionModel.from_pretrained(base_folder / "unet")
    merged = peft.PeftModel.from_pretrained(unet, str(trained / "unet")).merge_and_unload()
    assert_same(pipe.components.unet, merged.state_dict(), plain.components.unet)
    text = transformers.CLIPTextModel.from_pretrained(base_folder / "text_encoder")
    if not hasattr(text, "text_model"):  # a level that transformers 5.6 left out, as peft does not
        text, whole = torch.nn.Module(), text
        text.text_model = whole
    merged = peft.PeftModel.from_pretrained(text, str(trained / "text_encoder")).merge_and_unload()
    assert_same(pipe.components.text_encoder, merged.state_dict(), plain.components.text_encoder)


@pytest.mark.parametrize(
    "file", ["trained", "lora_peft", "lora_peft_alpha_in_metadata", "lora_kohya_sd15", "lora_old_attn_procs"]
)
def test_diffusers_makes_the_same_weights(base_folder: Path, trained: Path, file: str) -> None:
    path = trained if file == "trained" else FIXTURES / f"{file}.safetensors"
    pipe, plain = fastldm.load(base_folder), fastldm.load(base_folder)
    pipe.load_lora(path, 0.6)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(base_folder)
    weights = "pytorch_lora_weights.safetensors" if file == "trained" else path.name
    theirs.load_lora_weights(str(path if file == "trained" else path.parent), weight_name=weights)
    theirs.fuse_lora(lora_scale=0.6)
    theirs.unload_lora_weights()
    assert_same(pipe.components.unet, theirs.unet.state_dict(), plain.components.unet)
    if file != "lora_old_attn_procs":
        text = theirs.text_encoder.state_dict()
        assert_same(pipe.components.text_encoder, text, plain.components.text_encoder)
