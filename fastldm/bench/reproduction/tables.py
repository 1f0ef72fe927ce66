"""Four tables, each a list of cells, a way to set them out, and the bars that the papers' findings set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fastldm.bench.reproduction.cells import Bits, Cell, Reconstruct, Renders, Results, Sample, Train
from fastldm.bench.reproduction.lab import Sampling
from fastldm.bench.reproduction.nets import OBJECTIVES, Model
from fastldm.bench.reproduction.settings import FACTORS, FirstStage
from fastldm.bench.reproduction.statistics import Bar, Estimate, estimate

STEPS = (10, 20, 50, 250)
WIDE = FirstStage(8, channels=16)  # as many as SD3's autoencoder has
FEW = 20  # steps, where their number is not the question
ETAS = (0.0, 1.0)
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
MISSING = "not run yet"
PIXELS = ("simple", "hybrid")  # the objectives with a likelihood, asked for in pixels


@dataclass(frozen=True)
class Panel:
    """A drawing: of each name, points of (x, estimate)."""

    title: str
    across: str
    up: str
    lines: dict[str, list[tuple[float, Estimate]]]


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; what the bars say; drawings."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    bars: list[Bar]
    panels: list[Panel] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        text = [self.title]
        for line in lines:
            cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            text.append(f"  {'  '.join(cells)}".rstrip())
        return "\n".join([*text, *(f"  {bar}" for bar in self.bars)])


class Found:
    """What the file says, for so many seeds."""

    def __init__(self, results: Results, seeds: int) -> None:
        self.results, self.seeds = results, seeds

    def values(self, cell: Cell, key: str) -> dict[int, float]:
        """By seed, where the cell has been run; the cell's own seed does not count."""
        rows = {seed: self.results.row(cell.name, seed) for seed in range(self.seeds)}
        return {seed: float(row[key]) for seed, row in rows.items() if row is not None}

    def text(self, cell: Cell, key: str) -> str:
        values = list(self.values(cell, key).values())
        if not values:
            return MISSING
        count = "" if len(values) == self.seeds else f" ({len(values)} of {self.seeds} seeds)"
        return f"{estimate(values)}{count}"

    def paired(
        self, one: Cell, other: Cell, key: str, how: Callable[[float, float], float]
    ) -> tuple[float, ...]:
        """how(one, other) of each seed with both."""
        first, second = self.values(one, key), self.values(other, key)
        return tuple(how(first[seed], second[seed]) for seed in first.keys() & second.keys())

    def ratio(self, one: Cell, other: Cell, key: str = "distance") -> tuple[float, ...]:
        return self.paired(one, other, key, lambda a, b: a / b)

    def difference(self, one: Cell, other: Cell, key: str) -> tuple[float, ...]:
        return self.paired(one, other, key, lambda a, b: a - b)

    def best(self, cells: Sequence[Cell], key: str) -> dict[int, float]:
        """Of each seed with all of these, the least value."""
        by_cell = [self.values(cell, key) for cell in cells]
        seeds = set.intersection(*(set(values) for values in by_cell))
        return {seed: min(values[seed] for values in by_cell) for seed in seeds}

    def best_ratio(self, cells: Sequence[Cell], other: Cell, key: str = "distance") -> tuple[float, ...]:
        best, against = self.best(cells, key), self.values(other, key)
        return tuple(best[seed] / against[seed] for seed in best.keys() & against.keys())

    def line(self, points: Iterable[tuple[float, Cell]], key: str) -> list[tuple[float, Estimate]]:
        found = ((x, list(self.values(cell, key).values())) for x, cell in points)
        return [(x, estimate(values)) for x, values in found if values]


def ddim_model(pixel: bool) -> Model:
    return Model(1 if pixel else 4)


def sampled(model: Model, steps: int, **options: object) -> Sample:
    return Sample(model, Sampling(steps, **options), 0)  # type: ignore[arg-type]


def ddim(found: Found, pixel: bool) -> Table:
    """Fréchet distance over steps and eta (Song et al. 2021, table 1)."""
    model = ddim_model(pixel)

    def cell(steps: int, eta: float = 0.0) -> Sample:
        return sampled(model, steps, eta=eta)

    rows = [(f"eta {eta:g}", *(found.text(cell(steps, eta), "distance") for steps in STEPS)) for eta in ETAS]
    rows.append(("renders", found.text(Renders(0), "distance"), *("" for _ in STEPS[1:])))
    bars = [
        Bar(
            f"1: eta 0, distance at {steps} steps / at {STEPS[-1]}",
            found.ratio(cell(steps), cell(STEPS[-1])),
            most,
        )
        for steps, most in ((50, 1.2), (20, 1.75), (10, 3.5))
    ]
    bars += [
        Bar(f"1: eta 0, distance at {more} steps / at {fewer}", found.ratio(cell(more), cell(fewer)), 1.0)
        for fewer, more in zip(STEPS, STEPS[1:], strict=False)
    ]
    bars += [
        Bar(f"1: {steps} steps, eta 0 / eta 1", found.ratio(cell(steps), cell(steps, 1.0)), 1.0)
        for steps in STEPS[:3]
    ]
    lines = {f"eta {eta:g}": found.line([(s, cell(s, eta)) for s in STEPS], "distance") for eta in ETAS}
    title = f"Fréchet distance of DDIM over steps, {'pixels' if pixel else 'latents of f = 4'}"
    header = ("", *(f"{steps} steps" for steps in STEPS))
    return Table(title, header, rows, bars, [Panel(title, "steps", "Fréchet distance", lines)])


def tradeoff(found: Found, pixel: bool) -> Table:
    """Compression at equal computation (Rombach et al. 2022, section 4.1; first stages: table 8).

    Distances are those to renders, to which the autoencoder adds its own.
    """
    at = {factor: sampled(Model(factor), FEW) for factor in FACTORS}
    kl = {factor: Reconstruct(FirstStage(factor), 0) for factor in FACTORS[1:]}
    vq = {factor: Reconstruct(FirstStage(factor, True), 0) for factor in FACTORS[1:3]}
    wide = Reconstruct(WIDE, 0)
    rows = [
        (
            f"f = {factor}",
            found.text(cell, "distance_to_renders"),
            found.text(kl[factor], "distance") if factor in kl else "0",
            found.text(cell, "pictures_a_second"),
            found.text(kl[factor], "psnr") if factor in kl else "",
            found.text(vq[factor], "psnr") if factor in vq else "",
        )
        for factor, cell in at.items()
    ]
    rows.append(
        (
            f"f = {WIDE.factor}, {WIDE.channels} channels",
            "",
            found.text(wide, "distance"),
            "",
            found.text(wide, "psnr"),
            "",
        )
    )
    rows.append(("renders", found.text(Renders(0), "distance"), "", "", "", ""))
    middle = [at[4], at[8]]
    speed = found.ratio(at[4], at[1], "pictures_a_second")
    bars = [
        Bar(
            "2: least distance of f = 4 and 8 / f = 1",
            found.best_ratio(middle, at[1], "distance_to_renders"),
            1.0,
        ),
        Bar(
            "2: least distance of f = 4 and 8 / f = 32",
            found.best_ratio(middle, at[32], "distance_to_renders"),
            1.0,
        ),
        Bar("2: pictures a second, f = 4 / f = 1", speed, 2.7, at_least=True),
    ]
    bars += [
        Bar(f"3: KL, PSNR of f = {a} - f = {b}, dB", found.difference(kl[a], kl[b], "psnr"), 0.0, True)
        for a, b in ((4, 8), (8, 32))
    ]
    bars += [
        Bar(f"3: f = {f}, PSNR of KL - VQ, dB", found.difference(kl[f], vq[f], "psnr"), 0.0, True) for f in vq
    ]
    says = f"3: f = {WIDE.factor}, PSNR of {WIDE.channels} channels - fewer, dB"
    bars.append(Bar(says, found.difference(wide, kl[WIDE.factor], "psnr"), 0.0, True))
    title = f"Compression at equal computation, {FEW} steps of DDIM; distances to renders"
    lines = {
        "samples": found.line([(float(f), cell) for f, cell in at.items()], "distance_to_renders"),
        "reconstructions": found.line([(float(f), cell) for f, cell in kl.items()], "distance"),
    }
    header = ("", "of samples", "of reconstructions", "pictures a second", "PSNR of KL, dB", "PSNR of VQ, dB")
    return Table(title, header, rows, bars, [Panel(title, "f", "Fréchet distance", lines)])


def objectives(found: Found, pixel: bool) -> Table:
    """What is trained for: distances in latents, bits per dimension in pixels.

    (Ho et al. 2020, section 4.3; Nichol & Dhariwal 2021; Esser et al. 2024)
    """
    rows, at = [], {}
    for label, model, options in _compared():
        cells = {steps: sampled(model, steps, **options) for steps in (20, 50)}
        bits = found.text(Bits(Model(1, model.objective), 0), "bits") if label in PIXELS else ""
        rows.append((label, *(found.text(cell, "distance") for cell in cells.values()), bits))
        at[label] = cells
    rows.append(("renders", found.text(Renders(0), "distance"), "", ""))
    nll = {name: Bits(Model(1, name), 0) for name in PIXELS}
    bars = [
        Bar(
            "5: bits per dimension, hybrid - simple",
            found.difference(nll["hybrid"], nll["simple"], "bits"),
            0,
        ),
        Bar("5: 50 steps, distance of hybrid / simple", found.ratio(at["hybrid"][50], at["simple"][50]), 1.1),
    ]
    for steps in (20, 50):
        learned, fixed = at["hybrid, ddpm, learned variance"], at["hybrid, ddpm, fixed variance"]
        bars.append(
            Bar(f"5: {steps} steps, learned / fixed variance", found.ratio(learned[steps], fixed[steps]), 1.0)
        )
    logit, uniform = at["flow-logit"], at["flow"]
    bars.append(Bar("6: 20 steps, logit-normal / uniform", found.ratio(logit[20], uniform[20]), 1.0))
    bars.append(_within(found, logit[20], logit[50]))
    curves = {name: _distortion(found, cell) for name, cell in nll.items()}
    title = "Objectives at equal computation: Fréchet distance in latents of f = 4, bound in pixels"
    panel = Panel("Rate against distortion in pixels", "bits per dimension sent", "RMS error, levels", curves)
    return Table(title, ("", "20 steps", "50 steps", "bits per dimension"), rows, bars, [panel])


def _compared() -> Iterable[tuple[str, Model, dict[str, object]]]:
    """Each objective with its own ODE sampler; hybrid with its variance, learned and not, too."""
    for name in OBJECTIVES:
        yield name, Model(4, name), {"sampler": "flow_euler" if name.startswith("flow") else "ddim"}
    for label, learned in (("learned", True), ("fixed", False)):
        yield f"hybrid, ddpm, {label} variance", Model(4, "hybrid"), {"sampler": "ddpm", "learned": learned}


def _within(found: Found, few: Sample, many: Sample) -> Bar:
    """Whether the mean at few steps lies below the upper end of the interval at many."""
    says = "6: logit-normal, mean at 20 steps / upper end of the interval at 50"
    means, against = found.values(few, "distance"), list(found.values(many, "distance").values())
    if not means or len(against) < 2:
        return Bar(says, (), 1.0)
    end = estimate(against)
    return Bar(says, (estimate(list(means.values())).mean / (end.mean + end.half),), 1.0, pooled=True)


def _distortion(found: Found, cell: Bits) -> list[tuple[float, Estimate]]:
    """Means over seeds of the rates, and estimates of the distortions there."""
    rows = [row for seed in range(found.seeds) if (row := found.results.row(cell.name, seed)) is not None]
    if not rows:
        return []
    rates = zip(*(row["rate"] for row in rows), strict=True)
    errors = zip(*(row["distortion"] for row in rows), strict=True)
    return [(sum(rate) / len(rate), estimate(error)) for rate, error in zip(rates, errors, strict=True)]


def guidance(found: Found, pixel: bool) -> Table:
    """Classifier-free guidance (Ho & Salimans 2022, section 4)."""
    at = {scale: sampled(Model(4), FEW, guidance=scale) for scale in SCALES}
    keys = ("distance", "precision", "recall", "accuracy")
    rows = [(f"scale {scale:g}", *(found.text(cell, key) for key in keys)) for scale, cell in at.items()]
    rows.append(("renders", *(found.text(Renders(0), key) for key in keys)))
    moderate, low, high = [at[1.5], at[2.0]], at[1.0], at[5.0]
    bars = [
        Bar("4: least distance of scales 1.5 and 2 / of 1", found.best_ratio(moderate, low), 1.0),
        Bar("4: least distance of scales 1.5 and 2 / of 5", found.best_ratio(moderate, high), 1.0),
        Bar("4: precision, scale 5 - scale 1", found.difference(high, low, "precision"), 0.0, True),
        Bar("4: recall, scale 5 - scale 1", found.difference(high, low, "recall"), 0.0),
    ]
    points = list(at.items())
    panels = [
        Panel("Guidance", "scale", "Fréchet distance", {"distance": found.line(points, "distance")}),
        Panel("Guidance", "scale", "share", {key: found.line(points, key) for key in keys[1:]}),
    ]
    header = ("", "Fréchet distance", "precision", "recall", "class read right")
    return Table(f"Guidance, latents of f = 4, {FEW} steps of DDIM", header, rows, bars, panels)


TABLES: dict[str, Callable[[Found, bool], Table]] = {
    "ddim": ddim,
    "tradeoff": tradeoff,
    "objectives": objectives,
    "guidance": guidance,
}


def plan(table: str, seeds: int, pixel: bool = False) -> list[Cell]:
    """The cells of a table, a seed after another, each after those that train what it needs."""
    cells: list[Cell] = []
    for seed in range(seeds):
        cells.append(Renders(seed))
        if table == "ddim":
            measured: list[Cell] = [
                Sample(ddim_model(pixel), Sampling(steps, eta=eta), seed) for steps in STEPS for eta in ETAS
            ]
        elif table == "tradeoff":
            measured = [Sample(Model(factor), Sampling(FEW), seed) for factor in FACTORS]
            stages = [FirstStage(factor, quantised=True) for factor in FACTORS[1:3]] + [WIDE]
            measured += [Reconstruct(stage, seed) for stage in stages]
        elif table == "objectives":
            measured = [
                Sample(model, Sampling(steps, **options), seed)  # type: ignore[arg-type]
                for _, model, options in _compared()
                for steps in (20, 50)
            ]
            measured += [Bits(Model(1, name), seed) for name in PIXELS]
        else:
            measured = [Sample(Model(4), Sampling(FEW, guidance=scale), seed) for scale in SCALES]
        models = dict.fromkeys(cell.model for cell in measured if isinstance(cell, Sample | Bits))
        for model in models:
            if model.factor > 1:
                cells.append(Reconstruct(FirstStage(model.factor), seed))
            cells.append(Train(model, seed))
        cells += measured
    return list(dict.fromkeys(cells))
