"""`fastldm bench`: what to race is checked, then raced, printed, written and drawn."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastldm import checks
from fastldm.bench import contenders, machine
from fastldm.bench.cases import Case
from fastldm.bench.lineup import Setup
from fastldm.bench.models import open_model
from fastldm.bench.parts import NEED_TEXT, PARTS
from fastldm.bench.plot import draw
from fastldm.bench.process import Failed
from fastldm.bench.race import Table
from fastldm.bench.report import as_json, check_file, say
from fastldm.errors import FastLDMError, InvalidArgument
from fastldm.images import encode_png, write_files

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ROUNDS, MINUTES = 20, 5.0


def run(
    *,
    parts: Sequence[str] = (),
    json_file: str | None = None,
    plot: str | None = None,
    **asked: Any,
) -> None:
    """Race, and print each table as it is ready, the machine last; `asked` as in `measure`.

    The files are written at the end, whole or not at all. InvalidArgument before any work.
    """
    for name, file in (("json", json_file), ("plot", plot)):
        check_file(name, file)
    tables = []
    for table in measure(parts=parts, say=say, **asked):
        tables.append(table)
        print(table, end="\n\n", flush=True)
    facts = machine.describe()
    print(machine.headline(facts))
    files: dict[Path, bytes] = {}
    if json_file is not None:
        found = {"machine": facts, "tables": [asdict(table) for table in tables]}
        files[Path(json_file)] = as_json(found)
    if plot is not None:
        files[Path(plot)] = encode_png(draw(tables, machine.headline(facts)))
    write_files(files)


def measure(
    *,
    parts: Sequence[str] = (),
    model: str = "default",
    dtype: str | None = None,
    device: str | None = None,
    contenders: Sequence[str] | str | None = None,
    rounds: int = ROUNDS,
    minutes: float = MINUTES,
    steps: int = 25,
    size: int | None = None,
    batch: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Table]:
    """The tables of these parts (None named: all that the model has), each as it is ready.

    model: as in `models.open_model`; contenders: names of `contenders.CONTENDERS`; rounds: at most, and as
    many as fit into `minutes` a part; size: pixels along a side.
    """
    for part in parts:
        checks.choice("part", part, tuple(PARTS))
    checks.integer("rounds", rounds, 1, 10_000)
    checks.number("minutes", minutes, 0.0, 1e6)
    checks.integer("steps", steps, 1, 1000)
    checks.integer("batch", batch, 1, 64)
    place = _device(device)
    kind = _dtype(dtype, place)
    names = _contenders(contenders, model, place)
    with tempfile.TemporaryDirectory(prefix="fastldm-bench-") as workshop:
        opened = open_model(model, getattr(torch, kind), Path(workshop))
        able = [part for part in PARTS if opened.has_text or part not in NEED_TEXT]
        for part in parts:
            if part not in able:
                raise InvalidArgument("part", part, f"one of {', '.join(able)}: {model} has no text encoder")
        side = checks.integer("size", opened.side if size is None else size, opened.multiple, 8192)
        if side % opened.multiple:
            raise InvalidArgument("size", side, f"a multiple of {opened.multiple}")
        setup = Setup(opened, place, kind, names, rounds, minutes, steps, say)
        for part in [part for part in PARTS if part in (parts or able)]:
            try:
                yield from PARTS[part](setup, Case(batch, side))
            except Failed as failure:
                raise FastLDMError(f"{part}: {failure}") from None


def _device(given: str | None) -> str:
    if given is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    allowed = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return checks.choice("device", given, allowed)


def _dtype(given: str | None, device: str) -> str:
    """As `fastldm.load` takes it."""
    if given is not None:
        return DTYPES[checks.choice("dtype", given, tuple(DTYPES))]
    return "bfloat16" if device == "cuda" else "float32"


def _contenders(given: Sequence[str] | str | None, model: str, device: str) -> list[str]:
    """By their full names, ours first; without a word all that can be had and do not take an hour."""
    known = contenders.CONTENDERS
    if given is None:
        short = ["fastldm", "reference", "channels-last", "compile"]
        if device == "cuda":
            short.insert(2, "eager")
            short += ["max-autotune"] if model == "sd15" else []
        return [known[name] for name in short if contenders.missing(known[name]) is None]
    names = given.split(",") if isinstance(given, str) else list(given)
    chosen = [known[checks.choice("contenders", name.strip(), tuple(known))] for name in names]
    for name in chosen:
        if (why := contenders.missing(name)) is not None:
            raise InvalidArgument("contenders", name, f"one that can run here; {why}")
    return list(dict.fromkeys(chosen))
