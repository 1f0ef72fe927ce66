"""Zip archives as PyTorch writes them: records that are stored as they are, so that each is a range of bytes.

Only the directory at the end is believed, and held against the records' own headers; whatever is compressed,
encrypted or overlaps is refused. (PKWARE's APPNOTE 6.3.10, sections 4.3 and 4.5.3)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastldm.errors import CheckpointError

ZIP = b"PK\x03\x04"
MAX_DIRECTORY = 8 << 20
MAX_COMMENT = 65_535
FULL = 0xFFFFFFFF  # the number is in the zip64 field

_END = struct.Struct("<4s4H2LH")  # magic, disks, counts, the directory's size and place, length of a comment
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")

Record = tuple[int, int]  # bytes begin…end of the archive


def read_directory(file: BinaryIO, size: int, path: Path) -> dict[str, Record]:
    """The records of an archive of `size` bytes by name. CheckpointError, naming `path`, for what is no plain
    archive of stored records.
    """
    start, length = _find_directory(file, size, path)
    if not (0 <= length <= MAX_DIRECTORY and 0 <= start <= size - length):
        raise CheckpointError(path, None, f"is damaged: a directory of {length} bytes at byte {start}")
    file.seek(start)
    records: dict[str, Record] = {}
    for name, where, stored in _entries(file.read(length), path):
        if name in records:
            raise CheckpointError(path, name, "appears twice in the archive")
        if where >= start:
            raise CheckpointError(path, name, f"is damaged: no record at byte {where}")
        begin = _begin(file, path, name, where)
        records[name] = begin, begin + stored
    end, last = 0, ""
    for name, record in sorted(records.items(), key=lambda item: item[1]):
        if record[0] < end or record[1] > start:
            raise CheckpointError(path, name, f"overlaps {last if record[0] < end else 'the directory'}")
        end, last = record[1], name
    return records


def _find_directory(file: BinaryIO, size: int, path: Path) -> tuple[int, int]:
    """Where the directory begins, and its length."""
    tail_length = min(size, _END.size + MAX_COMMENT)
    file.seek(size - tail_length)
    tail = file.read(tail_length)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise CheckpointError(path, None, "is truncated: a zip archive without its end")
    *_, length, start, _ = _END.unpack_from(tail, at)
    if at >= _LOCATOR.size and tail.startswith(b"PK\x06\x07", at - _LOCATOR.size):
        _, _, place, _ = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)
        if place > size - _END64.size:
            raise CheckpointError(path, None, f"is damaged: a zip64 end at byte {place} of {size}")
        file.seek(place)
        magic, *_, length, start = _END64.unpack(file.read(_END64.size))
        if magic != b"PK\x06\x06":
            raise CheckpointError(path, None, "is damaged: no zip64 end where it should be")
    return start, length


def _entries(directory: bytes, path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, place and number of bytes of each record in a directory."""
    at = 0
    while at < len(directory):
        if at + _ENTRY.size > len(directory) or not directory.startswith(b"PK\x01\x02", at):
            raise CheckpointError(path, None, "is damaged: its directory is no list of records")
        fields = _ENTRY.unpack_from(directory, at)
        flags, method, packed, stored, name_length, extra_length, comment = *fields[3:5], *fields[8:13]
        at += _ENTRY.size
        raw, extra = directory[at : at + name_length], directory[at + name_length :][:extra_length]
        at += name_length + extra_length + comment
        name = raw.decode("utf-8", "replace")
        if len(raw) < name_length or not name.isprintable():
            raise CheckpointError(path, None, f"has a record of the unusable name {name[:40]!r}")
        if method or packed != stored:
            raise CheckpointError(path, name, "is compressed; PyTorch stores its records as they are")
        if flags & 1:
            raise CheckpointError(path, name, "is encrypted")
        where = fields[16]
        if FULL in (stored, where):
            stored, where = _wide(extra, stored, where, path, name)
        yield name, where, stored


def _wide(extra: bytes, stored: int, where: int, path: Path, name: str) -> tuple[int, int]:
    """Bytes and place of a record, of which those that are FULL stand in the zip64 field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            numbers = [number for (number,) in struct.iter_unpack("<Q", extra[at + 4 :][: length // 8 * 8])]
            if stored == FULL:  # first the size unpacked, then packed
                if len(numbers) < 2 or numbers[0] != numbers[1]:
                    break
                stored, numbers = numbers[0], numbers[2:]
            if where == FULL:
                if not numbers:
                    break
                where = numbers[0]
            return stored, where
        at += 4 + length
    raise CheckpointError(path, name, "is damaged: its zip64 field does not hold its size and place")


def _begin(file: BinaryIO, path: Path, name: str, where: int) -> int:
    """Where the bytes begin of the record whose own header is at `where`."""
    file.seek(where)
    header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size or not header.startswith(ZIP):
        raise CheckpointError(path, name, f"is damaged: no record at byte {where}")
    *_, name_length, extra_length = _LOCAL.unpack(header)
    if file.read(name_length) != name.encode():
        raise CheckpointError(path, name, f"is damaged: another record at byte {where}")
    return where + _LOCAL.size + name_length + extra_length
