"""`fastldm bench`: what it refuses before any work, what it prints, and files that are whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from fastldm.bench import command
from fastldm.bench.plot import draw
from fastldm.bench.race import Row, Table

TABLES = [
    Table(
        "Guided step of a model",
        "GFLOP/s",
        5,
        {
            "fastldm": Row(1.0, 1.1, 1.2, 1.0, 50.0, 1e-3, 1e-4),
            "diffusers, channels last": Row(2.0, 2.1, 2.2, 1.9, 25.0, 1e-3, 1e-4),
            "diffusers, torch.compile": Row(failed="wrong: error 1, allowed 0.1"),
        },
    ),
    Table("Peak memory", "", 1, {"fastldm": Row(bytes={"process": 2**30})}),
    Table(
        "Cost",
        "",
        3,
        {
            "fastldm": Row(
                curves={"batch": [(1, 0.1), (2, 0.2)], "pixels": [(64.0, 0.1)]},
                exponents={"batch": 1.0, "pixels": 0.0},
            )
        },
    ),
]


@pytest.fixture
def raced(monkeypatch, tmp_path):
    """Tables without a race; what was asked for."""
    asked = []
    monkeypatch.setattr(command, "measure", lambda **options: asked.append(options) or iter(TABLES))
    monkeypatch.chdir(tmp_path)
    return asked


def test_tables_are_printed_written_and_drawn(raced, run):
    options = ("--model", "sd15", "--rounds", 3, "--minutes", 0.5, "--contenders", "fastldm,compile")
    code, out, _ = run("bench", "step", "growth", *options, "--json", "b.json", "--plot", "b.png")
    assert code == 0
    asked = {name: value for name, value in raced[0].items() if name != "say"}
    assert asked == {
        "parts": ["step", "growth"],
        "model": "sd15",
        "rounds": 3,
        "minutes": 0.5,
        "contenders": "fastldm,compile",
    }
    assert "diffusers, torch.compile wrong: error 1, allowed 0.1" in out
    assert "torch" in out.splitlines()[-1]  # the machine
    kept = json.loads(Path("b.json").read_text())
    assert kept["machine"]["cpu"] and [table["title"] for table in kept["tables"]] == [
        table.title for table in TABLES
    ]
    assert kept["tables"][2]["rows"]["fastldm"]["curves"]["batch"] == [[1, 0.1], [2, 0.2]]
    with Image.open("b.png") as picture:
        assert picture.width == 1200 and picture.height > 800
    assert sorted(os.listdir()) == ["b.json", "b.png"]


def test_bars_are_as_long_as_their_times():
    picture = draw(TABLES[:1], "a machine")
    blue, grey = ((18, 107, 196), (120, 128, 140))
    lengths = [sum(pixel == colour for pixel in picture.get_flattened_data()) for colour in (blue, grey)]
    assert lengths[0] / lengths[1] == pytest.approx(1.1 / 2.1, rel=0.01)


def test_both_files_are_written_or_none(raced, fails, monkeypatch, capsys):
    Path("results").mkdir()

    def race(**options):
        yield TABLES[0]
        Path("results").rmdir()  # meanwhile

    monkeypatch.setattr(command, "measure", race)
    with pytest.raises(AssertionError):  # the tables were printed all the same
        fails("bench", "--json", "b.json", "--plot", "results/b.png")
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["paint"], "part='paint': allowed is one of step, vae, image, cold, growth, memory"),
        (["--contenders", "fastldm,tensorrt"], "contenders='tensorrt': allowed is one of fastldm"),
        (["--dtype", "fp8"], "dtype='fp8': allowed is one of fp32, bf16, fp16"),
        (["--device", "tpu"], "device='tpu': allowed is one of cpu"),
        (["--rounds", "0"], "rounds=0: allowed is an integer 1"),
        (["--minutes", "-1"], "minutes=-1.0: allowed is a number 0.0"),
        (["--minutes", "nan"], "minutes=nan: allowed is a number 0.0"),
        (["--steps", "0"], "steps=0: allowed is an integer 1"),
        (["--batch", "65"], "batch=65: allowed is an integer 1"),
        (["--size", "100"], "size=100: allowed is a multiple of"),
        (["--model", "./none"], "there is no such file or folder"),
        (["--json", "none/b.json"], "json='none/b.json': allowed is a file in a folder that exists"),
        (["--plot", "."], "plot='.': allowed is a file in a folder that exists"),
        (["--rounds", "many"], "invalid int value"),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, list) else "",
)
def test_what_is_refused(fails, tmp_path, monkeypatch, options, named):
    monkeypatch.chdir(tmp_path)
    assert named in fails("bench", *options)
    assert os.listdir() == []
