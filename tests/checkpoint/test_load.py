"""Both layouts held against diffusers and transformers; what is skipped, guessed, chosen and refused."""

from __future__ import annotations

import gc
import json
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from fastldm.checkpoint import convert, inspect, load_components
from fastldm.errors import CheckpointError, InvalidArgument
from fastldm.models.tokenizer import Tokenizer

TOLERANCE = 1e-5  # of the largest output: quality.md section 5
UNET = "diffusion_pytorch_model.safetensors"
WORDS = Tokenizer.from_words(["a", "red", "cat"], 77)  # as in the tiny folders


@pytest.fixture(autouse=True)
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test here runs without a network."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def load(path: Path, **arguments: Any) -> Any:
    """Load with the tiny models' tokenizer, which their single files lack."""
    return load_components(path, tokenizer=WORDS, **arguments)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max())


@torch.no_grad()
def test_both_layouts_compute_what_diffusers_computes(tiny: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(WORDS.vocab_size, (2, 77), generator=generator)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    image = torch.rand(1, 3, 16, 16, generator=generator) * 2 - 1
    context = CLIPTextModel.from_pretrained(tiny.folder / "text_encoder")(ids).last_hidden_state
    vae = AutoencoderKL.from_pretrained(tiny.folder / "vae")
    unet = UNet2DConditionModel.from_pretrained(tiny.folder / "unet")
    predicted = unet(latents, 501, context).sample
    for path in (tiny.folder, tiny.file):
        loaded = load_components(path) if path == tiny.folder else load(path)
        assert loaded.family == tiny.family and loaded.path == path
        assert loaded.tokenizer.encode("a red cat") == WORDS.encode("a red cat")
        assert (
            loaded.scheduler.num_train_timesteps == 1000 and loaded.scheduler.beta_schedule == "scaled_linear"
        )
        assert close(loaded.text_encoder(ids), context)
        assert close(loaded.vae.encode(image).mean, vae.encode(image).latent_dist.mean)
        assert close(loaded.vae.decode(latents), vae.decode(latents).sample)
        condition = loaded.unet.condition(context, torch.tensor([501.0]))
        assert close(loaded.unet(latents, condition, torch.zeros(2, dtype=torch.int64)), predicted)
        assert not any(p.requires_grad or p.is_meta for p in loaded.unet.parameters())
        assert not loaded.unet.training


def test_facts_of_both_layouts(tiny: Any) -> None:
    folder, file = inspect(tiny.folder), inspect(tiny.file)
    networks = {
        name: sum(p.numel() for p in kind.from_pretrained(tiny.folder / name).parameters())
        for name, kind in (
            ("unet", UNet2DConditionModel),
            ("vae", AutoencoderKL),
            ("text_encoder", CLIPTextModel),
        )
    }
    expected = {**networks, "total": sum(networks.values())}
    assert folder.parameters == file.parameters == expected
    assert (folder.layout, file.layout) == ("folder", "single file")
    assert folder.dtype == file.dtype == "float32" and folder.sampler == "ddim"
    assert folder.prediction == ("epsilon" if tiny.family == "sd1" else "v_prediction")
    assert folder.skipped == {} and len(folder.files) == 3 and len(folder.hash) == len(file.hash) == 64
    common = {"schedule": 5, "model_ema": 3, "loss": 1}
    own = (
        {"position_ids": 1}
        if tiny.family == "sd1"
        else {"text_projection": 1, "logit_scale": 1, "unused_layer": 4}
    )
    assert file.skipped == {**common, **own}
    assert file.scheduler == ("PNDMScheduler" if tiny.family == "sd1" else "DDIMScheduler")
    assert sum("guessed" in warning and "heads" in warning for warning in file.warnings) == 2
    assert not any("guessed" in warning for warning in folder.warnings)


def test_the_hash_follows_the_weights(tiny_sd1: Any, tmp_path: Path) -> None:
    import hashlib

    assert inspect(tiny_sd1.file).hash == hashlib.sha256(tiny_sd1.file.read_bytes()).hexdigest()
    shutil.copytree(tiny_sd1.folder, tmp_path / "copy")
    assert inspect(tmp_path / "copy").hash == inspect(tiny_sd1.folder).hash
    weights = tmp_path / "copy" / "vae" / UNET
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert inspect(tmp_path / "copy").hash != inspect(tiny_sd1.folder).hash


def single(tiny: Any, file: Path, changes: dict[str, torch.Tensor] | None = None, **metadata: str) -> Path:
    """The tiny single file with some tensors replaced and some metadata."""
    tensors = {**tiny.tensors, **(changes or {})}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata)
    return file


LAST_NORM = "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.norm1.bias"


@pytest.mark.parametrize(
    ("config", "metadata", "spread", "prediction", "guessed"),
    [
        (None, {}, 0.08, "epsilon", True),
        (None, {}, 0.1, "v_prediction", True),
        (None, {"prediction_type": "v_prediction"}, 0.0, "v_prediction", False),
        (None, {"modelspec.prediction_type": "v"}, 0.0, "v_prediction", False),
        (None, {"modelspec.predict_key": "epsilon"}, 0.1, "epsilon", False),
        (None, {"modelspec.prediction_type": "something else"}, 0.1, "v_prediction", True),
        ("epsilon", {"prediction_type": "v_prediction"}, 0.1, "epsilon", False),
        ("v", {}, 0.0, "v_prediction", False),
        ({"prediction_type": "v_prediction"}, {}, 0.0, "v_prediction", False),
        ({"scheduler": {"prediction_type": "v_prediction"}}, {}, 0.0, "v_prediction", False),
    ],
)
def test_what_an_sd2_file_predicts(
    tiny_sd2: Any,
    tmp_path: Path,
    config: Any,
    metadata: dict[str, str],
    spread: float,
    prediction: str,
    guessed: bool,
) -> None:
    bias = torch.tensor([spread, -spread]).repeat(32) + 1
    found = inspect(single(tiny_sd2, tmp_path / "a.safetensors", {LAST_NORM: bias}, **metadata), config)
    assert found.prediction == prediction
    assert any("guessed prediction_type" in warning for warning in found.warnings) == guessed
    loaded = load(tmp_path / "a.safetensors", config=config)
    assert loaded.scheduler.prediction == prediction and set(found.warnings) == set(loaded.warnings)
    assert loaded.unet.config.sample_size == (96 if prediction == "v_prediction" else 64)


def test_what_an_sd1_file_predicts(tiny_sd1: Any, tmp_path: Path) -> None:
    assert inspect(single(tiny_sd1, tmp_path / "a.safetensors")).prediction == "epsilon"
    assert (
        inspect(single(tiny_sd1, tmp_path / "b.safetensors", prediction_type="v")).prediction
        == "v_prediction"
    )


def test_config_states_what_shapes_do_not_tell(tiny_sd1: Any, tmp_path: Path) -> None:
    config = {
        "unet": {"attention_head_dim": 4},
        "text_encoder": {"num_attention_heads": 2},
        "vae": {"scaling_factor": 0.5},
        "scheduler": {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for given in (config, tmp_path / "config.json", str(tmp_path / "config.json")):
        loaded = load(tiny_sd1.file, config=given)
        assert loaded.unet.config.heads == (4, 4) and loaded.text_encoder.config.num_attention_heads == 2
        assert loaded.vae.config.scaling_factor == 0.5 and loaded.scheduler.sampler == "euler"
        assert loaded.scheduler.steps_offset == 0 and not loaded.warnings
    folder = load(tiny_sd1.file, config=tiny_sd1.folder)
    assert folder.unet.config.heads == (8, 8) and folder.unet.config.sample_size == 8
    (tmp_path / "scheduler.json").write_text(json.dumps(config["scheduler"]))
    assert inspect(tiny_sd1.folder, tmp_path / "scheduler.json").sampler == "euler"
    assert inspect(tiny_sd1.folder, "v_prediction").prediction == "v_prediction"


@pytest.mark.parametrize(
    "config",
    [
        "x",
        "",
        "none.json",
        5,
        [],
        {"unet": 5},
        {"UNet": {}},
        {"prediction_type": "w"},
        {5: {}},
        {"variant": 5},
        "\0",
    ],
)
def test_config_is_checked(tiny_sd1: Any, config: Any) -> None:
    with pytest.raises(InvalidArgument, match="config"):
        inspect(tiny_sd1.file, config)


def test_tokenizer_is_checked(tiny_sd1: Any) -> None:
    with pytest.raises(InvalidArgument, match="^tokenizer=5: allowed is a Tokenizer, or a folder"):
        load_components(tiny_sd1.file, tokenizer=5)  # type: ignore[arg-type]


def test_the_scale_factor_buffer_is_read(tiny_sd1: Any, tmp_path: Path) -> None:
    file = single(tiny_sd1, tmp_path / "a.safetensors", {"scale_factor": torch.tensor(0.25)})
    assert load(file).vae.config.scaling_factor == 0.25
    assert inspect(file).skipped == {"scale_factor": 1}
    for odd in (torch.tensor([1.0, 2.0]), torch.tensor(-1.0), torch.tensor(float("nan")), torch.tensor(3)):
        with pytest.raises(CheckpointError, match="scale_factor"):
            inspect(single(tiny_sd1, tmp_path / "b.safetensors", {"scale_factor": odd}))


def test_inpainting_files_are_recognised(tiny: Any, tmp_path: Path) -> None:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    wide = torch.randn(tiny.tensors[key].shape[0], 9, 3, 3)
    found = inspect(single(tiny, tmp_path / "a.safetensors", {key: wide}))
    assert found.family == f"{tiny.family}-inpaint" and found.prediction == "epsilon"
    assert found.scheduler == "DDIMScheduler"
    with pytest.raises(CheckpointError, match="in_channels"):
        inspect(single(tiny, tmp_path / "a.safetensors", {key: wide[:, :5].contiguous()}))


def test_spellings_of_the_text_encoder_and_the_vae(tiny_sd1: Any, tmp_path: Path) -> None:
    whole = load(tiny_sd1.file)
    short = {key.replace("transformer.text_model.", "transformer."): t for key, t in tiny_sd1.tensors.items()}
    matrices = {key: t[..., 0, 0] if ".attn_1." in key and t.dim() == 4 else t for key, t in short.items()}
    save_file({key: tensor.contiguous() for key, tensor in matrices.items()}, tmp_path / "short.safetensors")
    found = load(tmp_path / "short.safetensors")
    shutil.copytree(tiny_sd1.folder, tmp_path / "old")
    vae = load_file(tmp_path / "old" / "vae" / UNET)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        vae = {
            key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): tensor for key, tensor in vae.items()
        }
    assert "encoder.mid_block.attentions.0.query.weight" in vae
    save_file(vae, tmp_path / "old" / "vae" / UNET)
    text = load_file(tmp_path / "old" / "text_encoder" / "model.safetensors")
    text = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in text.items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(text, tmp_path / "old" / "text_encoder" / "model.safetensors")
    old = load(tmp_path / "old")
    modern = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    for part in ("q", "k", "v", "proj_out"):  # as some converters left them, and the matrices such
        short = {key.replace(f".attn_1.{part}.", f".attn_1.{modern[part]}."): t for key, t in short.items()}
    assert "first_stage_model.decoder.mid.attn_1.to_out.0.weight" in short
    flat = {key: t[..., 0, 0] if ".attn_1." in key and t.dim() == 4 else t for key, t in short.items()}
    save_file({key: tensor.contiguous() for key, tensor in flat.items()}, tmp_path / "modern.safetensors")
    new = load(tmp_path / "modern.safetensors")
    both = "first_stage_model.decoder.mid.attn_1.q.bias"
    twice = {**flat, both: torch.zeros(64)}
    save_file({key: tensor.contiguous() for key, tensor in twice.items()}, tmp_path / "twice.safetensors")
    with pytest.raises(CheckpointError, match="stands for the same tensor"):
        load(tmp_path / "twice.safetensors")
    for name in ("unet", "vae", "text_encoder"):
        expected = getattr(whole, name).state_dict()
        for other in (found, old, new):
            state = getattr(other, name).state_dict()
            assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    assert inspect(tmp_path / "old").skipped == {"position_ids": 1}


def test_sd2_without_the_unused_layer(tiny_sd2: Any, tmp_path: Path) -> None:
    file = single(tiny_sd2, tmp_path / "a.safetensors")
    loaded = load(file)
    assert loaded.text_encoder.config.num_hidden_layers == 2 and inspect(file).skipped == {}
    assert load(file, config={"text_encoder": {"num_hidden_layers": 1}}).family == "sd2"


def test_shards_and_variants(tiny_sd1: Any, tmp_path: Path) -> None:
    expected = load(tiny_sd1.folder)
    model = tmp_path / "model"
    shutil.copytree(tiny_sd1.folder, model)
    tensors = load_file(model / "unet" / UNET)
    half = {key: (tensor * 0).to(torch.float16) for key, tensor in tensors.items()}
    save_file(half, model / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    save_file(half, model / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    assert inspect(model).dtype == "float32"
    for name in ("vae", "text_encoder"):
        file = next((model / name).glob("*.safetensors"))
        save_file(load_file(file), file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    asked = load(model, config={"variant": "fp16"})
    assert not any(p.any() for p in asked.unet.parameters())
    ema = load(model, config={"variant": "non_ema"})  # of the UNet alone: the others have their plain files
    assert not any(p.any() for p in ema.unet.parameters())
    assert all(torch.equal(t, ema.vae.state_dict()[key]) for key, t in expected.vae.state_dict().items())
    with pytest.raises(CheckpointError, match="variant 'bf16'"):
        inspect(model, {"variant": "bf16"})

    (model / "unet" / UNET).unlink()
    keys = sorted(tensors)
    for form, index in (
        ("diffusion_pytorch_model-{}.safetensors", f"{UNET}.index.json"),
        ("diffusion_pytorch_model.fp16-{}.safetensors", f"{UNET}.index.fp16.json"),
    ):
        shards = {form.format(f"0000{i + 1}-of-00003"): keys[i::3] for i in range(3)}
        for name, part in shards.items():
            save_file({key: tensors[key] for key in part}, model / "unet" / name)
        weight_map = {key: name for name, part in shards.items() for key in part}
        (model / "unet" / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        for file in (model / "unet").glob("*model.*.safetensors"):
            file.unlink() if "-of-" not in file.name else None
        loaded = load(model)
        assert len(inspect(model).files) == 5
        state = loaded.unet.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.unet.state_dict().items())
        wrong = {**weight_map, keys[0]: next(name for name in shards if name != weight_map[keys[0]])}
        for content in (
            wrong,
            {k: v for k, v in weight_map.items() if k != keys[0]},
            {**weight_map, "extra": min(shards)},
        ):
            (model / "unet" / index).write_text(json.dumps({"weight_map": content}))
            with pytest.raises(CheckpointError, match="extra" if "extra" in content else keys[0]):
                load(model)
        (model / "unet" / index).unlink()


def test_dtypes(tiny_sd1: Any, tmp_path: Path) -> None:
    half = {key: tensor.to(torch.float16) for key, tensor in tiny_sd1.tensors.items()}
    half["model.diffusion_model.out.2.bias"] = half["model.diffusion_model.out.2.bias"].to(torch.bfloat16)
    save_file({key: tensor.contiguous() for key, tensor in half.items()}, tmp_path / "half.safetensors")
    assert inspect(tmp_path / "half.safetensors").dtype == "float16, bfloat16"
    for dtype in (None, torch.bfloat16, torch.float64):
        loaded = load(tmp_path / "half.safetensors", dtype=dtype)
        networks = (loaded.unet, loaded.vae, loaded.text_encoder)
        assert {p.dtype for network in networks for p in network.parameters()} == {dtype or torch.float32}
        stored = half["model.diffusion_model.input_blocks.0.0.weight"]
        assert torch.equal(loaded.unet.conv_in.weight, stored.to(dtype or torch.float32))


@pytest.mark.parametrize(
    "key", ["model.diffusion_model.time_embed.0.weight", "first_stage_model.quant_conv.bias"]
)
def test_one_wrong_tensor_is_named(tiny_sd1: Any, tmp_path: Path, key: str) -> None:
    file = tmp_path / "a.safetensors"
    tensors = {k: tensor.contiguous() for k, tensor in tiny_sd1.tensors.items()}
    cases = {
        "is missing": {k: tensor for k, tensor in tensors.items() if k != key},
        r"has shape .*; expected": {**tensors, key: torch.zeros(2, *tensors[key].shape)},
        "has dtype I32": {**tensors, key: tensors[key].to(torch.int32)},
        "holds NaN": {**tensors, key: tensors[key] * float("nan")},
    }
    for why, content in cases.items():
        save_file(content, file)
        with pytest.raises(CheckpointError, match=why) as caught:
            load(file)
        assert (caught.value.file, caught.value.key) == (str(file), key)
    save_file({**tensors, f"{key}2": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="is unexpected") as caught:
        load(file)
    assert (caught.value.file, caught.value.key) == (str(file), f"{key}2")


def test_one_wrong_tensor_of_a_folder_is_named(tiny_sd1: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd1.folder, tmp_path / "model")
    weights = tmp_path / "model" / "unet" / UNET
    tensors = load_file(weights)
    key = "mid_block.attentions.0.proj_in.weight"
    for content, named in (
        ({k: tensor for k, tensor in tensors.items() if k != key}, key),
        ({**tensors, key: tensors[key][:-1].contiguous()}, key),
        ({**tensors, "model_emma.x": torch.ones(1)}, "model_emma.x"),
    ):
        save_file(content, weights)
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path / "model")
        assert (caught.value.file, caught.value.key) == (str(weights), named)


FOREIGN = {
    "SDXL": "conditioner.embedders.1.model.token_embedding.weight",
    "SDXL refiner": "conditioner.embedders.0.model.token_embedding.weight",
    "Stable Diffusion 3": "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    "Flux": "double_blocks.0.img_attn.qkv.weight",
    "upscaler": "low_scale_model.betas",
    "ControlNet": "control_model.input_hint_block.0.weight",
    "textual inversion": "emb_params",
    "LoRA": "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
    "one component": "mid_block.attentions.0.time_embedding.linear_1.weight",
    "autoencoder alone": "decoder.mid.block_1.norm1.weight",
    "UNet alone": "input_blocks.0.0.weight",
    "DiT": "x_embedder.proj.weight",
    "no unet": "something.else",
}


@pytest.mark.parametrize(("why", "key"), FOREIGN.items(), ids=FOREIGN)
def test_other_models_are_recognised(tmp_path: Path, why: str, key: str) -> None:
    key = key.removeprefix("mid_block.attentions.0.")
    save_file({key: torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=why):
        inspect(tmp_path / "a.safetensors")


def test_files_without_a_part_say_so(tiny_sd1: Any, tmp_path: Path) -> None:
    for prefix, part in (("first_stage_model.", "vae"), ("cond_stage_model.", "text encoder")):
        rest = {k: tensor.contiguous() for k, tensor in tiny_sd1.tensors.items() if not k.startswith(prefix)}
        save_file(rest, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match=f"holds no {part}"):
            load(tmp_path / "a.safetensors")


def test_folders_that_are_no_model_say_why(tiny_sd1: Any, tmp_path: Path) -> None:
    def refused(path: Path, why: str) -> None:
        with pytest.raises(CheckpointError, match=why):
            load(path)

    refused(tiny_sd1.folder / "unet", "one of its components: give")
    refused(tiny_sd1.file.parent, "a single file such as .*model.safetensors")
    model = tmp_path / "model"
    shutil.copytree(tiny_sd1.folder, model)
    index = json.loads((model / "model_index.json").read_text())
    for change, why in (
        ({"_class_name": "StableDiffusionXLPipeline"}, "SDXL is not supported yet"),
        ({"text_encoder_2": ["transformers", "CLIPTextModel"]}, "text_encoder_2: is a component"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "AutoencoderTiny"),
        ({"unet": [None, None]}, "unet: is missing"),
    ):
        (model / "model_index.json").write_text(json.dumps({**index, **change}))
        refused(model, why)
    extra = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "requires_safety_checker": True,
    }
    (model / "model_index.json").write_text(
        json.dumps({**index, **extra, "feature_extractor": ["transformers", "X"]})
    )
    assert load(model).family == "sd1"
    for missing in ("unet", "vae/config.json", f"vae/{UNET}", "tokenizer", "scheduler/scheduler_config.json"):
        shutil.rmtree(model)
        shutil.copytree(tiny_sd1.folder, model)
        target = model / missing
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        with pytest.raises(CheckpointError, match="is missing|cannot be read|holds no weights") as caught:
            load_components(model)
        assert str(target.parent) in caught.value.file
    shutil.rmtree(model)
    shutil.copytree(tiny_sd1.folder, model)
    (model / "unet" / UNET).rename(model / "unet" / "weights.ckpt")
    refused(model, "holds no weights, neither .safetensors nor .bin")


def test_a_single_file_has_clips_tokenizer(tiny: Any, tmp_path: Path) -> None:
    key = next(key for key in tiny.tensors if key.endswith("token_embedding.weight"))
    file = single(tiny, tmp_path / "a.safetensors", {key: torch.randn(49408, 32)})
    tokenizer = load_components(file).tokenizer
    padding = 49407 if tiny.family == "sd1" else 0
    assert tokenizer.encode("a cat").chunks == ((49406, 320, 2368, 49407, *[padding] * 73),)
    with safe_open(convert(convert(file, tmp_path / "b"), tmp_path / "b.safetensors"), "pt") as reader:
        assert "tokenizer" not in json.loads(reader.metadata()["fastldm"])


def test_tokenizers(tiny_sd1: Any, mini: Path) -> None:
    assert load(tiny_sd1.folder).tokenizer is WORDS
    found = load_components(mini / "foreign.safetensors", tokenizer=mini / "folder" / "tokenizer")
    assert found.tokenizer.encode("a red cat").chunks == ((1, 4, 5, 6, 2, 0, 0, 0),)
    with pytest.raises(CheckpointError, match="the tokenizer has 49408 tokens; tokenizer= can"):
        load_components(mini / "foreign.safetensors")
    with pytest.raises(CheckpointError):
        load_components(tiny_sd1.folder, tokenizer=mini / "none")
    with pytest.raises(CheckpointError, match="vocab_size: is 7, but the tokenizer has 8"):
        load_components(tiny_sd1.folder, tokenizer=Tokenizer.from_words(["a", "b", "c", "d"], 77))


def test_a_local_model_needs_no_hub(tiny_sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert load_components(str(tiny_sd1.folder)).family == "sd1"
    assert inspect(str(tiny_sd1.file)).family == "sd1"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_switching_models_leaves_nothing_open(mini: Path) -> None:
    descriptors = []
    for path in (mini / "folder", mini / "ours.safetensors") * 5:
        load_components(path)
        descriptors.append(len(os.listdir("/proc/self/fd")))
    gc.collect()
    assert len(set(descriptors)) == 1
    assert str(mini) not in Path("/proc/self/maps").read_text()


def test_an_unknown_tensor_in_the_unused_layer_is_named(tiny_sd2: Any, tmp_path: Path) -> None:
    stage = "cond_stage_model.model.transformer.resblocks."
    assert inspect(
        single(tiny_sd2, tmp_path / "a.safetensors", {f"{stage}2.ln_1.bias": torch.ones(32)}), "v"
    ).skipped
    for key in (f"{stage}2.ln_9.bias", f"{stage}x.ln_1.bias", f"{stage}2"):
        with pytest.raises(CheckpointError, match="is unexpected") as caught:
            inspect(single(tiny_sd2, tmp_path / "a.safetensors", {key: torch.ones(32)}), "v")
        assert caught.value.key == key
