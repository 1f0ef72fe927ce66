"""Contenders at one piece of work: started, held to the truth, then ready to race."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastldm.bench import clocks, contenders
from fastldm.bench.cases import Case, Model
from fastldm.bench.models import operations
from fastldm.bench.process import Failed, Worker
from fastldm.bench.race import Error, Race, Row, Table, seconds

ALLOWED = 1.2  # times the RMS error of plain PyTorch in the same dtype
LARGEST = 2.0  # times its largest error, one number's luck: 1.3 times at equal RMS has been seen
# Float32 is its own truth, up to sums in another order; pictures add the steps' up.
FLOAT32 = {"step": 1e-5, "vae": 1e-5, "image": 1e-4}
NUMBERS = 2**15  # that the error is taken over at least, or its largest would be luck
PICTURES = 2
ON_GPU_CALLS = 10  # in a row, where one call is too short for the clock
WARM_UP = 3


@dataclass(frozen=True)
class Setup:
    """What is asked for, the same in every part. `say` is told how far things are."""

    model: Model
    device: str
    dtype: str
    contenders: Sequence[str]  # as in `contenders.CONTENDERS`' values; the first is that of the ratios
    rounds: int
    minutes: float
    steps: int = 25
    say: Callable[[str], None] = lambda text: None

    @property
    def plain(self) -> str:
        """Whose float32 is the truth: diffusers, an independent program, where it is installed."""
        for name in (contenders.CHANNELS_LAST, contenders.EAGER):
            if name in self.contenders:
                return name
        absent = contenders.missing(contenders.CHANNELS_LAST)
        return contenders.REFERENCE if absent else contenders.CHANNELS_LAST

    def load(self, contender: str, part: str, dtype: str | None = None) -> dict[str, Any]:
        """The order that loads a contender."""
        options = {"steps": self.steps} if part == "image" else {"rounded": self.dtype}
        model = asdict(self.model)
        place = {"device": self.device, "dtype": dtype or self.dtype}
        return {"contender": contender, "part": part, "model": model, **place, **options}


def made(worker: Worker, case: Case, samples: int) -> tuple[Tensor, float]:
    """What a loaded contender computes of so many inputs, and the seconds of the first of its calls."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "made.pt"
        reply = worker.ask("exact", samples=samples, file=str(file), **asdict(case))
        return torch.load(file), reply["first"]


class Judge:
    """The truth of a part, computed in float32 by the setup's plain program, and what a result may be off."""

    def __init__(self, setup: Setup, part: str, case: Case, worker: Worker) -> None:
        setup.say(f"{part}: the truth, by {setup.plain} in float32")
        self.case, self.samples = case, samples_of(setup, part, case)
        worker.ask("load", **setup.load(setup.plain, part, "float32"))
        self.truth, _ = made(worker, case, self.samples)
        self.largest = self.rms = FLOAT32[part]
        if setup.dtype != "float32":
            worker.ask("load", **setup.load(setup.plain, part))
            plain = Error.of(made(worker, case, self.samples)[0], self.truth)
            # In a picture an edge may fall elsewhere; there the sum counts.
            self.largest = 1.0 if part == "image" else LARGEST * plain.largest
            self.rms = ALLOWED * plain.rms

    def of(self, worker: Worker) -> tuple[Error, str | None, float]:
        """The error of a loaded contender, why it is wrong if it is, and the seconds of its first call."""
        result, first = made(worker, self.case, self.samples)
        error = Error.of(result, self.truth)
        if error.within(self.largest, self.rms):
            return error, None, first
        found, allowed = (f"{each.largest:.1e}, rms {each.rms:.1e}" for each in (error, self))
        return error, f"wrong: error {found}; allowed {allowed}", first


def samples_of(setup: Setup, part: str, case: Case) -> int:
    """How many inputs an error is taken over."""
    if part == "image":
        return PICTURES
    if part == "vae":
        return 1
    side = case.side // setup.model.factor
    return -(-NUMBERS // (2 * case.batch * setup.model.in_channels * side**2))


class Lineup:
    """Those of a setup that agree with the truth, ready; `errors` of all, `failed` of those that are out."""

    def __init__(self, setup: Setup, part: str, case: Case, stack: ExitStack) -> None:
        self.setup, self.part, self.case = setup, part, case
        self.errors: dict[str, Error] = {}
        self.failed: dict[str, str] = {}
        self.first: dict[str, float] = {}  # seconds of the first call
        self.clocks = clocks.Clocks()
        self.workers: dict[str, Worker] = {}
        for name in dict.fromkeys((*setup.contenders, setup.plain)):
            self.workers[name] = Worker()
            stack.callback(self.workers[name].close)
        judge = Judge(setup, part, case, self.workers[setup.plain])
        for name in setup.contenders:
            setup.say(f"{part}: {name}")
            try:
                self.workers[name].ask("load", **setup.load(name, part))
                self.errors[name], wrong, self.first[name] = judge.of(self.workers[name])
            except Failed as failure:
                wrong = f"failed: {failure}"
            if wrong is not None:
                self.failed[name] = wrong
        racing = [name for name in setup.contenders if name not in self.failed]
        for name in self.workers.keys() - set(racing):
            self.workers.pop(name).close()
        self.parts: dict[str, list[dict[str, float]]] = {name: [] for name in racing}
        for name in racing * WARM_UP if setup.device != "cpu" else ():
            self._time(name)
        for parts in self.parts.values():
            parts.clear()
        self.race = Race({name: partial(self._time, name) for name in racing})

    def _time(self, name: str) -> float:
        """Seconds of one call; a picture of its own in every round."""
        is_image = self.part == "image"
        sample = PICTURES + len(self.parts[name]) if is_image else 0
        calls = 1 if is_image or self.setup.device == "cpu" else ON_GPU_CALLS
        reply = self.workers[name].ask("time", sample=sample, calls=calls, **asdict(self.case))
        self.parts[name].append(reply["parts"])
        return reply["seconds"]

    def run(self) -> None:
        """Race for the rounds and minutes of the setup."""
        self.setup.say(f"{self.part}: {'; '.join(self.race.timers) or 'nobody is right'}")
        with clocks.watched() as self.clocks:
            self.race.run(self.setup.rounds, 60 * self.setup.minutes)

    def table(self, title: str) -> Table:
        """What came of it, the contenders in the order in which they were named."""
        work = 0.0 if self.part == "image" else operations(self.part, self.setup.model, self.case) / 1e9
        raced, drop = self.race.rows(work, self.errors), self.clocks.drop
        if drop > clocks.ALLOWED_DROP:
            raced = {name: Row(failed=f"no time: the GPU's clock fell by {drop:.0%}") for name in raced}
        rows = {}
        for name in self.setup.contenders:
            if name in self.failed:
                rows[name] = Row(failed=self.failed[name])
            else:
                rows[name] = replace(raced[name], parts=medians(self.parts[name]))
        notes = [f"{name}: the first call took {seconds(self.first[name])}" for name in raced]
        if self.setup.device != "cpu" and self.part != "image":
            for name, worker in self.workers.items():
                count = worker.ask("kernels", **asdict(self.case))["kernels"]
                notes.append(f"{name}: {count} kernels and copies a call")
        if self.clocks.samples:
            notes.append(f"the GPU at {self.clocks}")
        return Table(title, "GFLOP/s" if work else "", self.race.rounds, rows, notes)


@contextmanager
def lined_up(setup: Setup, part: str, case: Case) -> Iterator[Lineup]:
    """A lineup for a race within the block. Failed where the truth cannot be had."""
    with ExitStack() as stack:
        yield Lineup(setup, part, case, stack)


def medians(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each part over the rounds."""
    return {name: median(each[name] for each in found) for name in found[0]} if found else {}
