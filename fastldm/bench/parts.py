"""The parts of the benchmark, each alone: a setup in, tables out."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from statistics import median

from fastldm.bench.cases import Case
from fastldm.bench.contenders import AUTOTUNED, COMPILED, UNFUSED
from fastldm.bench.lineup import Judge, Setup, lined_up, medians
from fastldm.bench.process import Failed, Worker
from fastldm.bench.race import Error, Race, Row, Table

BATCHES = (1, 2, 4, 8)
SIZES = (0.5, 0.75, 1.0, 1.5)  # of the model's own side
COLD_ROUNDS = 3
COMPILERS = (COMPILED, AUTOTUNED, UNFUSED)  # growth would compile them anew at every size
TITLES = {"step": "Guided step of the UNet", "vae": "Decode of the autoencoder", "image": "Picture"}


def title(what: str, setup: Setup, case: Case) -> str:
    """What a table is of; `what` is a value of `TITLES` or alike."""
    steps = f" in {setup.steps} steps" if "icture" in what else ""
    pictures = f", {case.batch} pictures" if case.batch > 1 else ""
    size = f"{case.side}x{case.side}{pictures}"
    return f"{what} of {setup.model.name}{steps}, {size}, {setup.dtype}, {setup.device}"


def race(part: str) -> Callable[[Setup, Case], Iterator[Table]]:
    """The part that is one race."""

    def run(setup: Setup, case: Case) -> Iterator[Table]:
        with lined_up(setup, part, case) as lineup:
            lineup.run()
            yield lineup.table(title(TITLES[part], setup, case))

    return run


def cold(setup: Setup, case: Case) -> Iterator[Table]:
    """From process start to the first picture, without caches and with those of the process before; a later
    picture; the first one of another size.
    """
    worker = Worker()
    try:
        judge = Judge(setup, "image", case, worker)
    finally:
        worker.close()
    starts: dict[str, list[dict[str, float]]] = {}
    errors: dict[str, Error] = {}
    failed: dict[str, str] = {}
    rounds = min(setup.rounds, COLD_ROUNDS)
    for _ in range(rounds):
        for name in setup.contenders:
            with tempfile.TemporaryDirectory() as caches:
                for state in ("empty", "warm"):
                    entry = f"{name}, {state} caches"
                    setup.say(f"cold: {entry}")
                    worker = Worker(_caches_in(caches))
                    try:
                        starts.setdefault(entry, []).append(_from_start(setup, name, case, worker))
                        errors[entry], wrong, _ = judge.of(worker)
                    except Failed as failure:
                        wrong = f"failed: {failure}"
                    finally:
                        worker.close()
                    if wrong is not None:
                        failed[entry] = wrong
    right = {entry: found for entry, found in starts.items() if entry not in failed}
    timed = Race({})
    timed.times = {entry: [start.pop("total") for start in found] for entry, found in right.items()}
    rows = {
        entry: replace(row, parts=medians(right[entry])) for entry, row in timed.rows(errors=errors).items()
    }
    rows |= {entry: Row(failed=why) for entry, why in failed.items()}
    yield Table(title("From process start to the first picture", setup, case), "", rounds, rows)


def _caches_in(folder: str) -> dict[str, str]:
    """The environment of a process that finds and leaves what it compiles in this folder."""
    names = {"FASTLDM_CACHE": "fastldm", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    return {variable: f"{folder}/{name}" for variable, name in names.items()}


def _from_start(setup: Setup, name: str, case: Case, worker: Worker) -> dict[str, float]:
    """Seconds of the stages of a fresh process; `total` is up to the first picture."""
    other = Case(case.batch, _sized(setup, 0.75 * case.side))
    loaded = worker.ask("load", **setup.load(name, "image"))
    first, _, later = (worker.ask("time", sample=n, **asdict(case)) for n in range(3))
    anew, again = (worker.ask("time", sample=n, **asdict(other)) for n in range(2))
    return {
        "total": first["moment"] - worker.began,
        "import": loaded["imported"] - worker.began,
        "load": first["moment"] - first["seconds"] - loaded["imported"],
        "first picture": first["seconds"],
        "a later one": later["seconds"],
        "the first of another size": anew["seconds"],
        "a later one of it": again["seconds"],
    }


def _sized(setup: Setup, side: float) -> int:
    """About so many pixels, which every network's levels divide."""
    step = setup.model.multiple
    return max(step, round(side / step) * step)


def memory(setup: Setup, case: Case) -> Iterator[Table]:
    """Peaks of a process that loads the model, then makes a picture."""
    rows = {}
    for name in setup.contenders:
        setup.say(f"memory: {name}")
        worker = Worker()
        try:
            loaded = worker.ask("load", **setup.load(name, "image"))["bytes"]
            done = worker.ask("time", sample=0, **asdict(case))["bytes"]
        except Failed as failure:
            rows[name] = Row(failed=f"failed: {failure}")
            continue
        finally:
            worker.close()
        told = {f"{what}, model loaded": size for what, size in loaded.items()}
        rows[name] = Row(bytes=told | {f"{what}, picture made": size for what, size in done.items()})
    yield Table(title("Peak memory of a picture", setup, case), "", 1, rows)


def growth(setup: Setup, case: Case) -> Iterator[Table]:
    """A step's cost over the pictures at once, and over their pixels; the exponent of each."""
    names = [name for name in setup.contenders if name not in COMPILERS]
    sides = sorted({_sized(setup, share * setup.model.side) for share in SIZES})
    cases = [("batch", batch, Case(batch, case.side)) for batch in BATCHES]
    cases += [("pixels", side**2, Case(1, side)) for side in sides]
    each = replace(setup, contenders=names, minutes=setup.minutes / len(cases))
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in names}
    errors: dict[str, list[Error]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for what, size, sized in cases:
        with lined_up(each, "step", sized) as lineup:
            lineup.run()
            failed |= {name: f"{what} {size}, {why}" for name, why in lineup.failed.items()}
            for name, spent in lineup.race.times.items():
                curves[name].setdefault(what, []).append((size, median(spent)))
                errors[name].append(lineup.errors[name])
    rows = {name: Row(failed=why) for name, why in failed.items()}
    for name in [name for name in names if name not in failed]:
        rows[name] = Row(
            error=max(error.largest for error in errors[name]),
            rms=max(error.rms for error in errors[name]),
            curves=curves[name],
            exponents={what: exponent(points) for what, points in curves[name].items()},
        )
    yield Table(title("Cost of a step", setup, case), "", setup.rounds, rows)


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The b of cost = a sizeᵇ by least squares of the logarithms."""
    logs = [(math.log(size), math.log(spent)) for size, spent in points]
    middle = [sum(each) / len(logs) for each in zip(*logs, strict=True)]
    shared = sum((x - middle[0]) * (y - middle[1]) for x, y in logs)
    return shared / sum((x - middle[0]) ** 2 for x, _ in logs)


PARTS: dict[str, Callable[[Setup, Case], Iterator[Table]]] = {
    "step": race("step"),
    "vae": race("vae"),
    "image": race("image"),
    "cold": cold,
    "growth": growth,
    "memory": memory,
}
NEED_TEXT = ("image", "cold", "memory")  # whole pictures
