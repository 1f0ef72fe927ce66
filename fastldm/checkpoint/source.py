"""A model on disk, the same for both layouts: configurations, and where each tensor's bytes are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastldm.abilities import Abilities
from fastldm.checkpoint.container import Entry, WeightFile
from fastldm.checkpoint.rename import harmless

PARTS = ("unet", "vae", "text_encoder")  # of Stable Diffusion
CONDITIONERS = ("text_encoder", "class_embedder", "rescaler")  # of which other models have one, or none
ABILITIES = "_fastldm"
"""Where a folder's model_index.json, and the metadata of a single file, say what a model can be asked for."""


@dataclass(frozen=True)
class Part:
    """One network: its config.json, and its tensors by the names that they have in a diffusers folder."""

    config: dict[str, Any]
    config_file: Path  # blamed for a wrong field
    weight_file: Path  # blamed for a missing tensor
    tensors: dict[str, Entry]
    name_in_file: Callable[[str], str]  # what the weight file calls one of these names


@dataclass(frozen=True)
class Source:
    """A model on disk, checked as far as headers allow."""

    path: Path
    family: str
    parts: dict[str, Part]
    abilities: Abilities
    scheduler: dict[str, Any]
    scheduler_file: Path
    tokenizer: Path | dict[str, str] | None  # a folder; or files embedded in a single file; None: CLIP's
    files: tuple[WeightFile, ...]
    skipped: dict[str, int]
    warnings: tuple[str, ...]


class Skipped(dict[str, int]):
    """Keys that no network needs, counted by kind."""

    def take(self, key: str) -> bool:
        """Whether the key is a harmless one; if so it is counted."""
        kind = harmless(key)
        if kind is not None:
            self.count(kind)
        return kind is not None

    def count(self, kind: str) -> None:
        """One more of this kind."""
        self[kind] = self.get(kind, 0) + 1


def as_matrix(entry: Entry) -> Entry:
    """The weight [out, in, 1, 1] or [out, in, 1] of a convolution with a kernel of one as the matrix [out,
    in]; any other tensor unchanged.
    """
    if entry.shape[2:] in ((1, 1), (1,)):
        return Entry(entry.name, entry.dtype, entry.shape[:2], entry.spans)
    return entry


def as_convolution(entry: Entry, dims: int) -> Entry:
    """A matrix [out, in] as the weight [out, in, 1, …] of a convolution in so many dimensions; a vector
    unchanged.
    """
    ones = (1,) * dims if len(entry.shape) == 2 else ()
    return Entry(entry.name, entry.dtype, entry.shape + ones, entry.spans)
