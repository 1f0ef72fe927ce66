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
from fastldm.checkpoint.files import open_single
from fastldm.checkpoint.folder import open_folder
from fastldm.checkpoint.hub import resolve
from fastldm.checkpoint.limits import check_structure
from fastldm.checkpoint.networks import build, read_network_config
from fastldm.checkpoint.overrides import read_overrides
from fastldm.checkpoint.source import CONDITIONERS, Part, Source
from fastldm.checkpoint.tensors import read_tensor
from fastldm.diffusion import SchedulerConfig
from fastldm.errors import CheckpointError, InvalidArgument
from fastldm.models.bert import BERTModel
from fastldm.models.clip import CLIPTextModel
from fastldm.models.conditioners import ClassEmbedder, SpatialRescaler
from fastldm.models.pixels import Autoencoder
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.unet import UNet

PAD_ID = {"sd1": 49407, "sd2": 0}

Config = str | os.PathLike[str] | Mapping[str, Any] | None


@dataclass(frozen=True)
class Components:
    """A loaded model: networks in evaluation mode and without gradients, and what was guessed or mapped."""

    family: str
    unet: UNet
    vae: Autoencoder
    text_encoder: CLIPTextModel | BERTModel | None
    tokenizer: Tokenizer | None  # None beside a text encoder: it reads layouts
    scheduler: SchedulerConfig
    warnings: tuple[str, ...]
    path: Path
    abilities: Abilities = Abilities()
    class_embedder: ClassEmbedder | None = None
    rescaler: SpatialRescaler | None = None
    files: tuple[Path, ...] = ()  # of the weights

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Those that the model has, by name."""
        named = {name: getattr(self, name) for name in ("unet", "vae", *CONDITIONERS)}
        return {name: network for name, network in named.items() if network is not None}

    @property
    def text(self) -> tuple[Tokenizer, CLIPTextModel | BERTModel]:
        """Tokenizer and text encoder; CheckpointError for a model that reads no text."""
        if self.tokenizer is None or self.text_encoder is None:
            raise CheckpointError(self.path, "text_encoder", "is missing: the model reads no text")
        return self.tokenizer, self.text_encoder

    @property
    def context_length(self) -> int:
        """Tokens of what cross-attention reads of one chunk of a prompt, a class or a layout."""
        if self.text_encoder is None:
            return 0 if self.class_embedder is None else 1
        read = self.text_encoder.config.max_position_embeddings
        return read if self.tokenizer is None else min(read, self.tokenizer.max_length)


def open_source(path: str | os.PathLike[str], config: Config = None, allow_pickle: bool = False) -> Source:
    """The headers and configurations of a model, folder or single file, by what is there."""
    overrides = read_overrides(config)
    place = resolve(path, allow_pickle)
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
    words = read_tokenizer(source, tokenizer)
    for name, part in source.parts.items():
        _fill(getattr(networks, name), part, dtype or torch.float32, device)
    return Components(
        family=source.family,
        tokenizer=words,
        scheduler=scheduler,
        warnings=(*source.warnings, *scheduler.warnings),
        path=source.path,
        abilities=source.abilities,
        files=tuple(file.path for file in source.files),
        **networks._asdict(),
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
    source: Source, given: Tokenizer | str | os.PathLike[str] | None = None
) -> Tokenizer | None:
    """The tokenizer given, or read from the folder given, else the model's own, else CLIP's for Stable
    Diffusion; None for a model that reads no text.

    CheckpointError when the text encoder does not know all its tokens, or the model's words are not known.
    """
    if not source.abilities.prompt:
        if given is not None:
            raise InvalidArgument("tokenizer", given, "None: this model reads no text")
        return None
    tokenizer = _own_tokenizer(source) if given is None else given
    if not isinstance(tokenizer, Tokenizer):
        if not isinstance(tokenizer, str | os.PathLike):
            raise InvalidArgument("tokenizer", tokenizer, "a Tokenizer, or a folder with one")
        tokenizer = _tokenizer_in(Path(tokenizer))
    part = source.parts["text_encoder"]
    known = read_network_config("text_encoder", part.config, part.config_file).vocab_size
    if tokenizer.vocab_size > known:
        why = f"is {known}, but the tokenizer has {tokenizer.vocab_size} tokens; tokenizer= can give one"
        raise CheckpointError(part.config_file, "vocab_size", why)
    return tokenizer


def _own_tokenizer(source: Source) -> Tokenizer:
    if source.tokenizer is None:
        if source.family.startswith("ldm"):
            why = "is not in the file: tokenizer= takes a folder with that of bert-base-uncased"
            raise CheckpointError(source.path, "tokenizer", why)
        return Tokenizer.clip(pad_id(source.family))
    if isinstance(source.tokenizer, Path):
        if not source.tokenizer.is_dir():
            raise CheckpointError(source.tokenizer, None, "is missing; tokenizer= can give one")
        return _tokenizer_in(source.tokenizer)
    with TemporaryDirectory() as folder:
        for name, text in source.tokenizer.items():
            # Half a surrogate pair is an error of the file, as it is read again.
            (Path(folder) / name).write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            return _tokenizer_in(Path(folder))
        except CheckpointError as error:
            raise CheckpointError(source.path, f"embedded {Path(error.file).name}", error.why) from None


def _tokenizer_in(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_folder(folder)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(folder, None, f"holds no usable tokenizer: {error!r:.200}") from error
