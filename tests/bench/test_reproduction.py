"""The papers' findings on small nets: the whole chain on a tiny world, statistics, bars, the command."""

from __future__ import annotations

import json
import math
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from fastldm import cli
from fastldm.bench.reproduction import cells, command, nets
from fastldm.bench.reproduction.cells import Bits, Reconstruct, Renders, Results, Sample, Train
from fastldm.bench.reproduction.lab import Lab, OutOfTime, Sampling
from fastldm.bench.reproduction.nets import Denoiser, Model
from fastldm.bench.reproduction.settings import FACTORS, FirstStage, Settings, Shape
from fastldm.bench.reproduction.statistics import Bar, estimate, precision_recall
from fastldm.bench.reproduction.tables import STEPS, TABLES, Found, plan
from fastldm.bench.reproduction.world import World, pictures, shrunk
from fastldm.diffusion import Chain, bits_per_dimension, unit_noise
from fastldm.errors import CheckpointError, NonFiniteOutput
from fastldm.scenes import KINDS
from fastldm.scenes.judge import CLASSES, Judge, new_net
from fastldm.training.data import to_model

TINY = Settings(
    side=32,
    pictures=16,
    samples=4,
    sample_batch=4,
    bound_pictures=3,
    bound_batch=2,
    timesteps=60,
    diffusion_flops=1.0,  # one step
    autoencoder_flops=1.0,
    autoencoder_batch=2,
    autoencoder_width=4,
    context_width=8,
    codes=8,
    shapes=(
        (1, Shape(3, (4, 8), (0, 0), 2)),
        (4, Shape(3, (8,), (1,), 2)),
        (8, Shape(4, (8,), (1,), 2)),
        (32, Shape(16, (8,), (1,), 2)),
    ),
)
FACTS = {"machine": "here", "commit": "none"}


@pytest.fixture(scope="module")
def reader() -> Judge:
    """A judge that has learnt nothing: its features tell pictures apart all the same."""
    torch.manual_seed(0)
    return Judge(new_net())


@pytest.fixture
def lab(reader: Judge, tmp_path: Path) -> Lab:
    return Lab(TINY, tmp_path / "runs", reader, "judge", lambda text: None)


def long(settings: Settings, steps: int) -> Settings:
    """Budgets that pay for so many steps at f = 4."""
    one = nets.diffusion_flops(settings, Model()) * 3 * 2
    vae = nets.autoencoder_flops(settings, FirstStage(4)) * 3 * 2
    settings = replace(settings, sample_batch=2)
    return replace(settings, diffusion_flops=float(steps * one), autoencoder_flops=float(steps * vae))


def results(tmp_path: Path) -> Results:
    return Results.open(tmp_path / "rows.json", TINY.digest(), "judge")


def written(tmp_path: Path, numbers: dict[tuple[str, int], dict[str, object]]) -> Results:
    """A file with these rows by name and seed."""
    rows = [
        {"cell": name, "seed": seed, "settings": TINY.digest(), "judge": "judge", **row}
        for (name, seed), row in numbers.items()
    ]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    return results(tmp_path)


def test_nets_are_small_and_budgets_equal() -> None:
    settings = Settings()
    for factor in FACTORS:
        for objective in nets.OBJECTIVES:
            model = Model(factor, objective)
            with torch.device("meta"):
                net = Denoiser(settings, model)
            assert sum(p.numel() for p in net.parameters()) <= 1.5e6
            batch, flops = settings.shape(factor).batch, nets.diffusion_flops(settings, model)
            spent = 3 * flops * batch * nets.steps_of(settings.diffusion_flops, flops, batch)
            assert spent == pytest.approx(settings.diffusion_flops, rel=1e-3)


def test_flops_are_counted() -> None:
    """Four times the pixels cost an autoencoder four times as much; conv_in has 2 · 4 · 9 · 16 · 64."""
    assert nets.diffusion_flops(Settings(), Model(32)) > 2 * 4 * 9 * 16 * 64
    for stage in (FirstStage(4), FirstStage(4, quantised=True)):
        one = nets.autoencoder_flops(TINY, stage)
        assert nets.autoencoder_flops(replace(TINY, side=64), stage) == 4 * one > 0


def test_the_world_is_the_same_each_time_and_has_every_class() -> None:
    one, other = World.draw(TINY), World.draw(TINY)
    assert torch.equal(one.training.images, other.training.images)
    assert one.training.images.shape == (16, 32, 32, 3) and one.training.images.dtype == torch.uint8
    assert one.training.labels.tolist() == list(range(len(KINDS)))
    assert not torch.equal(one.training.images[:4], one.reference.images)
    assert torch.equal(pictures(3, 32, 5).images, pictures(4, 32, 5).images[:3])


def test_a_picture_is_shrunk_by_the_mean_of_its_blocks() -> None:
    image = torch.zeros(4, 4, 3, dtype=torch.uint8)
    image[:2, :2, 0] = torch.tensor([[10, 20], [30, 42]])
    small = shrunk(image.numpy(), 2)
    assert small.shape == (2, 2, 3) and small[0, 0].tolist() == [26, 0, 0] and small.sum() == 26


def test_every_table_from_nothing_to_a_plot(lab: Lab, tmp_path: Path) -> None:
    kept = results(tmp_path)
    for table in ("tradeoff", "objectives", "guidance"):
        wanted = plan(table, 1)
        assert cells.run(wanted, lab, kept, lambda: FACTS) == []
        assert cells.missing(wanted, kept) == []
        found = TABLES[table](Found(kept, 1), False)
        assert "not run yet" not in str(found) or table == "objectives"  # one bar there needs two seeds
        assert command.draw(found.panels, "a machine").height > 400
    names = [row["cell"] for row in kept.rows]
    assert len(names) == len(set(names))  # a cell of two tables ran once
    row = kept.row("f4-simple ddim S50 eta0 g1", 0)
    assert row is not None and row["commit"] == "none" and row["seconds"] > 0
    assert row["distance"] > 0 and 0 <= row["precision"] <= 1 and row["pictures_a_second"] > 0
    bound = kept.row("f1-hybrid bound", 0)
    assert (
        bound is not None and bound["rate"] == sorted(bound["rate"]) and bound["bits"] > bound["rate"][-1] > 0
    )
    assert Results.open(kept.file, TINY.digest(), "judge").rows == kept.rows
    assert cells.missing(wanted, Results.open(kept.file, TINY.digest(), "another")) == wanted
    assert not list(lab.judged.glob("*.pt"))  # no samples are left over


def test_two_that_measure_at_once_keep_each_others_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = cells._read

    def slowly(file: Path) -> list[cells.Row]:
        found = read(file)
        time.sleep(0.05)  # in which another would write, if it could
        return found

    monkeypatch.setattr(cells, "_read", slowly)
    both = [(results(tmp_path), Renders(seed)) for seed in (0, 1)]
    threads = [threading.Thread(target=kept.add, args=(cell, {"distance": 1.0})) for kept, cell in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row["seed"] for row in results(tmp_path).rows) == [0, 1]


def test_work_that_is_stopped_goes_on_to_the_same_bits(reader: Judge, tmp_path: Path) -> None:
    settings = long(TINY, 40)
    cell = Sample(Model(), Sampling(3, eta=1.0, guidance=2.0), 5)

    def measured(folder: str, patience: int) -> tuple[Tensor, int]:
        """Stopped at every so many looks at the clock; the features, and how often it was stopped."""
        stops = 0
        while True:
            lab, looks = Lab(settings, tmp_path / folder, reader, "judge", lambda text: None), 0

            def look() -> None:
                nonlocal looks
                looks += 1
                if looks > patience:
                    raise OutOfTime

            lab.check_time = look  # type: ignore[method-assign]
            try:
                return lab.samples(cell.model, cell.sampling, cell.seed).features, stops
            except OutOfTime:
                stops += 1

    unbroken, never = measured("unbroken", 10**9)
    broken, stops = measured("broken", 7)
    assert never == 0 and stops >= 5
    assert torch.equal(broken, unbroken)


def test_seconds_before_an_interruption_count(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 5.0, 10.0, 12.0])
    monkeypatch.setattr("fastldm.bench.reproduction.cells.time.perf_counter", lambda: next(clock))
    kept, cell = results(tmp_path), Train(Model(), 0)

    def stopped(self: Train, lab: Lab) -> dict[str, object]:
        raise OutOfTime

    monkeypatch.setattr(Train, "measure", stopped)
    with pytest.raises(OutOfTime):
        cells.run([cell], lab, kept, lambda: FACTS)
    monkeypatch.setattr(Train, "measure", lambda self, lab: {"steps": 1})
    assert cells.run([cell], lab, kept, lambda: FACTS) == []
    assert kept.rows[0]["seconds"] == 7.0
    assert json.loads((lab.judged / "seconds.json").read_text()) == {}


def test_a_broken_cell_leaves_the_file_and_the_others_go_on(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = results(tmp_path)
    assert cells.run([Reconstruct(FirstStage(4), 0)], lab, kept, lambda: FACTS) == []
    before = kept.file.read_bytes()

    def breaks(self: Reconstruct, lab: Lab) -> dict[str, object]:
        if self.stage.factor == 8:
            raise NonFiniteOutput("the loss is nan")
        return {"psnr": 20.0} if self.seed == 0 else {"psnr": math.nan}

    monkeypatch.setattr(Reconstruct, "measure", breaks)
    failed = cells.run([Reconstruct(FirstStage(8), 0)], lab, kept, lambda: FACTS)
    assert failed == ["kl-f8, seed 0: the loss is nan"] and kept.file.read_bytes() == before
    failed = cells.run(
        [Reconstruct(FirstStage(8), 0), Reconstruct(FirstStage(32), 0)], lab, kept, lambda: FACTS
    )
    assert len(failed) == 1 and [row["cell"] for row in kept.rows] == ["kl-f4", "kl-f32"]
    before = kept.file.read_bytes()
    failed = cells.run([Reconstruct(FirstStage(32), 1)], lab, kept, lambda: FACTS)
    assert len(failed) == 1 and "psnr: NaN or Inf" in failed[0] and kept.file.read_bytes() == before


def test_the_bound_is_that_of_all_pictures_together(lab: Lab) -> None:
    model = Model(1)
    row, net = lab.bound(model, 0), lab.denoiser(model, 0)
    held = lab.world.reference
    totals = []
    for number, rows in enumerate((slice(0, 2), slice(2, 3))):
        x0, labels = to_model(held.images[rows]), held.labels[rows]
        noise = unit_noise(x0, torch.Generator().manual_seed(number))

        def ask(x: Tensor, t: Tensor, labels: Tensor = labels) -> Tensor:
            return net(x, t, labels)

        totals.append(bits_per_dimension(ask, x0, Chain.of(model.scheduler(TINY)), noise, clamp=1.0).total)
    assert row["bits"] == pytest.approx(float(torch.cat(totals).mean()), rel=1e-6)
    assert len(row["rate"]) == len(row["distortion"]) == 21


def test_intervals_of_students_t() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.half == pytest.approx(4.303 / math.sqrt(3), rel=1e-6)
    found = estimate([1.0, 3.0])  # df 1, where the quantile is tan(0.475 π)
    assert found.half == pytest.approx(math.tan(0.475 * math.pi) * math.sqrt(2) / math.sqrt(2), rel=1e-4)
    assert math.isnan(estimate([4.0]).half) and str(estimate([4.0])) == "4"


@pytest.mark.parametrize(
    ("values", "limit", "at_least", "verdict"),
    [
        ((0.8, 0.81, 0.82), 1.0, False, "met"),
        ((1.2, 1.21, 1.22), 1.0, False, "missed"),
        ((0.8, 1.0, 1.1), 1.0, False, "interval covers the bar"),
        ((3.0, 3.1, 3.2), 2.7, True, "met"),
        ((2.0, 2.1, 2.2), 2.7, True, "missed"),
        ((0.5,), 1.0, False, "met, by one seed without an interval"),
        ((1.5,), 1.0, False, "missed, by one seed without an interval"),
        ((1.0, 1.0), 1.0, False, "met"),
        ((), 1.0, False, "not run yet"),
    ],
)
def test_verdicts(values: tuple[float, ...], limit: float, at_least: bool, verdict: str) -> None:
    bar = Bar("a finding", values, limit, at_least)
    assert bar.verdict() == verdict and str(bar).endswith(verdict)


def test_precision_and_recall_of_sets_made_by_hand() -> None:
    line = torch.arange(10.0)[:, None]
    assert precision_recall(line, line) == (1.0, 1.0)
    assert precision_recall(line, line + 100) == (0.0, 0.0)
    # Samples crowd within the left end: all are real, and reach nothing but that end.
    crowd = torch.linspace(0, 0.4, 10)[:, None]
    precision, recall = precision_recall(line, crowd, neighbours=1)
    assert precision == 1.0 and recall == pytest.approx(0.1)
    # One of two halves is far away; both ends of the real line are reached only by the near half.
    half = torch.cat([line[:5], line[:5] + 100])
    precision, recall = precision_recall(line, half, neighbours=1)
    assert precision == 0.5 and recall == pytest.approx(0.6)


def test_a_table_holds_its_rows_to_the_bars(tmp_path: Path) -> None:
    rows: dict[tuple[str, int], dict[str, object]]
    rows = {("renders", seed): {"distance": 1.0} for seed in range(3)}
    for steps, distance in zip(STEPS, (30.0, 15.0, 11.0, 10.0), strict=True):
        for seed in range(3):
            for eta, factor in ((0, 1.0), (1, 2.0)):
                name = f"f4-simple ddim S{steps} eta{eta} g1"
                rows[name, seed] = {"distance": distance * factor * (1 + seed / 1000)}
    text = str(TABLES["ddim"](Found(written(tmp_path, rows), 3), False))
    assert "distance at 50 steps / at 250: 1.1 ± " in text and "≤ 1.2: met" in text
    assert "10 steps, eta 0 / eta 1: 0.5 ± " in text
    assert "missed" not in text and "not run yet" not in text
    del rows["f4-simple ddim S10 eta0 g1", 2]
    text = str(TABLES["ddim"](Found(written(tmp_path, rows), 3), False))
    assert "(2 of 3 seeds)" in text


def test_twenty_steps_within_the_interval_of_fifty(tmp_path: Path) -> None:
    for few, verdict in ((10.4, "met"), (12.0, "missed")):
        name = "f4-flow-logit flow_euler S{} eta0 g1"
        rows = {(name.format(20), seed): {"distance": few} for seed in range(3)}
        rows |= {(name.format(50), seed): {"distance": 10.0 + seed / 5} for seed in range(3)}
        bar = TABLES["objectives"](Found(written(tmp_path, rows), 3), False).bars[-1]
        assert bar.verdict() == verdict


def test_empty_tables_say_so(tmp_path: Path) -> None:
    for name, build in TABLES.items():
        table = build(Found(results(tmp_path), 3), False)
        assert "not run yet" in str(table), name
        assert all(bar.verdict() == "not run yet" for bar in table.bars)
        assert command.draw(table.panels, "").width == 1200


def test_each_plan_trains_before_it_asks() -> None:
    for name in TABLES:
        wanted = plan(name, 2)
        assert len(wanted) == len(set(wanted))
        for place, cell in enumerate(wanted):
            if isinstance(cell, Sample | Bits):
                assert Train(cell.model, cell.seed) in wanted[:place]
    assert {cell.model.factor for cell in plan("ddim", 1, True) if isinstance(cell, Sample)} == {1}


def test_all_tables_fit_into_four_hours_of_two_cores() -> None:
    wanted = dict.fromkeys(cell for name in TABLES for cell in plan(name, 3))
    spent = [command.seconds(cell, threads=2) for cell in wanted]
    assert max(spent) <= 600 and sum(spent) <= 4 * 3600


def test_renders_are_what_a_perfect_model_draws(lab: Lab) -> None:
    one, other = Renders(0).measure(lab), Renders(1).measure(lab)
    assert one != other and 0 < one["distance"] < float("inf")
    assert not torch.equal(lab.renders(0)[0], lab.reference)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reader: Judge) -> Path:
    """An empty folder, the tiny world, and a judge's file in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "SETTINGS", TINY)
    state = {name: tensor.contiguous() for name, tensor in reader.net.state_dict().items()}
    save_file(state, tmp_path / "judge.safetensors", metadata=CLASSES)
    return tmp_path


def test_the_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["bench", "guidance", "--seeds", "1", "--json", "r.json", "--judge", "judge.safetensors"]
    assert cli.main([*asked, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "8 of 8 cells are missing: about 0 minutes" in said and not (here / "r.json").exists()
    assert cli.main([*asked, "--minutes", "0"]) == 0
    captured = capsys.readouterr()
    assert "the minutes are up" in captured.err and "0 of 8 cells" in captured.out
    assert cli.main([*asked, "--plot", "p.png"]) == 0
    assert "8 of 8 cells, from r.json" in capsys.readouterr().out
    with Image.open("p.png") as picture:
        assert picture.width == 1200
    assert cli.main([*asked, "--dry-run"]) == 0
    assert "0 of 8 cells are missing" in capsys.readouterr().out


def test_costs_are_told_without_a_judge(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "WEIGHTS", here / "none")
    assert cli.main(["bench", "ddim", "--json", "r.json", "--dry-run"]) == 0
    assert "33 of 33 cells are missing" in capsys.readouterr().out


def test_ctrl_c_keeps_the_rows(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: Sample, lab: Lab) -> dict[str, object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Sample, "measure", stopped)
    asked = ["bench", "guidance", "--seeds", "1", "--json", "r.json", "--judge", "judge.safetensors"]
    assert cli.main(asked) == 130
    assert "3 of 8 cells" in capsys.readouterr().out
    names = [row["cell"] for row in json.loads((here / "r.json").read_text())["rows"]]
    assert names == ["renders", "kl-f4", "f4-simple train"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["ddim", "step"], "part='ddim step': allowed is ddim alone"),
        (["guidance", "--pixel"], "pixel=True: allowed is only with ddim"),
        (["step", "--pixel"], "pixel=True: allowed is only with ddim, tradeoff"),
        (["ddim", "--seeds", "0"], "seeds=0: allowed is an integer 1…10"),
        (["ddim", "--minutes", "-1"], "minutes=-1.0"),
        (["ddim", "--rounds", "3"], "rounds=3: allowed is only in a race"),
        (["ddim", "--json", "none/x.json"], "json='none/x.json': allowed is a file in a folder that exists"),
        (["ddim", "--json", "r.json", "--plot", "."], "plot='.'"),
        (["ddim", "--json", "r.json", "--judge", "none"], "none: cannot be read"),
        (["ddim", "--json", "r.json", "--judge", "none", "--dry-run"], "none: cannot be read"),
        (["ddim", "--json", "judge.safetensors", "--judge", "judge.safetensors"], "holds no rows"),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, list) else "",
)
def test_errors_of_the_command(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert cli.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastldm: error: ") and told in error and error.count("\n") == 1


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    for text in ("", "[]", '{"rows": [{}]}', '{"rows": 3}'):
        (tmp_path / "rows.json").write_text(text)
        with pytest.raises(CheckpointError, match="holds no rows of a reproduction"):
            results(tmp_path)
