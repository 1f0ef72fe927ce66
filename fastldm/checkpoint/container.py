"""Weight files: tensors as byte ranges of a file; a safetensors header reader with limits, an atomic writer.

The format is eight bytes of header length (little endian), a JSON header `name → {dtype, shape,
data_offsets}`, then the data.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from fastldm.checkpoint.atomic import replacing
from fastldm.checkpoint.limits import open_regular, parse_json
from fastldm.errors import CheckpointError

MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 20_000
MAX_RANK = 8
MAX_DIM = 1 << 31
ALIGNMENT = 64

ITEM_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}

PICKLE = "is a pickle (.ckpt, .pt, .bin); fastldm loads no pickles here: convert it to safetensors"
FOREIGN = (
    (b"PK\x03\x04", PICKLE),
    (b"\x80", PICKLE),
    (b"version https://git-lfs", "is a git-lfs pointer, not the file itself: run `git lfs pull`"),
    (b"<", "is a web page, not a model: the download went wrong (a login or an error page?)"),
    (b"{", "is JSON, not a model"),
    (b"GGUF", "is a GGUF file; fastldm loads safetensors"),
    (b"\x89PNG", "is a PNG image, not a model"),
    (b"\xff\xd8\xff", "is a JPEG image, not a model"),
    (b"\x1f\x8b", "is a gzip archive, not a model"),
)


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes begin…end of a weight file."""

    file: WeightFile
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor still in its file: its name there, dtype, shape, and bytes, in several spans to be joined."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def rows(self, parts: int, groups: int = 1) -> list[Entry]:
        """The tensor cut into equal parts along its first dimension; with groups, it is so many tensors one
        below the other, each cut so. `parts` × `groups` must divide it.
        """
        shape = (self.shape[0] // parts, *self.shape[1:])
        cut = self.pieces(parts * groups)
        return [Entry(self.name, self.dtype, shape, tuple(cut[part::parts])) for part in range(parts)]

    def pieces(self, count: int) -> tuple[Span, ...]:
        """Its bytes in so many equal pieces, in order: as they are, or cut from one."""
        if len(self.spans) == count:
            return self.spans
        (span,) = self.spans
        step = (span.end - span.begin) // count
        cuts = [span.begin + step * piece for piece in range(count + 1)]
        return tuple(Span(span.file, *ends) for ends in pairwise(cuts))

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes, in order."""
        for span in self.spans:
            yield memoryview(span.file.map())[span.begin : span.end]


class WeightFile:
    """A file of named tensors, of which the description is read and checked; `map()` gives the bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        file, self.size = open_regular(path)
        with file:
            self._identity = _identity(file)
            self.metadata, self.entries = self._read(file)
        self._mapping: Callable[[], mmap.mmap | None] = lambda: None

    def _read(self, file: BinaryIO) -> tuple[dict[str, str], dict[str, Entry]]:
        raise NotImplementedError

    def map(self) -> mmap.mmap:
        """The file as a copy-on-write memory map; CheckpointError if it changed since it was described.

        There is one map as long as anything uses it, and none that outlives the tensors that lie in it.
        """
        mapping = self._mapping()
        if mapping is None:
            file, size = open_regular(self.path)
            with file:
                if _identity(file) != self._identity or size != self.size:
                    raise CheckpointError(self.path, None, "changed while it was being read")
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._mapping = weakref.ref(mapping)
        return mapping


class SafetensorsFile(WeightFile):
    """A safetensors file."""

    def _read(self, file: BinaryIO) -> tuple[dict[str, str], dict[str, Entry]]:
        start = file.read(32)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or length > min(MAX_HEADER_BYTES, self.size - 8):
            raise CheckpointError(self.path, None, self._diagnosis(start, length))
        file.seek(8)
        header = parse_json(file.read(length), self.path, "header")
        if not isinstance(header, dict):
            raise CheckpointError(self.path, None, "has a header that is no JSON object")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(self.path, "__metadata__", "must map names to strings")
        if len(header) > MAX_TENSORS:
            raise CheckpointError(self.path, None, f"holds {len(header)} tensors; the limit is {MAX_TENSORS}")
        entries = {name: self._entry(name, fields, 8 + length) for name, fields in header.items()}
        end, after = 8 + length, None
        for entry in sorted(entries.values(), key=lambda entry: (entry.spans[0].begin, entry.spans[0].end)):
            if entry.spans[0].begin != end:
                raise CheckpointError(
                    self.path, entry.name, f"does not begin where {after or 'the header'} ends"
                )
            end, after = entry.spans[0].end, entry.name
        if end != self.size:
            state = "is truncated" if end > self.size else "has bytes that belong to no tensor"
            raise CheckpointError(self.path, None, f"{state}: {self.size} bytes, the header describes {end}")
        return metadata, entries

    def _diagnosis(self, start: bytes, length: int) -> str:
        if not start:
            return "is empty"
        if start[8:9] == b"{" and length <= MAX_HEADER_BYTES:
            return f"is truncated: {self.size} bytes, its header alone has {length}"
        for magic, why in FOREIGN:
            if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(magic):
                return why
        if start[8:9] == b"{":
            return f"has a header of {length} bytes; the limit is {MAX_HEADER_BYTES}"
        return "is not a safetensors file"

    def _entry(self, name: str, fields: Any, data: int) -> Entry:
        def whole_numbers(value: Any) -> bool:
            return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)

        def refuse(why: str) -> CheckpointError:
            return CheckpointError(self.path, name, why)

        if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
            raise refuse("must have exactly dtype, shape and data_offsets")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
            raise refuse(f"has the unknown dtype {dtype!r:.40}")
        if not whole_numbers(shape) or len(shape) > MAX_RANK or any(dim >= MAX_DIM for dim in shape):
            raise refuse(f"has the impossible shape {shape!r:.80}")
        if not whole_numbers(offsets) or len(offsets) != 2:
            raise refuse(f"has the impossible offsets {offsets!r:.80}")
        begin, end = offsets
        if end - begin != math.prod(shape) * ITEM_SIZES[dtype]:
            raise refuse(
                f"has {end - begin} bytes, but {dtype} {shape} needs {math.prod(shape) * ITEM_SIZES[dtype]}"
            )
        return Entry(name, dtype, tuple(shape), (Span(self, data + begin, data + end),))


def _identity(file: BinaryIO) -> tuple[int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_mtime_ns


@dataclass(frozen=True, slots=True)
class Payload:
    """A tensor to write: dtype as safetensors names it, shape, and bytes in pieces, made when asked for."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Iterable[Any]

    @property
    def nbytes(self) -> int:
        """How many bytes its shape and dtype take."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


def write_safetensors(path: Path, tensors: Mapping[str, Payload], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name, then rename it.

    Tensors whose size is a multiple of 64 bytes come first and lie on multiples of 64, so that they can be
    used straight from a memory map. The order, and so every byte, depends on the names and sizes only.
    """
    order = sorted(tensors, key=lambda name: (tensors[name].nbytes % ALIGNMENT != 0, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        tensor, begin = tensors[name], end
        end = begin + tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(
            path, None, f"would need a header of {len(text)} bytes; the limit is {MAX_HEADER_BYTES}"
        )
    with replacing(path) as temporary, open(temporary, "xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            written = sum(file.write(chunk) for chunk in tensors[name].chunks)
            assert written == tensors[name].nbytes, name
        file.flush()
        os.fsync(file.fileno())
