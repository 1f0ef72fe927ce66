"""Names of models: local first, then the Hub's cache, with nothing downloaded that is not read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from fastldm.checkpoint.hub import DEFAULT, resolve
from fastldm.errors import CheckpointError, InvalidArgument

PLAIN = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
OTHER = [
    ".gitattributes",
    "README.md",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "vae/diffusion_pytorch_model.bf16.safetensors",
    "v1-5-pruned.ckpt",
    "v1-5-pruned-emaonly.safetensors",
]
PAIR = ("config.json", "model.safetensors")
HALF = [
    name.replace(".safetensors", ".fp16.safetensors") for name in PLAIN if name.endswith("el.safetensors")
]


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A Hub that has these files: returns what each call of snapshot_download would fetch."""
    calls: list[set[str]] = []
    repository: list[str] = []

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert name == "owner/name"
        wanted = filter_repo_objects(
            repository, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        calls.append(set(wanted))
        for file in calls[-1]:
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls, repository


def test_only_what_is_read_is_downloaded(downloads: Any, tmp_path: Path) -> None:
    calls, repository = downloads
    repository += PLAIN + OTHER + HALF
    assert resolve("owner/name") == tmp_path
    assert calls == [set(PLAIN)]


def test_fp16_is_taken_where_there_is_nothing_else(downloads: Any, tmp_path: Path) -> None:
    calls, repository = downloads
    repository += [name for name in PLAIN if not name.endswith(".safetensors")] + OTHER + HALF
    resolve("owner/name")
    assert len(calls) == 2 and set(HALF) <= calls[1] and not calls[1] & set(OTHER)


def test_pickles_are_taken_where_they_are_allowed_and_all_there_is(downloads: Any) -> None:
    calls, repository = downloads
    repository += [name.replace(".safetensors", ".bin") for name in PLAIN] + OTHER
    resolve("owner/name")
    assert not any(name.endswith(".bin") for call in calls for name in call)
    resolve("owner/name", allow_pickle=True)
    assert {name for name in PLAIN if name.endswith(".txt")} < calls[-1]
    pickles = {name for name in repository if name.endswith(".bin")}
    assert {name for name in calls[-1] if name.endswith(".bin")} == pickles


def test_models_of_the_paper_have_other_networks(downloads: Any) -> None:
    calls, repository = downloads
    repository += ["model_index.json", "README.md", "unet/config.json", "vae/config.json"]
    repository += [f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")]
    repository += [f"{part}/{name}" for part in ("class_embedder", "rescaler") for name in PAIR]
    resolve("owner/name")
    assert calls == [set(repository) - {"README.md"}]


def test_errors_of_the_hub_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no such model\nsee https://...")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="no such file or folder, nor .* Hub: no such model$"):
        resolve("owner/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        resolve("owner/name")


@pytest.mark.parametrize(
    "name", ["none", "./none/x", "a/b/c", "none/model.safetensors", "x.ckpt", "../none", "a b/c", "-a/b"]
)
def test_names_that_are_no_hub_id_never_reach_the_hub(downloads: Any, name: str) -> None:
    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        resolve(name)
    assert downloads[0] == []


def test_a_folder_of_the_owners_name_means_a_local_path(
    downloads: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        resolve("owner/name")
    (tmp_path / "owner" / "name").mkdir()
    assert resolve("owner/name") == Path("owner/name") and downloads[0] == []


@pytest.mark.parametrize("path", [None, 5, b"model", "", "a\0b", True, ["x"]])
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(InvalidArgument, match="path"):
        resolve(path)


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("default") == DEFAULT
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model") == tmp_path / "model" == resolve(tmp_path / "model")


def test_the_cache_serves_offline(mini: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(mini / "folder", repository / "snapshots" / ("0" * 40))
    code = (
        "from fastldm.checkpoint import inspect\n"
        "from fastldm.errors import CheckpointError\n"
        "print(inspect('owner/name').family)\n"
        "try: inspect('owner/other')\n"
        "except CheckpointError as error: print(error)\n"
    )
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
    }
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    family, error = run.stdout.splitlines()
    assert family == "sd1" and error.startswith("owner/other: there is no such file or folder, nor")
