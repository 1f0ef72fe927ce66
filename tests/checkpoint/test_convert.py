"""Between the layouts: every byte survives, diffusers reads the result, a failure leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastldm.checkpoint import convert, inspect, load_components, save_folder
from fastldm.errors import CheckpointError, InvalidArgument

PARTS = ("unet", "vae", "text_encoder")


def folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a diffusers folder, `part/key`."""
    found = {}
    for part in PARTS:
        for file in (folder / part).glob("*.safetensors"):
            found |= {f"{part}/{key.removeprefix('text_model.')}": t for key, t in load_file(file).items()}
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal names, dtypes, shapes and bits."""
    return one.keys() == other.keys() and all(
        (one[key].dtype, one[key].shape) == (other[key].dtype, other[key].shape)
        and torch.equal(bits(one[key]), bits(other[key]))
        for key in one
    )


def test_folder_to_file_and_back(tiny: Any, tmp_path: Path) -> None:
    file = convert(tiny.folder, tmp_path / "one.safetensors")
    assert same(load_file(file), tiny.tensors)
    with safe_open(file, "pt") as reader:
        prediction = "epsilon" if tiny.family == "sd1" else "v_prediction"
        assert reader.metadata()["prediction_type"] == prediction
    back = convert(file, tmp_path / "back")
    assert same(folder_tensors(back), folder_tensors(tiny.folder))
    assert convert(back, tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    facts = [inspect(path) for path in (tiny.folder, file, back)]
    assert not any("guessed" in warning for fact in facts for warning in fact.warnings)
    for field in ("family", "parameters", "dtype", "scheduler", "prediction", "warnings"):
        assert len({str(getattr(fact, field)) for fact in facts}) == 1
    loaded = [load_components(path) for path in (tiny.folder, file, back)]
    assert loaded[0].unet.config == loaded[1].unet.config == loaded[2].unet.config
    assert loaded[0].scheduler == loaded[1].scheduler == loaded[2].scheduler
    assert len({x.tokenizer.encode("a (red:1.2) cat") for x in loaded}) == 1


def test_file_to_folder_and_back(tiny: Any, tmp_path: Path) -> None:
    folder = convert(tiny.file, tmp_path / "folder", config="v", tokenizer=tiny.folder / "tokenizer")
    assert same(folder_tensors(folder), folder_tensors(tiny.folder))
    assert same(load_file(convert(folder, tmp_path / "one.safetensors")), tiny.tensors)
    assert inspect(folder).prediction == inspect(tmp_path / "one.safetensors").prediction == "v_prediction"
    assert inspect(folder).skipped == {}


def test_diffusers_draws_the_same_with_a_converted_folder(tiny: Any, tmp_path: Path) -> None:
    config = {"prediction_type": inspect(tiny.folder).prediction}
    folder = convert(tiny.file, tmp_path / "folder", config=config, tokenizer=tiny.folder / "tokenizer")
    images = []
    for path in (tiny.folder, folder):
        pipeline = StableDiffusionPipeline.from_pretrained(path)
        pipeline.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(3)
        arguments = {
            "num_inference_steps": 2,
            "generator": noise,
            "output_type": "np",
            "height": 16,
            "width": 16,
        }
        images.append(torch.from_numpy(pipeline("a red cat", **arguments).images))
    assert torch.equal(images[0], images[1]) and images[0].std() > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_every_bit_of_every_dtype_survives(mini: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(9)
    tensors = {
        key: torch.randint(256, (tensor.numel() * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        .view(dtype)
        .view(tensor.shape)
        for key, tensor in load_file(mini / "foreign.safetensors").items()
    }  # NaN among them: converting looks at no number
    with safe_open(mini / "ours.safetensors", "pt") as reader:
        save_file(tensors, tmp_path / "one.safetensors", reader.metadata())
    folder = convert(tmp_path / "one.safetensors", tmp_path / "folder")
    again = convert(folder, tmp_path / "again.safetensors")
    assert same(load_file(again), tensors)


def test_a_word_tokenizer_travels_in_the_metadata(mini: Path, tmp_path: Path) -> None:
    expected = load_components(mini / "folder")
    folder = convert(mini / "ours.safetensors", tmp_path / "folder")
    for path in (mini / "ours.safetensors", folder):
        loaded = load_components(path)
        assert loaded.tokenizer.encode("a red cat") == expected.tokenizer.encode("a red cat")
        assert loaded.text_encoder.config == expected.text_encoder.config
        assert loaded.scheduler == expected.scheduler and loaded.warnings == expected.warnings


def test_metadata_is_read_with_care(mini: Path, tmp_path: Path) -> None:
    with safe_open(mini / "ours.safetensors", "pt") as reader:
        given = json.loads(reader.metadata()["fastldm"])
    tensors = load_file(mini / "ours.safetensors")
    file = tmp_path / "a.safetensors"
    for content, why in (
        ("{", "is not JSON"),
        ("[]", "must map names to objects"),
        ('{"unet": 5}', "must map names to objects"),
        ('{"network": {}}', "unknown names: network"),
        (json.dumps({**given, "tokenizer": {"../../evil": "x"}}), "unknown tokenizer file"),
        (json.dumps({**given, "tokenizer": {"tokenizer.json": 5}}), "unknown tokenizer file"),
        (json.dumps({**given, "tokenizer": {"tokenizer.json": "{}"}}), "tokenizer"),
        (json.dumps({**given, "tokenizer": {"tokenizer.json": "\ud800"}}), "embedded tokenizer.json"),
        (json.dumps({**given, "unet": {**given["unet"], "layers_per_block": 10**6}}), "layers_per_block"),
        (json.dumps({**given, "vae": {**given["vae"], "latent_channels": 3}}), "has shape"),
        ("[" * 100_000, "nested"),
    ):
        save_file(tensors, file, {"fastldm": content})
        with pytest.raises(CheckpointError, match=why) as caught:
            load_components(file)
        assert str(file) in caught.value.file or why == "tokenizer"


def test_a_class_that_no_config_names_is_that_of_the_index(mini: Path, tmp_path: Path) -> None:
    shutil.copytree(mini / "folder", tmp_path / "model")
    for part in ("unet", "vae"):
        file = tmp_path / "model" / part / "config.json"
        fields = json.loads(file.read_text())
        file.write_text(json.dumps({key: value for key, value in fields.items() if key != "_class_name"}))
    single = convert(tmp_path / "model", tmp_path / "one.safetensors")
    assert single.read_bytes() == (mini / "ours.safetensors").read_bytes()

    with safe_open(single, "pt") as reader:
        metadata = reader.metadata()
    embedded = json.loads(metadata["fastldm"])
    for part in ("unet", "vae"):
        del embedded[part]["_class_name"]
    save_file(load_file(single), tmp_path / "two.safetensors", {**metadata, "fastldm": json.dumps(embedded)})
    folder = convert(tmp_path / "two.safetensors", tmp_path / "folder")
    index = (folder / "model_index.json", mini / "folder" / "model_index.json")
    assert index[0].read_bytes() == index[1].read_bytes()


def test_save_folder_is_what_load_reads(mini: Path, tmp_path: Path) -> None:
    whole = load_components(mini / "folder")
    parts = {name: getattr(whole, name) for name in (*PARTS, "tokenizer", "scheduler")}
    target = tmp_path / "deep" / "er"
    save_folder(target, **parts, dtype=torch.bfloat16)
    (target / "README.md").write_text("a model card")
    assert inspect(target).dtype == "bfloat16"
    half = load_components(target)
    for name in PARTS:
        state = getattr(half, name).state_dict()
        for key, tensor in getattr(whole, name).state_dict().items():
            assert torch.equal(state[key], tensor.to(torch.bfloat16).float())
    assert half.scheduler == whole.scheduler and half.unet.config == whole.unet.config
    save_folder(target, **parts)  # replaces the model, keeps the rest
    assert inspect(target).hash == inspect(mini / "folder").hash
    assert (target / "README.md").read_text() == "a model card"
    assert sorted(path.name for path in target.parent.iterdir()) == ["er"]


def test_inpainting_folders_name_their_pipeline(mini: Path, tmp_path: Path) -> None:
    tensors = load_file(mini / "foreign.safetensors")
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.randn(32, 9, 3, 3)
    save_file(tensors, tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match="tokenizer="):
        load_components(tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match="tokenizer="):
        convert(tmp_path / "one.safetensors", tmp_path / "folder")
    words = mini / "folder" / "tokenizer"
    folder = convert(tmp_path / "one.safetensors", tmp_path / "folder", tokenizer=words)
    assert (
        json.loads((folder / "model_index.json").read_text())["_class_name"]
        == "StableDiffusionInpaintPipeline"
    )
    assert inspect(folder).family == "sd1-inpaint"


def test_destinations_are_checked(mini: Path, tmp_path: Path) -> None:
    folder, file = mini / "folder", mini / "ours.safetensors"
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "x").write_text("x")
    old = tmp_path / "old.safetensors"
    old.write_text("old")
    for source, destination in (
        (folder, tmp_path / "model"),
        (folder, tmp_path / "model.ckpt"),
        (file, tmp_path / "model.safetensors"),
        (file, taken),
        (folder, old),
        (file, file),
        (folder, folder),
        (file, old / "x"),
        (folder, ""),
    ):
        expected = CheckpointError if destination == old / "x" else InvalidArgument
        with pytest.raises(expected) as caught:
            convert(source, destination)
        assert "\n" not in str(caught.value)
    assert old.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["old.safetensors", "taken"]
    convert(folder, old, overwrite=True)
    assert old.read_bytes() == file.read_bytes()
    convert(file, taken, overwrite=True)
    assert inspect(taken).hash == inspect(folder).hash and (taken / "x").read_text() == "x"
    (tmp_path / "free").mkdir()
    assert convert(file, tmp_path / "free") == tmp_path / "free"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc, where nobody can make files")
def test_unwritable_destinations_are_clear_errors(mini: Path) -> None:
    for source, destination in (
        (mini / "folder", "/proc/model.safetensors"),
        (mini / "ours.safetensors", "/proc/model"),
        (mini / "folder", "/proc/none/model.safetensors"),
    ):
        with pytest.raises(CheckpointError, match="cannot be written") as caught:
            convert(source, destination)
        assert caught.value.file == destination


def test_a_full_disk_leaves_the_old_model(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(mini / "folder", tmp_path / "folder")
    shutil.copy(mini / "ours.safetensors", tmp_path / "one.safetensors")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    calls = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) % 3 in (0, 1):  # a folder's last weight file, and a single file
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    calls.append(0)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        convert(mini / "ours.safetensors", tmp_path / "folder", overwrite=True)
    calls[:] = []
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        convert(mini / "folder", tmp_path / "one.safetensors", overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_parts_of_mixed_dtypes_are_not_joined(tiny_sd2: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd2.folder, tmp_path / "model")
    file = tmp_path / "model" / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("0.self_attn.k_proj.weight"))
    tensors[key] = tensors[key].half()
    save_file(tensors, file)
    assert load_components(tmp_path / "model").family == "sd2"
    with pytest.raises(CheckpointError, match="cannot be joined"):
        convert(tmp_path / "model", tmp_path / "one.safetensors")
    assert not (tmp_path / "one.safetensors").exists()
