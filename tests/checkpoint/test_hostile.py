"""Damaged and hostile models: every one is a CheckpointError that names the file, soon, and runs no code."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastldm.checkpoint import convert, inspect, load_components
from fastldm.errors import CheckpointError, FastLDMError
from fastldm.models.tokenizer import Tokenizer

SECONDS = 2.0  # of processor time, for one load
LEVEL = "model.diffusion_model.input_blocks.1."


def outcome(path: Path, tokenizer: Any = None) -> CheckpointError | None:
    """Load a model: None when that works, else the CheckpointError; anything else fails the test."""
    started = time.process_time()
    try:
        load_components(path, tokenizer=tokenizer)
        caught = None
    except CheckpointError as error:
        caught = error
        assert str(path) in error.file and error.why and "\n" not in str(error)
        assert len(str(error)) < 1500 or "/tokenizer/" in error.file
    assert time.process_time() - started < SECONDS
    return caught


@pytest.fixture(scope="module")
def words(mini: Path) -> Tokenizer:
    """The mini model's tokenizer."""
    return Tokenizer.from_folder(mini / "folder" / "tokenizer")


def mutated(content: bytes, chance: random.Random) -> bytes:
    """The file with a few bytes changed, inserted, removed or doubled, mostly in its header."""
    data = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        place = chance.randrange(min(header, len(data)) if chance.random() < 0.9 else len(data))
        kind = chance.randrange(7)
        if kind == 0:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[place] = chance.choice(b'0123456789{}[]",:- \\\x00\xff')
        elif kind == 2:
            del data[place + 1 : place + 1 + chance.choice((1, 2, 8, 100, 10_000))]
        elif kind == 3:
            data[place:place] = bytes(chance.randrange(256) for _ in range(chance.choice((1, 2, 8, 64))))
        elif kind == 4:
            piece = data[place : place + chance.choice((1, 7, 30, 200))]
            data[place:place] = piece
        elif kind == 5:
            data[:8] = chance.choice((0, 1, header, header - 9, 2**31, 2**63, len(data))).to_bytes(
                8, "little"
            )
        else:
            del data[max(place, 1) :]
    return bytes(data)


def resident() -> int:
    """Bytes of memory that this process takes; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


def check_mutations(mini: Path, tmp_path: Path, words: Tokenizer, count: int) -> None:
    """Load `count` damaged copies; most are refused, and memory comes back."""
    content = (mini / "foreign.safetensors").read_bytes()
    chance = random.Random(count)
    file = tmp_path / "mutated.safetensors"
    refused, before = 0, 0
    for i in range(count):
        file.write_bytes(mutated(content, chance))
        refused += outcome(file, words) is not None
        if i == count // 5:
            before = resident()
    assert refused > 0.9 * count
    assert resident() - before < 64 << 20


def test_500_mutated_files(mini: Path, tmp_path: Path, words: Tokenizer) -> None:
    check_mutations(mini, tmp_path, words, 500)


@pytest.mark.long
def test_5000_mutated_files(mini: Path, tmp_path: Path, words: Tokenizer) -> None:
    check_mutations(mini, tmp_path, words, 5000)


Tensors = dict[str, torch.Tensor]


def missing(tensors: Tensors, key: str, chance: random.Random) -> str:
    del tensors[key]
    return key


def renamed(tensors: Tensors, key: str, chance: random.Random) -> str:
    tensors[key + chance.choice(("_", ".x", "0"))] = tensors.pop(key)
    return key


def extra(tensors: Tensors, key: str, chance: random.Random) -> str:
    name = chance.choice(
        (key + ".lora_up", key[: len(key) // 2], LEVEL + "7.weight", "", "first_stage_model.x")
    )
    tensors[name] = torch.ones(2)
    return name


def longer(tensors: Tensors, key: str, chance: random.Random) -> str:
    while ".embeddings." in key:  # more tokens or positions make another model, but a model
        key = chance.choice(sorted(tensors))
    tensors[key] = torch.cat([tensors[key], tensors[key][:1]])
    return key


def reshaped(tensors: Tensors, key: str, chance: random.Random) -> str:
    tensors[key] = tensors[key][None] if chance.random() < 0.5 else tensors[key].flatten()[None, :, None]
    return key


def integers(tensors: Tensors, key: str, chance: random.Random) -> str:
    kinds = (torch.int32, torch.int8, torch.uint8, torch.bool, torch.int64)
    tensors[key] = tensors[key].to(chance.choice(kinds))
    return key


def not_finite(tensors: Tensors, key: str, chance: random.Random) -> str:
    tensor = tensors[key].clone()
    tensor.view(-1)[chance.randrange(tensor.numel())] = chance.choice((float("nan"), float("inf")))
    tensors[key] = tensor
    return key


def empty(tensors: Tensors, key: str, chance: random.Random) -> str:
    tensors[key] = tensors[key][:0]
    return key


CHANGES = (missing, renamed, extra, longer, reshaped, integers, not_finite, empty)


Change = Callable[[Tensors, str, random.Random], str]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_models_with_one_wrong_tensor(mini: Path, tmp_path: Path, words: Tokenizer, change: Change) -> None:
    check_wrong_tensors(mini, tmp_path, words, change, 8)


@pytest.mark.long
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_800_models_with_one_wrong_tensor(
    mini: Path, tmp_path: Path, words: Tokenizer, change: Change
) -> None:
    check_wrong_tensors(mini, tmp_path, words, change, 100)


def check_wrong_tensors(mini: Path, tmp_path: Path, words: Tokenizer, change: Change, count: int) -> None:
    """Load `count` copies with one change each; every one is refused, naming a tensor."""
    whole = load_file(mini / "foreign.safetensors")
    chance = random.Random(change.__name__)
    file = tmp_path / "wrong.safetensors"
    for _ in range(count):
        tensors = dict(whole)
        named = change(tensors, chance.choice(sorted(tensors)), chance)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
        error = outcome(file, words)
        assert error is not None, f"{change.__name__} {named} was accepted"
        # A tensor that decides the architecture makes others look wrong; the error then names one of those.
        assert error.key is not None or "no model" in error.why or "alone" in error.why, error
        if change in (not_finite, integers):
            assert error.key == named


FOLDERS = ("unet", "vae", "text_encoder", "scheduler", "tokenizer", ".")


@pytest.mark.parametrize("folder", FOLDERS)
def test_configurations_with_one_wrong_field(mini: Path, tmp_path: Path, folder: str) -> None:
    check_wrong_fields(mini, tmp_path, folder, 1)


@pytest.mark.long
@pytest.mark.parametrize("folder", FOLDERS)
def test_configurations_with_every_wrong_field(mini: Path, tmp_path: Path, folder: str) -> None:
    check_wrong_fields(mini, tmp_path, folder, len(ODD))


ODD = (
    None,
    True,
    0,
    -1,
    2,
    7,
    10**9,
    10**17,
    1e300,
    -0.5,
    "",
    "x" * 5000,
    "gelu",
    [],
    [0],
    [32] * 40,
    {},
    {"a": []},
)


def check_wrong_fields(mini: Path, tmp_path: Path, folder: str, count: int) -> None:
    """Give each field of each JSON file of a folder `count` odd values: refused or loaded, never a crash."""
    model = tmp_path / "model"
    shutil.copytree(mini / "folder", model)
    chance = random.Random(folder)
    for file in sorted((model / folder).glob("*.json")):
        content = json.loads(file.read_text())
        for field in [*sorted(content), "brand_new", "num_class_embeds"]:
            for value in chance.sample(ODD, count):
                file.write_text(json.dumps({**content, field: value}))
                outcome(model)
        for field in chance.sample(sorted(content), min(count, len(content))):
            file.write_text(json.dumps({key: value for key, value in content.items() if key != field}))
            outcome(model)
        for text in (
            "",
            "[]",
            "null",
            "{",
            '{"a": 1, "a": 2}',
            "[" * 10_000,
            '{"a": ' + "9" * 9000 + "}",
            "\0",
        ):
            file.write_text(text)
            assert outcome(model) is not None
        file.unlink()
        outcome(model)
        file.write_text(json.dumps(content))
    assert outcome(model) is None


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("unet/config.json", "layers_per_block", 10**6),
        ("unet/config.json", "transformer_layers_per_block", 10**6),
        ("unet/config.json", "block_out_channels", [2**40]),
        ("unet/config.json", "block_out_channels", [32] * 1000),
        ("unet/config.json", "cross_attention_dim", 2**50),
        ("unet/config.json", "attention_head_dim", 7),
        ("unet/config.json", "norm_num_groups", 5),
        ("unet/config.json", "cross_attention_dim", 64),
        ("vae/config.json", "layers_per_block", 10**6),
        ("vae/config.json", "latent_channels", 8),
        ("vae/config.json", "norm_num_groups", 7),
        ("text_encoder/config.json", "num_hidden_layers", 10**6),
        ("text_encoder/config.json", "vocab_size", 2**40),
        ("text_encoder/config.json", "num_attention_heads", 3),
        ("text_encoder/config.json", "max_position_embeddings", 2),
    ],
)
def test_absurd_architectures_are_refused_before_they_are_built(
    mini: Path, tmp_path: Path, file: str, field: str, value: Any
) -> None:
    model = tmp_path / "model"
    shutil.copytree(mini / "folder", model)
    content = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps({**content, field: value}))
    error = outcome(model)
    assert error is not None and str(model) in error.file


def test_a_network_is_not_built_far_beyond_its_tensors(mini: Path, tmp_path: Path) -> None:
    """33 856 transformers, of which each field alone is within its limit."""
    model = tmp_path / "model"
    shutil.copytree(mini / "folder", model)
    file = model / "unet" / "config.json"
    many = {
        "block_out_channels": [32] * 16,
        "layers_per_block": 16,
        "transformer_layers_per_block": 64,
        "attention_head_dim": 8,
        "down_block_types": ["CrossAttnDownBlock2D"] * 16,
        "up_block_types": ["CrossAttnUpBlock2D"] * 16,
    }
    file.write_text(json.dumps({**json.loads(file.read_text()), **many}))
    error = outcome(model)
    assert error is not None and error.file == str(file) and "far more tensors" in error.why


def test_a_joined_tensor_without_numbers(tiny_sd2: Any, tmp_path: Path) -> None:
    key = next(key for key in tiny_sd2.tensors if key.endswith("in_proj_weight"))
    tensors = {name: tensor.contiguous() for name, tensor in tiny_sd2.tensors.items()}
    save_file({**tensors, key: torch.zeros(96, 0)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"has shape \[32, 0\]; expected \[32, 32\]") as caught:
        inspect(tmp_path / "a.safetensors", "v")
    assert caught.value.key == key


class Evil:
    """Pickles as a call that makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.canary),)


def test_30_pickles_run_no_code(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payloads = []
    for protocol in range(6):
        for content in (Evil(canary), {"state_dict": Evil(canary)}, [Evil(canary)] * 3):
            payloads.append(pickle.dumps(content, protocol))
    archives = []
    for content in payloads[-12:]:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("archive/data.pkl", content)
            file.writestr("archive/version", "3")
        archives.append(archive.getvalue())
    endings = (".ckpt", ".pt", ".safetensors", ".bin", "")
    for i, content in enumerate(payloads + archives):
        file = tmp_path / f"evil{i}{endings[i % len(endings)]}"
        file.write_bytes(content)
        for use in (load_components, inspect, lambda path: convert(path, tmp_path / "converted")):
            with pytest.raises(CheckpointError):
                use(file)
    assert len(payloads + archives) == 30
    assert not canary.exists() and not (tmp_path / "converted").exists()


def test_a_shard_index_cannot_lead_out_of_its_folder(mini: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(mini / "folder", model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    with safe_open(weights, "pt") as reader:
        keys = list(reader.keys())
    outside = tmp_path / "outside.safetensors"
    weights.rename(outside)
    index = model / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    names = (
        "../../outside.safetensors",
        str(outside),
        "..",
        ".",
        "",
        "a\0b.safetensors",
        "x/../y.safetensors",
        "none",
    )
    for name in names:
        index.write_text(json.dumps({"weight_map": dict.fromkeys(keys, name)}))
        with pytest.raises(CheckpointError, match="a plain name"):
            load_components(model)
    for content in ({}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": ["b"]}}):
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="weight_map"):
            load_components(model)


def test_errors_are_ours_for_odd_paths(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    odd: list[Any] = [
        None,
        5,
        b"x",
        "",
        "a\0b",
        "x" * 5000,
        "~nobody-here/x",
        "../none",
        "https://huggingface.co/a/b",
    ]
    odd += [tmp_path / name for name in ("empty", "fifo", "loop", "none", "none.safetensors", "é\ud800")]
    odd += ["/dev/null", "/dev/zero", "/proc/self/mem", "/"]
    for path in odd:
        for use in (load_components, inspect):
            with pytest.raises(FastLDMError) as caught:
                use(path)
            assert "\n" not in str(caught.value)
