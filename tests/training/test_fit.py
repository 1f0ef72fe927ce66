"""The optimisation loop: exact resume, averages, rates, what it keeps on the way and when it fails."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastldm.checkpoint.atomic import save_tensors
from fastldm.diffusion import Criterion, Objective, SchedulerConfig
from fastldm.errors import CheckpointError, InvalidArgument, NonFiniteOutput
from fastldm.training.fit import Average, FitSettings, fit, numbered_generator


def problem(steps: int, **changes: Any) -> tuple[nn.Module, FitSettings]:
    torch.manual_seed(0)
    usual = {"batch": 4, "learning_rate": 0.05, "warmup": 2, "ema_decay": 0.9, "save_every": 5}
    return nn.Linear(3, 1), FitSettings(steps=steps, **usual | changes)


def loss_of(module: nn.Module, batch: int = 4) -> object:
    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(batch, 3, generator=generator)
        return (module(x) - x.sum(1, keepdim=True)).square().mean()

    return loss


def test_resume_equals_an_unbroken_run_to_the_bit(tmp_path: Path) -> None:
    unbroken, settings = problem(20)
    fit("it", unbroken, loss_of(unbroken), settings, tmp_path / "a", 1, str)

    broken, _ = problem(20)
    plain = loss_of(broken)

    def dies(step: int, generator: torch.Generator) -> torch.Tensor:
        if step == 13:
            raise KeyboardInterrupt
        return plain(step, generator)

    with pytest.raises(KeyboardInterrupt):
        fit("it", broken, dies, settings, tmp_path / "b", 1, str)
    fresh, _ = problem(20)
    nn.init.zeros_(fresh.weight)
    fit("it", fresh, loss_of(fresh), settings, tmp_path / "b", 1, str)
    assert torch.equal(fresh.weight, unbroken.weight) and torch.equal(fresh.bias, unbroken.bias)


def test_each_seed_draws_its_own(tmp_path: Path) -> None:
    """From the same weights on; PyTorch's generators read the low 32 bits of a seed alone."""
    ends = []
    for seed in (0, 1, 2, 2**32 - 1):
        module, settings = problem(5)
        fit("it", module, loss_of(module), settings, tmp_path / str(seed), seed, str)
        ends.append(module.weight.detach())
    assert all(not torch.equal(a, b) for i, a in enumerate(ends) for b in ends[:i])
    starts = sorted(numbered_generator(seed, 0).initial_seed() for seed in range(50))
    assert min(b - a for a, b in zip(starts, starts[1:], strict=False)) > 10_000_000
    first, again = (torch.randn(3, generator=numbered_generator(3, 7)) for _ in range(2))
    assert torch.equal(first, again)


def test_what_the_loss_remembers_is_resumed_too(tmp_path: Path) -> None:
    """L_vlb with times drawn by the losses seen: a loss that forgot would draw others."""
    scheduler = SchedulerConfig(num_train_timesteps=20, variance_type="learned_range")

    def trained(folder: str, stops: int | None = None) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Conv2d(2, 4, 1)
        criterion = Criterion(Objective("vlb", timesteps="loss_second_moment"), scheduler)
        settings = FitSettings(steps=60, batch=64, learning_rate=0.01, warmup=2, save_every=10)

        def loss(step: int, generator: torch.Generator) -> torch.Tensor:
            if step == stops:
                raise KeyboardInterrupt
            clean = torch.rand(64, 2, 4, 4, generator=generator) * 2 - 1
            return criterion(lambda x, t: net(x), clean, generator=generator).mean()

        try:
            fit("it", net, loss, settings, tmp_path / folder, 1, str, memory=criterion)
        except KeyboardInterrupt:
            return trained(folder)
        assert criterion.resampler is not None and int(criterion.resampler.counts.min()) == 10
        return net

    assert torch.equal(trained("broken", 45).weight, trained("unbroken").weight)
    with pytest.raises(CheckpointError, match="another configuration"):
        module, settings = problem(100)
        fit("it", module, loss_of(module), settings, tmp_path / "unbroken", 1, str)


def test_a_finished_run_changes_nothing_when_run_again(tmp_path: Path) -> None:
    first, settings = problem(5)
    fit("it", first, loss_of(first), settings, tmp_path, 1, str)
    again, _ = problem(5)
    fit("it", again, loss_of(again), settings, tmp_path, 1, lambda said: pytest.fail(said))
    assert torch.equal(first.weight, again.weight)


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    first, settings = problem(5)
    fit("it", first, loss_of(first), settings, tmp_path, 1, str)
    other = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match="another configuration"):
        fit("it", other, loss_of(other), settings, tmp_path, 1, str)


def test_nan_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    module, settings = problem(20)
    plain = loss_of(module)
    with pytest.raises(NonFiniteOutput, match="step 7"):
        fit(
            "it",
            module,
            lambda step, g: plain(step, g) * (float("nan") if step == 7 else 1),
            settings,
            tmp_path,
            1,
            str,
        )
    assert torch.load(tmp_path / "it.pt", weights_only=True)["step"] == 5


def test_a_gradient_that_is_no_number_is_not_stepped_on(tmp_path: Path) -> None:
    """The loss is a number there: the root of 0, whose slope is none."""
    module, settings = problem(20)
    plain = loss_of(module)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        root = (0 * module.bias).sum().sqrt() if step == 7 else 0
        return plain(step, generator) + root

    with pytest.raises(
        NonFiniteOutput, match=r"gradient's norm is nan at step 7; the last good state is .*it\.pt"
    ):
        fit("it", module, loss, settings, tmp_path, 1, str)
    assert torch.load(tmp_path / "it.pt", weights_only=True)["step"] == 5
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_clip_0_leaves_the_gradient_as_it_is(tmp_path: Path) -> None:
    ends = []
    for clip in (0.0, 1e6, 0.1):
        module, settings = problem(5, clip=clip)
        fit("it", module, loss_of(module), settings, tmp_path / str(clip), 1, str)
        ends.append(module.weight.detach())
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch", 0),
        ("accumulate", 0),
        ("save_every", 0),
        ("warmup", -1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("decay", 3.0),
        ("ema_decay", 1.5),
        ("clip", -1.0),
        ("weight_decay", -0.1),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(InvalidArgument) as caught:
        FitSettings(**{"steps": 1, "batch": 1, "learning_rate": 1.0, name: value})
    assert caught.value.name == name


def test_a_state_of_another_origin_is_refused_and_named(tmp_path: Path) -> None:
    """How it is optimised may change; a state that says nothing of its origin is taken."""

    def train(steps: int, seed: int, **origin: str) -> None:
        module, settings = problem(steps, batch=steps, learning_rate=1 / steps)
        fit("it", module, loss_of(module), settings, tmp_path, seed, str, origin=origin)

    train(5, 1, vocabulary="a", start="b")
    train(6, 1, vocabulary="a", start="b")
    with pytest.raises(CheckpointError, match="another vocabulary; remove it"):
        train(7, 1, vocabulary="c", start="b")
    with pytest.raises(CheckpointError, match="another seed, another start; remove it"):
        train(7, 2, vocabulary="a", start="c")
    state = torch.load(tmp_path / "it.pt", weights_only=True)
    assert state["step"] == 6
    del state["origin"]
    torch.save(state, tmp_path / "it.pt")
    train(7, 2, vocabulary="c", start="c")
    assert torch.load(tmp_path / "it.pt", weights_only=True)["origin"]["vocabulary"] == "c"


def test_the_optimiser_obeys_what_is_asked_for_now(tmp_path: Path) -> None:
    for steps, weight_decay in ((5, 0.01), (10, 0.5)):
        module, settings = problem(steps, weight_decay=weight_decay)
        fit("it", module, loss_of(module), settings, tmp_path, 1, str)
    (group,) = torch.load(tmp_path / "it.pt", weights_only=True)["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.5


def test_average_against_its_formula() -> None:
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(module.weight, 0.0)
    average, expected = Average(module, 0.5), 0.0
    for n in range(30):
        nn.init.constant_(module.weight, float(n))
        average.update(module, n)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert float(average.values["weight"]) == pytest.approx(expected, rel=1e-12)
    with average.swapped_in(module):
        assert module.weight.item() == pytest.approx(expected, rel=1e-12)
    assert module.weight.item() == 29


@pytest.mark.parametrize(("name", "decay"), [("default", 0.9999), ("decay0.3", 0.3)])
def test_the_average_is_the_originals(recorded: Callable[[str], Any], name: str, decay: float) -> None:
    """LitEma counts an update before it weighs it, we after: its update n is our n + 1."""
    case = recorded("ldm/ema")
    weights = {key: nn.Parameter(value) for key, value in case.weight.items() if "frozen" not in key}
    module = nn.ParameterDict({key.replace(".", "/"): value for key, value in weights.items()})
    average = Average(module, decay)
    for step in range(6):
        for key, value in weights.items():
            value.data = case.input[f"step{step}.{key}"]
        average.update(module, step + 1)
        for key in weights:
            flat = key.replace(".", "")
            case.holds(f"{name}.step{step}.{flat}", average.values[key.replace(".", "/")])


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    settings = FitSettings(steps=110, batch=1, learning_rate=2.0, warmup=10)
    assert [settings.rate(0), settings.rate(9)] == [pytest.approx(0.2), pytest.approx(2.0)]
    assert settings.rate(60) == pytest.approx(1.0)
    assert settings.rate(110) == pytest.approx(0.0, abs=1e-12)
    late = replace(settings, decay=0.2)
    assert late.rate(10) == late.rate(87) == 2.0
    assert late.rate(99) == pytest.approx(1.0) and late.rate(110) == pytest.approx(0.0, abs=1e-12)


def test_a_full_disk_is_named_and_the_last_good_state_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, settings = problem(20)
    save = torch.save

    def full(state: dict[str, object], file: Path) -> None:
        if state["step"] == 10:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        fit("it", module, loss_of(module), settings, tmp_path, 1, str)
    assert torch.load(tmp_path / "it.pt", weights_only=True)["step"] == 5
    assert sorted(file.name for file in tmp_path.iterdir()) == ["it.csv", "it.pt"]  # nothing half written


def test_a_file_that_cannot_grow_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    """What torch itself raises of a full disk, here of a limit on the size of files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"it\.pt: cannot be written"):
            save_tensors(tmp_path / "it.pt", torch.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("torn", ["\r\n6", "60,0.", "\0\0\0", "60,a,b,c\r\n\r\n"])
def test_a_torn_row_of_the_curve_is_passed_over(tmp_path: Path, torn: str) -> None:
    for steps in (60, 120):
        module, settings = problem(steps)
        fit("it", module, loss_of(module), settings, tmp_path, 1, str)
        if steps == 60:
            with open(tmp_path / "it.csv", "a", newline="") as file:
                file.write(torn)
    rows = [line.split(",") for line in (tmp_path / "it.csv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["50", "60", "100", "120"] and {len(row) for row in rows} == {4}


def test_the_curve_of_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    rows = []
    for steps in (120, 60, 120):  # as if the state of step 60 were all that a killed run left
        module, settings = problem(steps)
        fit("it", module, loss_of(module), settings, tmp_path, 1, str)
        rows.append([int(line.split(",")[0]) for line in (tmp_path / "it.csv").read_text().splitlines()])
        if steps == 120:
            (tmp_path / "it.pt").unlink()
    assert rows == [[50, 100, 120], [50, 60], [50, 60, 100, 120]]


def test_averages_are_kept_on_the_way(tmp_path: Path) -> None:
    module, settings = problem(6, keep_every=3)
    fit("it", module, loss_of(module), settings, tmp_path, 1, str)
    kept = torch.load(tmp_path / "it-6.pt", weights_only=True)
    assert torch.equal(kept["weight"], module.weight)
    assert not torch.equal(torch.load(tmp_path / "it-3.pt", weights_only=True)["weight"], module.weight)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_what_is_sampled_on_the_way(tmp_path: Path, ema_decay: float) -> None:
    """The averages, or without any the weights themselves; neither disturbs the training."""
    seen = {}
    for sampled in (3, 0):
        module, settings = problem(6, sample_every=sampled)
        settings = replace(settings, ema_decay=ema_decay)

        def sample(step: int, module: nn.Module = module) -> None:
            assert not module.training
            seen[step] = module.weight.detach().clone()

        fit("it", module, loss_of(module), settings, tmp_path / str(sampled), 1, str, sample=sample)
        seen[-sampled] = module.weight.detach().clone()
    assert torch.equal(seen[6], seen[-3]) and torch.equal(seen[6], seen[0])
    state = torch.load(tmp_path / "3" / "it.pt", weights_only=True)
    assert torch.equal(seen[6], state["module"]["weight"]) == (ema_decay == 0)
    assert not torch.equal(seen[3], seen[6])


def test_an_average_may_be_asked_for_later(tmp_path: Path) -> None:
    module, settings = problem(5)
    fit("it", module, loss_of(module), replace(settings, ema_decay=0.0), tmp_path, 1, str)
    more, settings = problem(10)
    fit("it", more, loss_of(more), settings, tmp_path, 1, str)
    assert torch.load(tmp_path / "it.pt", weights_only=True)["average"].keys() == {"weight", "bias"}
