"""What a model on disk is, without loading it."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fastldm.checkpoint.load import Config, open_source, read_scheduler
from fastldm.checkpoint.networks import build
from fastldm.checkpoint.tensors import DTYPES
from fastldm.errors import CheckpointError


@dataclass(frozen=True)
class ModelInfo:
    """A model's facts: the tasks it does; parameters by network and in all; what was skipped, by kind.

    `hash` is the sha256 of a single file, of a folder that of its weight files' lines "sha256  name", sorted
    by name.
    """

    path: str
    layout: str
    family: str
    tasks: tuple[str, ...]
    parameters: dict[str, int]
    dtype: str
    scheduler: str
    sampler: str
    prediction: str
    hash: str
    files: tuple[str, ...]
    skipped: dict[str, int]
    warnings: tuple[str, ...]


def inspect(path: str | os.PathLike[str], config: Config = None, allow_pickle: bool = False) -> ModelInfo:
    """Read a model's headers, check them against the architecture, hash its weight files; load nothing."""
    source = open_source(path, config, allow_pickle)
    build(source)
    scheduler = read_scheduler(source)
    parameters = {
        name: sum(entry.numel for entry in part.tensors.values()) for name, part in source.parts.items()
    }
    files = [file.path for file in source.files]
    dtypes: Counter[str] = Counter()
    for part in source.parts.values():
        for entry in part.tensors.values():
            dtypes[str(DTYPES[entry.dtype]).removeprefix("torch.")] += entry.numel
    return ModelInfo(
        path=str(source.path),
        layout="folder" if source.path.is_dir() else "single file",
        family=source.family,
        tasks=source.abilities.tasks,
        parameters={**parameters, "total": sum(parameters.values())},
        dtype=", ".join(dtype for dtype, _ in dtypes.most_common()),
        scheduler=scheduler.class_name,
        sampler=scheduler.sampler,
        prediction=scheduler.prediction,
        hash=model_hash(source.path, files),
        files=tuple(map(str, files)),
        skipped=source.skipped,
        warnings=(*source.warnings, *scheduler.warnings),
    )


def model_hash(path: Path, files: Iterable[Path]) -> str:
    """The sha256 that tells two models apart by their weight files; CheckpointError for one not there."""
    if path.is_file():
        return sha256(path)
    digests = {file.relative_to(path).as_posix(): sha256(file) for file in files}
    text = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """The sha256 of a file's contents, in hexadecimal."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(path, None, f"cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
