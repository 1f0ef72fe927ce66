"""From a path to ready networks: find, check against the architecture, map, assign."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from fastldm.abilities import Abilities
from fastldm.checkpoint.folder import open_folder
from fastldm.checkpoint.hub import resolve
from fastldm.checkpoint.limits import check_structure
from fastldm.checkpoint.networks import build
from fastldm.checkpoint.overrides import read_overrides
from fastldm.checkpoint.single import open_single
from fastldm.checkpoint.source import PARTS, Part, Source
from fastldm.checkpoint.tensors import read_tensor
from fastldm.diffusion import SchedulerConfig
from fastldm.errors import CheckpointError
from fastldm.models.clip import CLIPTextModel
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.unet import UNet
from fastldm.models.vae import AutoencoderKL
from fastldm.models.vq import VQModel

PAD_ID = {"sd1": 49407, "sd2": 0}

Config = str | os.PathLike[str] | Mapping[str, Any] | None


@dataclass(frozen=True)
class Components:
    """A loaded model: networks in evaluation mode and without gradients, and what was guessed or mapped."""

    family: str
    unet: UNet
    vae: AutoencoderKL | VQModel
    text_encoder: CLIPTextModel
    tokenizer: Tokenizer
    scheduler: SchedulerConfig
    warnings: tuple[str, ...]
    path: Path
    abilities: Abilities = Abilities()


def open_source(path: str | os.PathLike[str], config: Config = None, allow_pickle: bool = False) -> Source:
    """The headers and configurations of a model, folder or single file, by what is there."""
    overrides = read_overrides(config)
    place = resolve(path)
    try:
        opened = open_folder if place.is_dir() else open_single
        return opened(place, overrides, allow_pickle)
    except OSError as error:
        raise CheckpointError(place, None, f"cannot be read: {error.strerror or error}") from error


def load_components(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    config: Config = None,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    allow_pickle: bool = False,
) -> Components:
    """Load a diffusers folder, a single file, "default" (the shipped model) or a Hub id.

    `dtype` None is float32, whatever the file holds. `config` overrides what the files say (see
    `read_overrides`), `tokenizer` is one, or a folder with one, in place of the model's. `allow_pickle`
    reads the tensors of .ckpt, .pt and .bin files too (see `pickles`). CheckpointError names the file and the
    key at fault.
    """
    source = open_source(path, config, allow_pickle)
    networks = build(source)
    scheduler = read_scheduler(source)
    words = read_tokenizer(source, networks.text_encoder.config.vocab_size, tokenizer)
    for name, network in zip(PARTS, networks, strict=True):
        _fill(network, source.parts[name], dtype or torch.float32, device)
    return Components(
        source.family,
        *networks,
        tokenizer=words,
        scheduler=scheduler,
        warnings=(*source.warnings, *scheduler.warnings),
        path=source.path,
        abilities=source.abilities,
    )


def _fill(network: nn.Module, part: Part, dtype: torch.dtype, device: str | torch.device) -> None:
    """Put a part's tensors into its network, which was built on the meta device."""
    state = {key: read_tensor(entry, dtype, device) for key, entry in part.tensors.items()}
    network.load_state_dict(state, assign=True)
    network.eval().requires_grad_(False)


def read_scheduler(source: Source) -> SchedulerConfig:
    """The scheduler of a model."""
    check_structure(source.scheduler, source.scheduler_file)
    return SchedulerConfig.from_dict(source.scheduler, file=str(source.scheduler_file))


def pad_id(family: str) -> int:
    """The token that fills up prompts of a family."""
    return PAD_ID[family.removesuffix("-inpaint")]


def read_tokenizer(
    source: Source, vocab_size: int, given: Tokenizer | str | os.PathLike[str] | None = None
) -> Tokenizer:
    """The tokenizer given, or read from the folder given, else the model's own, else CLIP's.

    CheckpointError when the text encoder, which knows `vocab_size` tokens, does not know them all.
    """
    tokenizer = _own_tokenizer(source) if given is None else given
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = _tokenizer_in(Path(tokenizer))
    if tokenizer.vocab_size > vocab_size:
        why = f"is {vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens; tokenizer= can give one"
        raise CheckpointError(source.parts["text_encoder"].config_file, "vocab_size", why)
    return tokenizer


def _own_tokenizer(source: Source) -> Tokenizer:
    if source.tokenizer is None:
        return Tokenizer.clip(pad_id(source.family))
    if isinstance(source.tokenizer, Path):
        if not source.tokenizer.is_dir():
            raise CheckpointError(source.tokenizer, None, "is missing; tokenizer= can give one")
        return _tokenizer_in(source.tokenizer)
    with TemporaryDirectory() as folder:
        for name, text in source.tokenizer.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        try:
            return _tokenizer_in(Path(folder))
        except CheckpointError as error:
            raise CheckpointError(source.path, f"embedded {Path(error.file).name}", error.why) from None


def _tokenizer_in(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_folder(folder)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(folder, None, f"holds no usable tokenizer: {error!r:.200}") from error
