"""PyTorch's pickles (.ckpt, .pt, .bin) as weight files, without unpickling: nothing in them is ever called.

torch.save writes a zip archive: `data.pkl`, which `pickle_machine` reads, and one record a storage, in which
tensors are ranges of bytes as in a safetensors file.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import BinaryIO

from fastldm.checkpoint.archive import ZIP, Record, read_directory
from fastldm.checkpoint.container import (
    ITEM_SIZES,
    MAX_DIM,
    MAX_RANK,
    MAX_TENSORS,
    Entry,
    SafetensorsFile,
    Span,
    WeightFile,
)
from fastldm.checkpoint.limits import MAX_NAME, open_regular
from fastldm.checkpoint.pickle_machine import UNTYPED, Machine, Stored
from fastldm.errors import CheckpointError

MAX_PROGRAM = 16 << 20

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number with which torch.save began until 1.5
REFUSED = (
    "is a pickle (.ckpt, .pt, .bin): allow_pickle=True, or --allow-pickle, reads its tensors and runs none of"
    " its code; safetensors is the better format, and `fastldm convert` makes it"
)


def open_weights(path: Path, allow_pickle: bool = False) -> WeightFile:
    """A weight file of either kind, told apart by its first bytes; CheckpointError for a pickle that is not
    allowed.
    """
    file, _ = open_regular(path)
    with file:
        start = file.read(len(LEGACY))
    if start == LEGACY:
        why = "is a pickle of PyTorch before 1.6, of which fastldm reads none: save it anew, as safetensors"
        raise CheckpointError(path, None, why)
    if not start.startswith(ZIP):
        return SafetensorsFile(path)
    if not allow_pickle:
        raise CheckpointError(path, None, REFUSED)
    return PickleFile(path)


class PickleFile(WeightFile):
    """A zip archive of torch.save: the tensors of its `state_dict`, or else of the dict that it holds."""

    def _read(self, file: BinaryIO) -> tuple[dict[str, str], dict[str, Entry]]:
        records = read_directory(file, self.size, self.path)
        programs = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise self._refuse(None, "is a zip archive, but none that torch.save wrote")
        folder = programs[0].removesuffix("data.pkl")
        order = records.get(f"{folder}byteorder")
        if order is not None and self._content(file, f"{folder}byteorder", order, 16) != b"little":
            raise self._refuse(f"{folder}byteorder", "is not little: a file of another kind of machine")
        program = self._content(file, programs[0], records[programs[0]], MAX_PROGRAM)
        try:
            held = Machine().run(program)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise self._refuse(programs[0], f"is no program of torch.save: {error!r:.200}") from error
        tensors = held.get("state_dict", held) if isinstance(held, dict) else None
        found = {
            name: value
            for name, value in (tensors.items() if isinstance(tensors, dict) else ())
            if isinstance(value, Stored) and isinstance(name, str)
        }
        if not found:
            raise self._refuse(None, "holds no tensors by name: neither a state_dict nor one in a dict")
        if len(found) > MAX_TENSORS:
            raise self._refuse(None, f"holds {len(found)} tensors; the limit is {MAX_TENSORS}")
        return {}, {name: self._entry(name, value, folder, records) for name, value in found.items()}

    def _refuse(self, key: str | None, why: str) -> CheckpointError:
        return CheckpointError(self.path, key, why)

    def _content(self, file: BinaryIO, name: str, record: Record, most: int) -> bytes:
        begin, end = record
        if end - begin > most:
            raise self._refuse(name, f"has {end - begin} bytes; the limit is {most}")
        file.seek(begin)
        return file.read(end - begin)

    def _entry(self, name: str, tensor: Stored, folder: str, records: dict[str, Record]) -> Entry:
        if len(name) > MAX_NAME or not name.isprintable():
            raise self._refuse(None, f"has an unusable name {name[:40]!r}")
        dtype, shape, stride, storage = tensor.dtype, tensor.shape, tensor.stride, tensor.storage
        if dtype is None:
            raise self._refuse(name, f"has a dtype that fastldm does not know: {storage.kind:.60}")
        numbers = (*shape, *stride, tensor.offset, storage.count)
        if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
            raise self._refuse(name, "has an impossible shape")
        if len(shape) != len(stride) or len(shape) > MAX_RANK or any(dim >= MAX_DIM for dim in shape):
            raise self._refuse(name, f"has the impossible shape {list(shape)!r:.80}")
        if not _is_contiguous(shape, stride):
            raise self._refuse(name, f"is stored with strides {list(stride)}; only contiguous ones are read")
        record = records.get(f"{folder}data/{storage.key}")
        if record is None:
            raise self._refuse(name, f"is in the record {storage.key!r:.40}, which is missing")
        size, itemsize = record[1] - record[0], ITEM_SIZES[dtype]
        count = storage.count * (1 if storage.kind == UNTYPED else itemsize)
        begin, end = tensor.offset * itemsize, (tensor.offset + math.prod(shape)) * itemsize
        if count != size or end > size:
            raise self._refuse(name, f"needs bytes {begin} to {end} of {count}; its record has {size}")
        return Entry(name, dtype, shape, (Span(self, record[0] + begin, record[0] + end),))


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    step, steps = 1, []
    for dim in reversed(shape):
        steps.append(step)
        step *= dim
    return step == 0 or all(
        dim == 1 or apart == step for dim, apart, step in zip(shape, stride, reversed(steps), strict=True)
    )
