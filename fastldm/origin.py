"""Where pictures come from: the model that made them, as its files were when it was loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from fastldm import __version__
from fastldm.arguments import Request
from fastldm.checkpoint.hub import DEFAULT
from fastldm.checkpoint.info import model_hash
from fastldm.errors import CheckpointError


class Origin:
    """A model at a path; to be made when it has just been loaded."""

    def __init__(self, path: Path, files: Iterable[Path]) -> None:
        """files: those of its weights."""
        self._path = path.absolute()  # the working folder may change
        self.model = "default" if self._path == DEFAULT else str(path)
        self._files = {file.absolute(): _state(file) for file in files}

    @cached_property
    def hash(self) -> str | None:
        """The model's hash, as `fastldm info` prints it, found when it is first asked for; None where the
        files are gone by then, or others.
        """
        try:
            found = model_hash(self._path, self._files)
        except CheckpointError:
            return None
        loaded = self._files and all(_state(file) == state for file, state in self._files.items())
        return found if loaded else None

    def describe(self, request: Request, loras: list[dict[str, Any]], index: int) -> Mapping[str, Any]:
        """What a PNG of image `index` says of its making."""
        return {
            "version": __version__,
            "model": self.model,
            "model_hash": self.hash,
            **({"loras": loras} if loras else {}),
            "arguments": request.arguments(index),
        }


def _state(file: Path) -> tuple[int, int] | None:
    """Size and time of the last change; None: there is no such file."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
