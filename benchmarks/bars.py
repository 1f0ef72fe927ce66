"""The issues' figures for whole models, beside what was got. They fail no test: idle machines are rare."""

from __future__ import annotations

from dataclasses import dataclass

from fastldm.bench.contenders import AUTOTUNED, CHANNELS_LAST, COMPILED, EAGER, OURS, UNFUSED
from fastldm.bench.race import Row, Table, seconds


@dataclass(frozen=True)
class Bar:
    """How many times as fast as a rival, or (rival None) in how many seconds; what must be, and the aim."""

    must: float
    aim: float | None = None
    rival: str | None = None

    def judge(self, table: Table) -> str:
        """What was wanted of a race's first contender and what was got."""
        ours, other = table.rows[OURS], table.rows.get(self.rival or OURS)
        if ours.median is None or other is None or other.ratio is None:
            return f"bar: {self.wanted}: not measured"
        got = ours.median if self.rival is None else other.ratio
        told = seconds(got) if self.rival is None else f"{got:.2f}"
        return f"bar: {self.wanted}: {told}, {self.verdict(got)}"

    @property
    def wanted(self) -> str:
        """In words."""
        if self.rival is None:
            return f"≤ {seconds(self.must)}" + (f" (aim {seconds(self.aim)})" if self.aim else "")
        return f"≥ {self.must:g} × {self.rival}" + (f" (aim {self.aim:g})" if self.aim else "")

    def verdict(self, got: float) -> str:
        """Whether so many times, or seconds, are enough."""
        met = got <= self.must if self.rival is None else got >= self.must
        return "met" if met else "MISSED"


# By model and part: issue 4's.
CPU: dict[tuple[str, str], list[Bar]] = {
    ("sd15", "step"): [Bar(1.35, 1.55, CHANNELS_LAST), Bar(1.35, 1.55, COMPILED)],
    ("sd15", "vae"): [Bar(1.2, None, CHANNELS_LAST)],
    ("default", "image"): [Bar(1.5, 2.0, CHANNELS_LAST)],
}
# By part of benchmarks/gpu.py, for an H200 in bfloat16.
GPU: dict[str, list[Bar]] = {
    "sd15-image": [Bar(0.170, 0.125), Bar(3.0, 5.0, EAGER)],
    "sd15-autotune": [Bar(1.15, 1.4, AUTOTUNED)],
    "sd15-autotune-unfused": [Bar(1.15, 1.4, UNFUSED)],
    "sd15-8-images": [Bar(8 / 9, 8 / 11)],
    "sd21-step": [Bar(1 / 80, 1 / 100)],
    "sdxl-step": [Bar(1.1, None, COMPILED)],
    "vae-512": [Bar(0.008, 0.005)],
}
# Issue 5's: a training step; the latents of pictures, cached.
ENCODER = "the encoder alone"
TRAINING, CACHING = Bar(1.0, 1.15, CHANNELS_LAST), Bar(0.9, None, ENCODER)
FIRST_OVER_LATER = 1.1
COLD_ON_GPU, NEW_SIZE_ON_GPU = Bar(30.0, 10.0), Bar(3.0, 1.0)


def of_cold(table: Table, on_gpu: bool = False) -> list[str]:
    """The bars of a cold start of ours with empty caches."""
    row = table.rows.get(f"{OURS}, empty caches", Row())
    if row.median is None:
        return ["bar: cold start: not measured"]
    if on_gpu:
        new = row.parts["the first of another size"] - row.parts["a later one of it"]
        got = (("cold start", COLD_ON_GPU, row.median), ("a new size costs", NEW_SIZE_ON_GPU, new))
        return [f"bar: {what} {bar.wanted}: {seconds(s)}, {bar.verdict(s)}" for what, bar, s in got]
    ratio = row.parts["first picture"] / row.parts["a later one"]
    verdict = "met" if ratio <= FIRST_OVER_LATER else "MISSED"
    return [f"bar: the first picture once loaded ≤ {FIRST_OVER_LATER} × a later one: {ratio:.2f}, {verdict}"]
