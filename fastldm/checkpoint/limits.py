"""Reading JSON and files within caps: a hostile model file is refused before it costs memory or time."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from fastldm.errors import CheckpointError

MAX_JSON_BYTES = 8 << 20
MAX_JSON_MARKS = 400_000  # of quotes, and of commas and brackets: 20 000 tensors have 200 000 and 280 000
NO_MARKS = bytes(set(range(256)) - set(b"[]{},"))
MAX_JSON_DEPTH = 16
MAX_INT_DIGITS = 18
MAX_FLOAT_DIGITS = 40
MAX_NAME = 512
MAX_WIDTH = 65_536

# Fields that decide how many modules a network has or how large its tensors are, and the most that any real
# one asks for.
STRUCTURE = {
    "layers_per_block": 16,
    "transformer_layers_per_block": 64,
    "num_hidden_layers": 128,
    "block_out_channels": MAX_WIDTH,
    "hidden_size": MAX_WIDTH,
    "intermediate_size": 4 * MAX_WIDTH,
    "cross_attention_dim": MAX_WIDTH,
    "max_position_embeddings": MAX_WIDTH,
    "vocab_size": 2_000_000,
    "num_train_timesteps": 1_000_000,
}
MAX_LEVELS = 16
MAX_FIELD = 1000  # characters, but for the one field that is a table
TABLE = "trained_betas"


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """The file, open for reading, and its size; CheckpointError unless it is a readable regular file.

    Pipes and devices are refused without being opened for reading, which could wait for ever.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise CheckpointError(path, None, f"cannot be read: {_reason(error)}") from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise CheckpointError(path, None, "is not a regular file")
    return os.fdopen(handle, "rb"), status.st_size


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, within the caps of this module."""
    file, size = open_regular(path)
    with file:
        if size > MAX_JSON_BYTES:
            raise CheckpointError(
                path, None, f"has {size} bytes; a configuration has at most {MAX_JSON_BYTES}"
            )
        found = parse_json(file.read(MAX_JSON_BYTES), path)
    if not isinstance(found, dict):
        raise CheckpointError(path, None, "holds no JSON object")
    return found


def parse_json(data: bytes, file: str | os.PathLike[str], key: str | None = None) -> Any:
    """Parse JSON of bounded size, depth and integers, without duplicate or unprintable names.

    `file` and `key` name the place in the CheckpointError that anything else raises.
    """

    def refuse(why: str) -> CheckpointError:
        return CheckpointError(file, key, why)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if len(name) > MAX_NAME or not name.isprintable():
                raise refuse(f"has an unusable name {name[:40]!r}")
            if name in found:
                raise CheckpointError(file, name, "appears twice")
            found[name] = value
        return found

    def integer(digits: str) -> int:
        if len(digits) > MAX_INT_DIGITS:
            raise refuse(f"has an integer of {len(digits)} digits")
        return int(digits)

    def real(digits: str) -> float:
        if len(digits) > MAX_FLOAT_DIGITS:
            raise refuse(f"has a number of {len(digits)} digits")
        return float(digits)

    def constant(name: str) -> float:
        if name == "NaN":
            raise refuse("holds NaN")
        return float(name)  # Python writes infinities into JSON, and so do real scheduler configurations

    if len(data) > MAX_JSON_BYTES:
        raise refuse(f"has {len(data)} bytes of JSON; the limit is {MAX_JSON_BYTES}")
    if data.count(b'"') > MAX_JSON_MARKS:
        raise refuse("has too many entries")
    outside_strings = b"".join(data.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])
    marks = outside_strings.translate(None, delete=NO_MARKS)
    if len(marks) > MAX_JSON_MARKS:
        raise refuse("has too many entries")
    depth = 0
    for byte in marks:
        depth += (byte in b"[{") - (byte in b"]}")
        if depth > MAX_JSON_DEPTH:
            raise refuse(f"is nested deeper than {MAX_JSON_DEPTH}")
    try:
        return json.loads(
            data.decode(),
            object_pairs_hook=unique,
            parse_int=integer,
            parse_float=real,
            parse_constant=constant,
        )
    except ValueError as error:
        raise refuse(f"is not JSON: {error}") from error


def check_structure(config: Mapping[str, Any], file: str | os.PathLike[str]) -> None:
    """Refuse a component's configuration that is absurdly large, or would make an absurdly large network."""
    for name, value in config.items():
        if name != TABLE and len(str(value)) > MAX_FIELD:
            raise CheckpointError(file, name, f"is longer than {MAX_FIELD} characters")
    for name, most in STRUCTURE.items():
        value = config.get(name)
        values = value if isinstance(value, list | tuple) else [value]
        if len(values) > MAX_LEVELS:
            raise CheckpointError(file, name, f"has {len(values)} entries; the limit is {MAX_LEVELS}")
        for item in values:
            if isinstance(item, int | float) and not 0 <= item <= most:
                raise CheckpointError(file, name, f"is {item}; the limit is {most}")
