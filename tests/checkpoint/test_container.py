"""The safetensors reader and writer by themselves: crafted headers, limits, foreign files, alignment."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastldm.checkpoint.container import ALIGNMENT, Payload, SafetensorsFile, write_safetensors
from fastldm.checkpoint.limits import MAX_JSON_DEPTH, parse_json, read_json
from fastldm.checkpoint.tensors import payload, read_tensor
from fastldm.errors import CheckpointError

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    """A file's bytes from a header: an object, or text that stands for itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


CRAFTED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "seven bytes": (bytes(7), "not a safetensors file"),
    "no header": (bytes(8), "is not JSON"),
    "length beyond file": (raw({"a": F32}, length=10_000), "truncated"),
    "length 2^63": (raw({"a": F32}, length=2**63), "limit"),
    "length over the cap": (raw({"a": F32}, length=9 << 20), "limit"),
    "header one short": (raw({"a": F32}, length=60), "is not JSON"),
    "not JSON": (raw(b"{nonsense}"), "is not JSON"),
    "list": (raw([F32]), "no JSON object"),
    "number": (raw(b"7"), "no JSON object"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "is not JSON"),
    "nested": (raw(b"[" * 100_000 + b"]" * 100_000), "nested deeper"),
    "half nested": (raw(b'{"a":' * 50_000), "nested deeper"),
    "many brackets": (raw(b"[" * 4_000_000), "too many"),
    "many quotes": (raw(b'"' * 4_000_000), "too many"),
    "backslashes": (raw(b'{"a": "' + b"\\" * 3_000_001), "is not JSON"),
    "huge integer": (raw(b'{"a": ' + b"9" * 5_000_000 + b"}"), "digits"),
    "huge real": (raw(b'{"a": 1.' + b"9" * 5_000_000 + b"}"), "digits"),
    "NaN": (raw(b'{"a": NaN}'), "NaN"),
    "duplicate": (raw(b'{"a": {}, "a": {}}'), "a: appears twice"),
    "duplicate field": (
        raw(b'{"a": {"dtype": "F32", "shape": [2], "shape": [2], "data_offsets": [0, 8]}}'),
        "shape: appears twice",
    ),
    "unprintable name": (raw({"a\n": F32}), "unusable name"),
    "surrogate name": (raw(b'{"\\ud800": {}}'), "unusable name"),
    "long name": (raw({"a" * 513: F32}), "unusable name"),
    "tensor no object": (raw({"a": 7}), "must have exactly"),
    "field missing": (raw({"a": {"dtype": "F32", "shape": [2]}}), "must have exactly"),
    "field too many": (raw({"a": {**F32, "strides": [1]}}), "must have exactly"),
    "unknown dtype": (raw({"a": {**F32, "dtype": "F31"}}), "unknown dtype"),
    "dtype no text": (raw({"a": {**F32, "dtype": ["F32"]}}), "unknown dtype"),
    "negative dim": (raw({"a": {**F32, "shape": [-2]}}), "impossible shape"),
    "huge dims": (raw({"a": {**F32, "shape": [0, 2**40]}}), "impossible shape"),
    "fractional dim": (raw({"a": {**F32, "shape": [2.0]}}), "impossible shape"),
    "true dim": (raw({"a": {**F32, "shape": [True, 2]}}), "impossible shape"),
    "rank 9": (raw({"a": {**F32, "shape": [1] * 8 + [2]}}), "impossible shape"),
    "shape no list": (raw({"a": {**F32, "shape": 2}}), "impossible shape"),
    "offsets reversed": (raw({"a": {**F32, "data_offsets": [8, 0]}}), "has -8 bytes"),
    "offsets negative": (raw({"a": {**F32, "data_offsets": [-8, 0]}}), "impossible offsets"),
    "three offsets": (raw({"a": {**F32, "data_offsets": [0, 8, 8]}}), "impossible offsets"),
    "size mismatch": (raw({"a": {**F32, "shape": [3]}}), "needs 12"),
    "hole": (raw({"a": {**F32, "data_offsets": [4, 12]}}, bytes(12)), "does not begin"),
    "overlap": (raw({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12)), "does not begin"),
    "twice the same bytes": (raw({"a": F32, "b": F32}), "does not begin"),
    "data missing": (raw({"a": F32}, bytes(7)), "is truncated"),
    "data left over": (raw({"a": F32}, bytes(9)), "belong to no tensor"),
    "metadata no object": (raw({"__metadata__": [1], "a": F32}), "__metadata__"),
    "metadata no text": (raw({"__metadata__": {"a": 1}, "a": F32}), "__metadata__"),
    "20 001 tensors": (
        raw({f"{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(20_001)}, b""),
        "limit is 20000",
    ),
    "zip": (b"PK\x03\x04" + bytes(100), "loads no pickles"),
    "pickle": (b"\x80\x02}q\x00." + bytes(100), "loads no pickles"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265146304\n",
        "git lfs pull",
    ),
    "html": (b"<!DOCTYPE html><html><body>Log in</body></html>", "web page"),
    "html after space": (b"\r\n  <html>" + bytes(50), "web page"),
    "json": (b'{"error": "Invalid username or password."}', "is JSON"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(100), "GGUF"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(100), "PNG"),
    "text": (b"hello, this is no model at all", "not a safetensors file"),
}


@pytest.mark.parametrize(("content", "why"), CRAFTED.values(), ids=CRAFTED)
def test_crafted_files_are_refused(tmp_path: Path, content: bytes, why: str) -> None:
    file = tmp_path / "crafted.ckpt"
    file.write_bytes(content)
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(file)
    assert time.process_time() - started < 2
    message = str(caught.value)
    assert why in message and str(file) in message and len(message) < 400 and "\n" not in message


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match="regular file"):
        SafetensorsFile(tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        SafetensorsFile(tmp_path / "absent.safetensors")


def test_reads_what_safetensors_writes_and_the_other_way_round(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    tensors = {
        f"t{i}": torch.randn(shape, generator=generator).to(dtype)
        for i, (shape, dtype) in enumerate(
            [
                ((16, 4), torch.float32),
                ((3,), torch.float16),
                ((5, 1, 1), torch.bfloat16),
                ((32,), torch.float64),
                ((), torch.float32),
                ((64,), torch.float8_e4m3fn),
            ]
        )
    }
    save_file(tensors, tmp_path / "theirs.safetensors", {"a": "b"})
    theirs = SafetensorsFile(tmp_path / "theirs.safetensors")
    assert theirs.metadata == {"a": "b"} and theirs.entries.keys() == tensors.keys()
    write_safetensors(tmp_path / "ours.safetensors", {k: payload(t) for k, t in tensors.items()}, {"ü": "é"})
    ours = SafetensorsFile(tmp_path / "ours.safetensors")
    with safe_open(tmp_path / "ours.safetensors", "pt") as reader:
        assert reader.metadata() == {"ü": "é"}
        for key, tensor in tensors.items():
            for found in (
                read_tensor(ours.entries[key]),
                read_tensor(theirs.entries[key]),
                reader.get_tensor(key),
            ):
                assert found.dtype == tensor.dtype and found.shape == tensor.shape
                assert torch.equal(found.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


def test_tensors_are_aligned_and_mapped_where_the_file_allows(tmp_path: Path) -> None:
    tensors = {"odd": torch.ones(3), "even": torch.arange(64.0), "large": torch.rand(1000, 16)}
    write_safetensors(tmp_path / "a.safetensors", {k: payload(t) for k, t in tensors.items()}, {})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert [entry.spans[0].begin % ALIGNMENT for entry in file.entries.values()] == [0, 0, 0]
    base = torch.frombuffer(file.map(), dtype=torch.uint8).data_ptr()
    for key in ("even", "large"):
        assert 0 <= read_tensor(file.entries[key]).data_ptr() - base < file.size
    text = json.dumps({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT + 3)
    (tmp_path / "b.safetensors").write_bytes(raw(text, tensors["even"][:16].numpy().tobytes()))
    skewed = read_tensor(SafetensorsFile(tmp_path / "b.safetensors").entries["a"])
    assert skewed.data_ptr() % ALIGNMENT == 0 and torch.equal(skewed, tensors["even"][:16])


def test_the_map_lives_as_long_as_its_tensors(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"w": payload(torch.ones(64))}, {})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    tensor = read_tensor(file.entries["w"])
    one = id(file.map())
    assert id(file.map()) == one and file._mapping() is not None
    del tensor
    assert file._mapping() is None
    assert torch.equal(read_tensor(file.entries["w"]), torch.ones(64))


def test_writing_into_a_mapped_tensor_leaves_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_safetensors(file, {"a": payload(torch.zeros(64))}, {})
    before = file.read_bytes()
    read_tensor(SafetensorsFile(file).entries["a"]).add_(1)
    assert file.read_bytes() == before


def test_the_bytes_written_depend_on_the_content_only(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(64), "c": torch.rand(2)}
    write_safetensors(tmp_path / "1", {k: payload(t) for k, t in tensors.items()}, {"y": "2", "x": "1"})
    write_safetensors(tmp_path / "2", {k: payload(tensors[k]) for k in "cab"}, {"x": "1", "y": "2"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2]
)
@pytest.mark.parametrize("position", [0, 517, -1])
def test_non_finite_weights_are_refused(
    tmp_path: Path, value: float, dtype: torch.dtype, position: int
) -> None:
    tensor = torch.zeros(1000)
    tensor[position] = value
    write_safetensors(tmp_path / "a.safetensors", {"some.weight": payload(tensor.to(dtype))}, {})
    with pytest.raises(CheckpointError, match=r"some\.weight: holds NaN or Inf"):
        read_tensor(SafetensorsFile(tmp_path / "a.safetensors").entries["some.weight"], torch.float32)


def test_weights_that_overflow_the_dtype_asked_for_are_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"w": payload(torch.tensor([1.0, 7e4]))}, {})
    entry = SafetensorsFile(tmp_path / "a.safetensors").entries["w"]
    with pytest.raises(CheckpointError, match="does not fit into torch.float16"):
        read_tensor(entry, torch.float16)
    assert read_tensor(entry, torch.bfloat16).isfinite().all()


def test_an_empty_tensor_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"w": payload(torch.ones(7, 0))}, {})
    with pytest.raises(CheckpointError, match="w: is empty"):
        read_tensor(SafetensorsFile(tmp_path / "a.safetensors").entries["w"])


def test_a_file_that_changes_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": payload(torch.ones(64))}, {})
    file = SafetensorsFile(path)
    with open(path, "r+b") as handle:
        handle.truncate(100)
    with pytest.raises(CheckpointError, match="changed"):
        read_tensor(file.entries["w"])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": payload(torch.ones(64))}, {})
    before = path.read_bytes()

    def chunks() -> Any:
        yield bytes(16)
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="cannot be written: No space left"):
        write_safetensors(path, {"w": Payload("F32", (64,), chunks())}, {})
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    for target in (tmp_path / "none" / "a.safetensors", path / "a.safetensors"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            write_safetensors(target, {"w": payload(torch.ones(64))}, {})


def test_configurations_are_read_within_limits(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"lambda_min_clipped": -Infinity, "a": [1, 2.5e-4, null, "\\"[{"]}')
    assert read_json(file) == {"lambda_min_clipped": -float("inf"), "a": [1, 2.5e-4, None, '"[{']}
    deep = b"[" * MAX_JSON_DEPTH + b"]" * MAX_JSON_DEPTH
    assert parse_json(deep, file) and parse_json(b'"' + b"[" * 999 + b'"', file)
    with pytest.raises(CheckpointError, match="nested deeper"):
        parse_json(b"[" + deep + b"]", file)
    file.write_bytes(b" " * ((8 << 20) + 1))
    with pytest.raises(CheckpointError, match="bytes"):
        read_json(file)
    file.write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        read_json(file)
