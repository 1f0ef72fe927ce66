"""Pickles of PyTorch: their tensors to the bit, whatever else is in the file, and nothing of it run."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import sys
import time
import tracemalloc
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastldm import cli
from fastldm.checkpoint import convert, inspect, load_components
from fastldm.checkpoint.info import sha256
from fastldm.checkpoint.pickle_machine import MAX_OPERATIONS, Machine
from fastldm.checkpoint.pickles import PickleFile, open_weights
from fastldm.checkpoint.tensors import read_tensor
from fastldm.errors import CheckpointError, InvalidArgument
from fastldm.lora import MergedLoras
from fastldm.models.tokenizer import Tokenizer

SECONDS = 2.0  # of processor time, for one file


class Evil:
    """Pickles as a call that makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.canary),)


def lightning(tensors: dict[str, torch.Tensor], canary: Path, file: Path) -> Path:
    """A checkpoint as pytorch-lightning writes it, with objects of a module that nobody else has."""
    module = types.ModuleType("gone_tomorrow")
    for name in ("ModelCheckpoint", "Config"):
        setattr(module, name, type(name, (dict,), {"__module__": "gone_tomorrow"}))
    sys.modules["gone_tomorrow"] = module
    config = module.Config(lr=1e-4, betas=(0.9, 0.99))
    config.parent = config
    held = {
        "epoch": 3,
        "global_step": 470_000,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {module.ModelCheckpoint: {"best": torch.tensor(0.5), "canary": Evil(canary)}},
        "optimizer_states": [{"state": {0: {"step": 7, "exp_avg": torch.ones(3)}}, "param_groups": [{}]}],
        "hyper_parameters": config,
        "numbers": {1, 2, 3, None, 2.5, "text", b"bytes", 1 << 100},
        "state_dict": OrderedDict(tensors),
    }
    torch.save(held, file)
    del sys.modules["gone_tomorrow"]
    return file


def test_a_training_checkpoint_gives_its_tensors(tiny: Any, tmp_path: Path) -> None:
    """As the safetensors file of the same tensors does, to the bit."""
    canary = tmp_path / "canary"
    file = lightning(load_file(tiny.file), canary, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"allow_pickle=True.*safetensors is the better") as caught:
        load_components(file)
    assert caught.value.file == str(file)
    words = tiny.folder / "tokenizer"
    got, want = (load_components(each, tokenizer=words, allow_pickle=True) for each in (file, tiny.file))
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(each, part).state_dict() for each in (got, want))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (got.family, got.scheduler, got.warnings) == (want.family, want.scheduler, want.warnings)
    ours, theirs = inspect(file, allow_pickle=True), inspect(tiny.file)
    assert (ours.parameters, ours.skipped, ours.dtype) == (theirs.parameters, theirs.skipped, theirs.dtype)
    assert ours.hash == sha256(file) and ours.files == (str(file),)
    assert not canary.exists()


def test_every_kind_of_tensor(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    base = torch.randn(6, 4, generator=draw)
    held: dict[str, Any] = {
        **{str(dtype): base.to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)},
        **{str(dtype): base.to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)},
        **{"base": base, "tied": base, "rows": base[2:5], "row": base[1], "number": base[3, 2]},
        "parameter": torch.nn.Parameter(base * 2),
        "ones": base[:, :1].contiguous().expand(6, 1)[:, None],
        "channels": base.reshape(6, 4, 1, 1).to(memory_format=torch.channels_last),
    }
    others = {"long": torch.arange(5), "bool": torch.tensor([True]), "empty": torch.zeros(0, 3)}
    torch.save({**held, **others, "note": "text", 7: base}, tmp_path / "x.pt")
    file = open_weights(tmp_path / "x.pt", allow_pickle=True)
    assert file.entries.keys() == held.keys() | others.keys() and file.metadata == {}
    for name, tensor in held.items():
        got = read_tensor(file.entries[name])
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        assert torch.equal(got.double(), tensor.detach().double()), name
    assert [file.entries[name].dtype for name in others] == ["I64", "BOOL", "F32"]
    assert file.entries["tied"].spans == file.entries["base"].spans
    mapped = torch.frombuffer(file.map(), dtype=torch.uint8).data_ptr()
    (span,) = file.entries["base"].spans
    assert read_tensor(file.entries["base"]).data_ptr() == mapped + span.begin  # not copied


@pytest.mark.parametrize("protocol", range(2, 6))
def test_every_protocol_of_torch_save(tmp_path: Path, protocol: int) -> None:
    held = {"state_dict": OrderedDict(a=torch.arange(3.0)), "junk": [{1: {2}}, frozenset([3]), ((), 1.5)]}
    torch.save(held, tmp_path / "x.pt", pickle_protocol=protocol)
    assert read_tensor(PickleFile(tmp_path / "x.pt").entries["a"]).tolist() == [0, 1, 2]


def test_large_archives_have_64_bit_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As zips of more than 4 GiB have; here all numbers count as too large for 32 bits."""
    torch.save({"a": torch.arange(300.0), "b": torch.ones(2)}, tmp_path / "x.pt")
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        for name in old.namelist():
            with new.open(name, "w", force_zip64=True) as record:
                record.write(old.read(name))
    content = (tmp_path / "y.pt").read_bytes()
    assert b"PK\x06\x06" in content and b"\xff" * 8 in content
    file = PickleFile(tmp_path / "y.pt")
    assert read_tensor(file.entries["a"]).tolist() == list(range(300))
    assert read_tensor(file.entries["b"]).tolist() == [1, 1]
    field = content.index(struct.pack("<2Q", 1200, 1200), content.index(b"PK\x01\x02"))
    for place, value, why in (
        (field, 1 << 40, "its zip64 field does not hold"),
        (field + 16, (1 << 64) - 1, "no record at byte 18446744073709551615"),
        (field + 16, 1 << 20, "no record at byte 1048576"),
        (content.index(b"PK\x06\x06") + 40, 1 << 63, "a directory of 9223372036854775808 bytes"),
        (content.index(b"PK\x06\x07") + 8, 1 << 63, "a zip64 end at byte 9223372036854775808"),
    ):
        damaged = content[:place] + struct.pack("<Q", value) + content[place + 8 :]
        (tmp_path / "z.pt").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=why):
            PickleFile(tmp_path / "z.pt")


def test_folders_of_pickles(tiny_sd1: Any, tmp_path: Path) -> None:
    """A .bin beside each config.json, whole or in shards; safetensors go before it."""
    model = tmp_path / "model"
    shutil.copytree(tiny_sd1.folder, model)
    whole = {}
    for part, name in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        whole[part] = load_file(model / part / f"{name}.safetensors")
        torch.save(whole[part], model / part / f"{name}.bin")
    assert inspect(model).files == inspect(model, allow_pickle=True).files
    for part in whole:
        (model / part / "diffusion_pytorch_model.safetensors").unlink()
    text = load_file(model / "text_encoder" / "model.safetensors")
    (model / "text_encoder" / "model.safetensors").unlink()
    keys = sorted(text)
    names = {key: f"pytorch_model-0000{1 + (i > 5)}-of-00002.bin" for i, key in enumerate(keys)}
    for name in set(names.values()):
        torch.save({key: text[key] for key in keys if names[key] == name}, model / "text_encoder" / name)
    index = model / "text_encoder" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match="allow_pickle"):
        load_components(model)
    got, want = load_components(model, allow_pickle=True), load_components(tiny_sd1.folder)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(each, part).state_dict() for each in (got, want))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    single = convert(model, tmp_path / "single.safetensors", allow_pickle=True)
    assert load_file(single).keys() == load_file(convert(tiny_sd1.folder, tmp_path / "b.safetensors")).keys()


def test_conversion(tiny: Any, tmp_path: Path) -> None:
    """To a folder, and to safetensors, which loads without leave."""
    file = lightning(load_file(tiny.file), tmp_path / "canary", tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="allow_pickle"):
        convert(file, tmp_path / "folder")
    words = tiny.folder / "tokenizer"
    single = convert(file, tmp_path / "model.safetensors", tokenizer=words, allow_pickle=True)
    folder = convert(file, tmp_path / "folder", tokenizer=words, allow_pickle=True)
    want = load_components(tiny.file, tokenizer=words)
    for place in (single, folder):
        got = load_components(place)
        assert got.scheduler == want.scheduler
        for part in ("unet", "vae", "text_encoder"):
            ours, theirs = (getattr(each, part).state_dict() for each in (got, want))
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    with pytest.raises(InvalidArgument, match="destination"):
        convert(single, tmp_path / "again.safetensors", allow_pickle=True)
    with pytest.raises(InvalidArgument, match="destination"):
        convert(folder, tmp_path / "again", allow_pickle=True)


def test_the_command_line(mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": load_file(mini / "foreign.safetensors")}, file)
    options = ["--tokenizer", str(mini / "folder" / "tokenizer")]
    picture = ["generate", "a red cat", "--model", str(file), *options, "--steps", "1", "--width", "8"]
    picture += ["--height", "8", "--quiet", "-o", str(tmp_path / "out.png")]
    for command in (["info", str(file)], picture, ["convert", str(file), str(tmp_path / "folder"), *options]):
        assert cli.main(command) == 2
        assert "--allow-pickle" in capsys.readouterr().err
        assert cli.main([*command, "--allow-pickle"]) == 0, capsys.readouterr().err
    assert (tmp_path / "out.png").exists() and (tmp_path / "folder" / "model_index.json").exists()
    assert cli.main(["info", str(tmp_path / "out.png")]) == 0  # with the hash of its model
    assert sha256(file)[:10] in capsys.readouterr().out


# What is refused. Nothing here may run code, take long or hang.


def refused(file: Path, why: str, key: str | None = None) -> None:
    """The file is a CheckpointError that says why, soon."""
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        load_components(file, allow_pickle=True)
    assert time.process_time() - started < SECONDS
    assert why in caught.value.why and caught.value.file == str(file), caught.value
    assert key is None or caught.value.key == key
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def archive(file: Path, program: bytes, records: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A zip as torch.save writes it, of this data.pkl and these other records."""
    with zipfile.ZipFile(file, "w", **options) as made:
        made.writestr("archive/data.pkl", program)
        for name, content in (records or {}).items():
            made.writestr(f"archive/{name}", content)
    return file


def described(
    shape: Any, stride: Any, *, offset: Any = 0, count: Any = 4, kind: str = "FloatStorage"
) -> bytes:
    """The data.pkl of {"a": a tensor of record 0}, with anything as its numbers."""

    def push(value: Any) -> bytes:
        return pickle.dumps(value, 2)[2:-1].replace(b"q\x00", b"").replace(b"q\x01", b"")

    storage = b"(" + push("storage") + f"ctorch\n{kind}\n".encode() + push("0") + push("cpu") + push(count)
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage[1:] + b"tQ" + push(offset) + push(shape)
    return b"\x80\x02}" + push("a") + tensor + push(stride) + b"\x89N" + b"tRs."


def test_the_description_above_is_right(tmp_path: Path) -> None:
    data = torch.arange(4.0).numpy().tobytes()
    file = archive(tmp_path / "x.pt", described((2, 2), (2, 1)), {"data/0": data})
    assert read_tensor(PickleFile(file).entries["a"]).tolist() == [[0, 1], [2, 3]]


BIG = 1 << 62
TENSORS = {
    "strides": (described((2, 2), (1, 2)), "is stored with strides [1, 2]"),
    "stride-0": (described((1 << 20, 1 << 20), (0, 0)), "is stored with strides"),
    "too-many": (described((8,), (1,)), "needs bytes 0 to 32 of 16; its record has 16"),
    "offset": (described((4,), (1,), offset=1), "needs bytes 4 to 20"),
    "negative-offset": (described((4,), (1,), offset=-1), "has an impossible shape"),
    "negative": (described((-4,), (1,)), "has an impossible shape"),
    "huge": (described((BIG, BIG), (BIG, 1)), "has the impossible shape"),
    "endless": (described((1 << 200,), (1,)), "has an impossible shape"),
    "rank": (described((1,) * 9, (1,) * 9), "has the impossible shape"),
    "ranks": (described((2, 2), (1,)), "has the impossible shape"),
    "words": (described(("a",), (1,)), "has an impossible shape"),
    "fraction": (described((4,), (1,), count=4.0), "has an impossible shape"),
    "count": (described((4,), (1,), count=400), "of 1600; its record has 16"),
    "dtype": (described((4,), (1,), kind="QInt8Storage"), "a dtype that fastldm does not know: torch.QInt8"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_impossible_tensors(tmp_path: Path, case: str) -> None:
    program, why = TENSORS[case]
    refused(archive(tmp_path / "x.ckpt", program, {"data/0": bytes(16)}), why, "a")


def test_missing_records_and_other_machines(tmp_path: Path) -> None:
    program = described((4,), (1,))
    refused(archive(tmp_path / "a.ckpt", program), "is in the record '0', which is missing", "a")
    big = {"data/0": bytes(16), "byteorder": b"big"}
    refused(archive(tmp_path / "b.ckpt", program, big), "is not little", "archive/byteorder")


def many(file: Path, count: int) -> Path:
    """A file of so many tensors that share one record."""
    torch.save(dict.fromkeys((f"key{i}" for i in range(count)), torch.ones(1)), file)
    return file


def test_programs_that_are_none(tmp_path: Path) -> None:
    laughs = b"\x80\x04)" + b"\x94h\x00\x86" + b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(1, 60))
    # Tuples of the same tuple twice, sixty times over: as a shape, a name, a key, and in a set.
    cases = {
        "no-end": (b"\x80\x02}", "is no program"),
        "empty": (b"", "is no program"),
        "nothing": (b"\x80\x02.", "the stack is empty"),
        "below": (b"\x80\x02(a.", "the stack is empty"),
        "memo": (b"\x80\x02h\x07.", "KeyError"),
        "memo-size": (b"\x80\x02}r\xff\xff\xff\xff.", "holds no tensors"),
        "unknown": (b"\x80\x02\xff.", "is no program"),
        "digits": (b"\x80\x02I" + b"9" * 100_000 + b"\n.", "is no program"),
        "list": (b"\x80\x02].", "holds no tensors"),
        "object": (pickle.dumps(Tokenizer.__new__(Tokenizer), 2), "holds no tensors"),
        "state": (pickle.dumps({"state_dict": [1]}, 2), "holds no tensors"),
        "laughs-key": (b"\x80\x02}" + laughs[2:] + b"Ns.", "holds no tensors"),
        "laughs-set": (b"\x80\x04\x8f(" + laughs[2:] + b"\x90.", "holds no tensors"),
        "laughs-name": (laughs + b"\x8c\x01a\x93.", "holds no tensors"),
        "laughs-end": (laughs + b".", "holds no tensors"),
        "deep": (b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".", "holds no tensors"),
        "long": (b"\x80\x02" + b"N0" * MAX_OPERATIONS + b".", "operations"),
        "names": (b"\x80\x02" + b"ca\nb\n" * MAX_OPERATIONS + b".", "more than 50000 names"),
        "bytes": (b"\x80\x02" + b"N" * (16 << 20) + b".", "the limit is 16777216"),
        "length": (b"\x80\x02X\xff\xff\xff\x7fabc.", "is no program"),
        "length64": (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "is no program"),
        "bytearray": (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "is no program"),
    }
    for name, (program, why) in cases.items():
        refused(archive(tmp_path / f"{name}.ckpt", program), why)
    laughing = described((4,), (1,)).replace(b"K\x04\x85", laughs[2:] + b"\x85")
    assert len(laughing) > len(laughs)
    refused(
        archive(tmp_path / "laughs.ckpt", laughing, {"data/0": bytes(16)}), "has an impossible shape", "a"
    )
    refused(many(tmp_path / "many.pt", 20_001), "holds 20001 tensors; the limit is 20000")
    assert len(PickleFile(many(tmp_path / "many.pt", 20_000)).entries) == 20_000
    for key in ("x" * 513, "a\nb"):
        torch.save({key: torch.ones(1)}, tmp_path / "names.pt")
        refused(tmp_path / "names.pt", "has an unusable name")


def test_names_put_together_are_counted_and_bounded() -> None:
    """From strings that the program keeps, each name costs it five bytes."""
    word = b"\x80\x04X" + struct.pack("<L", 100_000) + b"a" * 100_000 + b"\x94"
    tracemalloc.start()
    try:
        Machine().run(word + b"]" + b"h\x00h\x00\x93a" * 300 + b".")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(ValueError, match="more than 50000 names"):
        Machine().run(b"\x80\x04\x8c\x01a\x94" + b"h\x00h\x00\x930" * 60_000 + b"N.")


def test_archives_that_are_not_plain(tmp_path: Path) -> None:
    program, records = described((4,), (1,)), {"data/0": bytes(16)}
    packed = archive(tmp_path / "packed.ckpt", program, records, compression=zipfile.ZIP_DEFLATED)
    refused(packed, "is compressed", "archive/data.pkl")
    bomb = {"data/0": bytes(1 << 28)}
    bomb_file = archive(tmp_path / "bomb.ckpt", program, bomb, compression=zipfile.ZIP_DEFLATED)
    assert bomb_file.stat().st_size < 1 << 20
    refused(bomb_file, "is compressed")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "twice.ckpt", "w") as made:
        for _ in range(2):
            made.writestr("archive/data.pkl", program)
    refused(tmp_path / "twice.ckpt", "appears twice", "archive/data.pkl")
    plain = archive(tmp_path / "plain.ckpt", program, records).read_bytes()
    at = plain.index(b"PK\x01\x02", plain.index(b"PK\x01\x02") + 4)
    first, end = plain.index(b"PK\x01\x02"), plain.index(b"PK\x05\x06")

    def changed(name: str, *changes: tuple[int, bytes]) -> Path:
        content = bytearray(plain)
        for place, value in changes:
            content[place : place + len(value)] = value
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    sizes = struct.pack("<2L", 400, 400)
    refused(changed("overlap.ckpt", (at + 20, sizes)), "overlaps the directory", "archive/data/0")
    long = struct.pack("<2L", len(program) + 60, len(program) + 60)
    refused(changed("inside.ckpt", (first + 20, long)), "overlaps archive/data.pkl", "archive/data/0")
    refused(changed("encrypted.ckpt", (at + 8, b"\x01\0")), "is encrypted", "archive/data/0")
    refused(changed("elsewhere.ckpt", (at + 42, bytes(4))), "another record at byte 0", "archive/data/0")
    refused(changed("nowhere.ckpt", (at + 42, b"\x09\0\0\0")), "no record at byte 9", "archive/data/0")
    refused(changed("beyond.ckpt", (at + 42, b"\xff" * 4)), "its zip64 field", "archive/data/0")
    refused(changed("directory.ckpt", (end + 16, b"\xff\xff\xff\x7f")), "is damaged: a directory of")
    refused(changed("listing.ckpt", (first, b"XXXX")), "its directory is no list of records")
    (tmp_path / "cut.ckpt").write_bytes(plain[:-30])
    refused(tmp_path / "cut.ckpt", "is truncated")
    with zipfile.ZipFile(tmp_path / "other.ckpt", "w") as made:
        made.writestr("word/document.xml", "<x/>")
    refused(tmp_path / "other.ckpt", "none that torch.save wrote")


def test_other_pickles_are_refused_by_name(tmp_path: Path) -> None:
    old = tmp_path / "old.ckpt"
    torch.save({"state_dict": {"a": torch.ones(2)}}, old, _use_new_zipfile_serialization=False)
    refused(old, "is a pickle of PyTorch before 1.6")
    bare = tmp_path / "bare.ckpt"
    bare.write_bytes(pickle.dumps({"a": [1.0]}))
    refused(bare, "is a pickle")
    with pytest.raises(CheckpointError, match="loads no pickles here"):
        lora = tmp_path / "lora.safetensors"
        torch.save({"a": torch.ones(2)}, lora)
        MergedLoras().read(lora, 1.0)


def test_30_pickles_run_no_code(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    number = 0
    for protocol in range(6):
        for content in (Evil(canary), {"state_dict": Evil(canary)}, [Evil(canary)] * 3):
            plain = tmp_path / f"plain{number}.ckpt"
            plain.write_bytes(pickle.dumps(content, protocol))
            packed = archive(tmp_path / f"packed{number}.ckpt", pickle.dumps(content, protocol))
            for file in (plain, packed):
                for use in (load_components, inspect):
                    with pytest.raises(CheckpointError):
                        use(file, allow_pickle=True)
            number += 1
    with io.BytesIO() as buffer:  # torch itself would run it
        torch.save({"state_dict": {"a": torch.ones(1)}, "callbacks": Evil(canary)}, buffer)
        (tmp_path / "mixed.ckpt").write_bytes(buffer.getvalue())
    assert open_weights(tmp_path / "mixed.ckpt", True).entries.keys() == {"a"}
    assert not canary.exists()


def check_mutations(mini: Path, tmp_path: Path, count: int) -> None:
    """Damaged copies of a checkpoint: loaded or refused, soon, whatever the damage; never another error."""
    words = Tokenizer.from_folder(mini / "folder" / "tokenizer")
    file, chance = tmp_path / "x.ckpt", random.Random(count)
    torch.save({"state_dict": load_file(mini / "foreign.safetensors"), "epoch": 3}, file)
    whole = file.read_bytes()
    program = whole.index(b"PK\x03\x04", 4)
    directory = whole.index(b"PK\x01\x02")
    refusals = 0
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 5))):
            low, high = chance.choice(((0, program), (0, program), (directory, len(whole)), (0, len(whole))))
            place = min(chance.randrange(low, high), len(data) - 1)
            kind = chance.randrange(4)
            if kind == 0:
                data[place] ^= 1 << chance.randrange(8)
            elif kind == 1:
                data[place] = chance.choice(b"\x00\x01\xff.(t}]RQbcXKJMhqr02")
            elif kind == 2:
                length = chance.choice((1, 2, 4, 8))
                data[place : place + length] = bytes(chance.randrange(256) for _ in range(length))
            elif chance.random() < 0.2:
                del data[place + 1 :]
        file.write_bytes(data)
        started = time.process_time()
        try:
            load_components(file, tokenizer=words, allow_pickle=True)
        except CheckpointError as error:
            refusals += 1
            assert str(file) in error.file and "\n" not in str(error)
        assert time.process_time() - started < SECONDS
    assert refusals > count / 3


def test_300_mutated_files(mini: Path, tmp_path: Path) -> None:
    check_mutations(mini, tmp_path, 300)


@pytest.mark.long
def test_5000_mutated_files(mini: Path, tmp_path: Path) -> None:
    check_mutations(mini, tmp_path, 5000)
