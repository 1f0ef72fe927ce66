"""Whole models on a GPU, for benchmarks/gpu.py: each part is a `fastldm bench` with issue 4's bars beside it.

The protocol is that of `fastldm.bench`: a process a contender, the same weights and inputs, in turn, and no
time for who is off the float32 truth or while the clock falls. fastldm's step and decode run as a captured
graph, whose replay has to be the plain call to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from benchmarks import bars
from fastldm.bench import contenders
from fastldm.bench.command import measure
from fastldm.bench.race import Row, Table

EXACT = ["fastldm", "reference", "eager", "channels-last", "compile"]
# What `measure` is asked. Each takes less than ten minutes with --minutes 2: most of it is torch.compile's.
PARTS: dict[str, dict[str, Any]] = {
    "sd15-step": {"parts": ["step"], "model": "sd15", "contenders": EXACT},
    "sd15-image": {"parts": ["image"], "model": "sd15", "contenders": EXACT},
    "sd15-autotune": {"parts": ["image"], "model": "sd15", "contenders": ["fastldm", "max-autotune"]},
    "sd15-autotune-unfused": {
        "parts": ["image"],
        "model": "sd15",
        "contenders": ["fastldm", "max-autotune-unfused"],
    },
    "sd15-8-images": {
        "parts": ["image"],
        "model": "sd15",
        "batch": 8,
        "contenders": ["fastldm", "channels-last"],
    },
    "sd15-growth": {"parts": ["growth"], "model": "sd15", "contenders": ["fastldm", "channels-last"]},
    "sd15-cold": {"parts": ["cold"], "model": "sd15", "contenders": ["fastldm", "channels-last"]},
    "sd15-memory": {
        "parts": ["memory"],
        "model": "sd15",
        "contenders": ["fastldm", "eager", "channels-last"],
    },
    "sd21-step": {"parts": ["step"], "model": "sd21", "contenders": EXACT},
    "sdxl-step": {"parts": ["step"], "model": "sdxl-shape", "contenders": EXACT},
    "vae-512": {"parts": ["vae"], "model": "sd15", "contenders": EXACT},
    "vae-1024": {"parts": ["vae"], "model": "sd15", "size": 1024, "contenders": EXACT},
}
RACING = 0.25  # of a part's time; the rest goes into loading, compiling and the truth


def run(part: str, budget: float, add: Callable[[dict[str, Any]], None], **changes: Any) -> None:
    """Run a part of `PARTS` in about `budget` seconds, telling `add` each table as it is ready."""
    asked = {"dtype": "bf16", "device": "cuda", "minutes": RACING * budget / 60, **PARTS[part], **changes}
    absent = {name: contenders.missing(contenders.CONTENDERS[name]) for name in asked["contenders"]}
    asked["contenders"] = [name for name, why in absent.items() if why is None]
    for table in measure(**asked):
        table.notes.extend(f"{name} is missing: {why}" for name, why in absent.items() if why is not None)
        judged = (
            bars.of_cold(table, on_gpu=True)
            if "cold" in asked["parts"]
            else [bar.judge(table) for bar in bars.GPU.get(part, ())]
        )
        table.notes.extend(judged)
        add(asdict(table))


def lines(found: Mapping[str, Any]) -> list[str]:
    """The tables of all parts that ran, as text."""
    return [str(table) for _, table in _tables(found)]


def wrong(found: Mapping[str, Any]) -> list[str]:
    """Where fastldm itself has no time: it is off, or failed."""
    return [
        f"{part}: {name} {row.failed}"
        for part, table in _tables(found)
        for name, row in table.rows.items()
        if row.failed is not None and name.startswith(bars.OURS)
    ]


def _tables(found: Mapping[str, Any]) -> Iterable[tuple[str, Table]]:
    for part in PARTS:
        for kept in found.get(part, ()):
            yield part, Table(**{**kept, "rows": {name: Row(**row) for name, row in kept["rows"].items()}})
