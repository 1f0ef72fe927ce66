"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from fastldm.errors import CheckpointError, first_line


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` for a file or folder, which takes the name `path` when the block ends.

    On an error nothing is left of it and the old file stays. Entries of an old folder that the new one lacks
    are kept (a model card). CheckpointError when the operating system refuses.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            for entry in temporary.iterdir():
                _remove(path / entry.name)
                os.replace(entry, path / entry.name)
            temporary.rmdir()
        else:
            os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            _remove(temporary)
        if isinstance(error, OSError):
            raise CheckpointError(path, None, f"cannot be written: {error.strerror or error}") from error
        raise


def save_tensors(path: Path, value: Any) -> None:
    """`torch.save` to a file that appears whole or not at all. CheckpointError when it cannot be written."""
    with replacing(path) as temporary:
        try:
            torch.save(value, temporary)
        except RuntimeError as error:  # what torch's writer makes of a full disk
            raise CheckpointError(path, None, f"cannot be written: {first_line(error)}") from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
