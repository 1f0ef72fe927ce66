"""Cells: the measurements that the tables are made of, and the file that keeps them."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from fastldm.bench.reproduction import nets
from fastldm.bench.reproduction.lab import Lab, Sampling
from fastldm.bench.reproduction.nets import Model
from fastldm.bench.reproduction.settings import FirstStage, Settings
from fastldm.bench.reproduction.statistics import precision_recall
from fastldm.checkpoint.atomic import replacing
from fastldm.errors import CheckpointError, FastLDMError, NonFiniteOutput
from fastldm.training.reconstruction import frechet_distance

Row = Mapping[str, Any]


class Cell(Protocol):
    """One measurement with one seed. Its name and seed find its row again."""

    @property
    def name(self) -> str: ...
    @property
    def seed(self) -> int: ...
    def flops(self, settings: Settings) -> tuple[float, float]:
        """Spent in training, and in evaluation."""

    def measure(self, lab: Lab) -> dict[str, Any]:
        """The numbers of its row. Going on from what was kept, OutOfTime where the minutes are up."""


@dataclass(frozen=True)
class Reconstruct:
    """Train an autoencoder; the PSNR of what it gives back, and how far that is from the renders."""

    stage: FirstStage
    seed: int

    @property
    def name(self) -> str:
        return self.stage.name

    def flops(self, settings: Settings) -> tuple[float, float]:
        one = nets.autoencoder_flops(settings, self.stage)
        return settings.autoencoder_flops, float(one * settings.samples)

    def measure(self, lab: Lab) -> dict[str, Any]:
        back, decibels = lab.reconstructions(self.stage, self.seed)
        return {"psnr": decibels, "distance": frechet_distance(lab.reference, back)}


@dataclass(frozen=True)
class Train:
    """Train a diffusion model; how many steps its budget paid for."""

    model: Model
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model.name} train"

    def flops(self, settings: Settings) -> tuple[float, float]:
        return settings.diffusion_flops, 0.0

    def measure(self, lab: Lab) -> dict[str, Any]:
        net, settings = lab.denoiser(self.model, self.seed), lab.settings
        batch, flops = settings.shape(self.model.factor).batch, nets.diffusion_flops(settings, self.model)
        return {
            "steps": nets.steps_of(settings.diffusion_flops, flops, batch),
            "batch": batch,
            "parameters": sum(parameter.numel() for parameter in net.parameters()),
        }


@dataclass(frozen=True)
class Sample:
    """Sample a model: Fréchet distance, precision, recall, how often the class is read, and the speed.

    They are held against renders as the model's autoencoder gives them back, so that they tell of the model
    alone; `distance_to_renders` is of both together.
    """

    model: Model
    sampling: Sampling
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model.name} {self.sampling.name}"

    def flops(self, settings: Settings) -> tuple[float, float]:
        rows = self.sampling.steps * (1 if self.sampling.guidance == 1 else 2)
        return 0.0, float(nets.diffusion_flops(settings, self.model) * rows * settings.samples)

    def measure(self, lab: Lab) -> dict[str, Any]:
        made = lab.samples(self.model, self.sampling, self.seed)
        reachable, _ = lab.reconstructions(FirstStage(self.model.factor), self.seed)
        return _compared(reachable, made.features, made.right) | {
            "distance_to_renders": frechet_distance(lab.reference, made.features),
            "pictures_a_second": len(made.features) / made.seconds,
        }


@dataclass(frozen=True)
class Renders:
    """Renders measured like samples: what a perfect model would reach, and how well the judge reads."""

    seed: int
    name: str = "renders"

    def flops(self, settings: Settings) -> tuple[float, float]:
        return 0.0, 0.0

    def measure(self, lab: Lab) -> dict[str, Any]:
        return _compared(lab.reference, *lab.renders(self.seed))


@dataclass(frozen=True)
class Bits:
    """The variational bound of a model of pixels."""

    model: Model
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model.name} bound"

    def flops(self, settings: Settings) -> tuple[float, float]:
        one = nets.diffusion_flops(settings, self.model)
        return 0.0, float(one * settings.timesteps * settings.bound_pictures)

    def measure(self, lab: Lab) -> dict[str, Any]:
        return lab.bound(self.model, self.seed)


@dataclass
class Results:
    """The rows of a JSON file; those of other settings or another judge are kept, and never looked at."""

    file: Path
    settings: str
    judge: str
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def open(cls, file: Path, settings: str, judge: str) -> Results:
        """CheckpointError for a file that is none of ours."""
        return cls(file, settings, judge, _read(file))

    def row(self, name: str, seed: int) -> Row | None:
        wanted = {"cell": name, "seed": seed, "settings": self.settings, "judge": self.judge}
        fits = (row for row in self.rows if all(row.get(key) == value for key, value in wanted.items()))
        return next(fits, None)

    def foreign(self) -> int:
        """How many rows are of other settings or of another judge."""
        ours = self.settings, self.judge
        return sum((row.get("settings"), row.get("judge")) != ours for row in self.rows)

    def add(self, cell: Cell, numbers: Mapping[str, Any]) -> None:
        """Append a row; the file is read anew and replaced as a whole, by one process at a time."""
        known = {"cell": cell.name, "seed": cell.seed, "settings": self.settings, "judge": self.judge}
        with _alone_in(self.file.parent):
            self.rows = [*_read(self.file), known | dict(numbers)]
            lines = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in self.rows)
            with replacing(self.file) as temporary:
                temporary.write_text(f'{{"rows": [\n{lines}\n]}}\n', encoding="utf-8")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Within the block no other process is in such a block of this folder."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)  # which gives the lock back


def _read(file: Path) -> list[Row]:
    if not file.exists():
        return []
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        if not all(isinstance(row["cell"], str) and isinstance(row["seed"], int) for row in rows):
            raise ValueError("a row without cell and seed")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(file, None, f"holds no rows of a reproduction: {error}") from None
    return list(rows)


def _compared(reference: Tensor, features: Tensor, right: Tensor) -> dict[str, float]:
    precision, recall = precision_recall(reference, features)
    return {
        "distance": frechet_distance(reference, features),
        "precision": precision,
        "recall": recall,
        "accuracy": float(right.mean()),
    }


def missing(cells: Iterable[Cell], results: Results) -> list[Cell]:
    """The cells that have no row yet, each once."""
    return [cell for cell in dict.fromkeys(cells) if results.row(cell.name, cell.seed) is None]


def run(
    cells: Sequence[Cell], lab: Lab, results: Results, facts: Callable[[], Mapping[str, Any]]
) -> list[str]:
    """Measure the missing cells in turn and add a row for each; what failed, a line each.

    A cell that fails leaves the file as it was, and the others go on. OutOfTime goes through. `facts` of the
    machine go into every row, as do the seconds spent on the cell, also before an interruption.
    """
    failed = []
    todo = missing(cells, results)
    for number, cell in enumerate(todo, 1):
        lab.check_time()
        lab.say(f"cell {number} of {len(todo)}: {cell.name}, seed {cell.seed}")
        spent = _Stopwatch(lab.judged / "seconds.json", f"{cell.name}, seed {cell.seed}")
        try:
            with spent:
                numbers = cell.measure(lab)
                wrong = [name for name, value in numbers.items() if not np.isfinite(value).all()]
                if wrong:
                    raise NonFiniteOutput(f"{', '.join(wrong)}: NaN or Inf")
        except FastLDMError as error:
            failed.append(f"{cell.name}, seed {cell.seed}: {error}")
            lab.say(f"failed: {failed[-1]}")
            continue
        results.add(cell, {**numbers, "seconds": round(spent.total, 1), **facts()})
        spent.forget()
    return failed


class _Stopwatch:
    """Seconds within the block, and in all such blocks of a name before, kept in a file."""

    def __init__(self, file: Path, name: str) -> None:
        self.file, self.name, self.total = file, name, 0.0

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self.began
        with self._alone():
            kept = self._kept()
            self.total = kept.get(self.name, 0.0) + spent
            self._keep(kept | {self.name: self.total})

    def forget(self) -> None:
        """The total stands elsewhere; another time begins at 0."""
        with self._alone():
            self._keep({name: total for name, total in self._kept().items() if name != self.name})

    def _alone(self) -> AbstractContextManager[None]:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        return _alone_in(self.file.parent)

    def _kept(self) -> dict[str, float]:
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    def _keep(self, totals: Mapping[str, float]) -> None:
        with replacing(self.file) as temporary:
            temporary.write_text(json.dumps(totals))
