"""One optimisation loop for every stage: seeded, resumable at any step, with warm-up, decay, clipping,
accumulation and EMA, on one process or several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastldm.checkpoint.atomic import save_tensors
from fastldm.checks import integer, number
from fastldm.errors import CheckpointError, InvalidArgument, NonFiniteOutput, first_line
from fastldm.training.curve import Curve
from fastldm.training.origin import Origin, refuse_another
from fastldm.training.parallel import ALONE, Workers, gradients

Loss = Callable[[int, torch.Generator], Tensor]


class Memory(Protocol):
    """What a loss remembers from step to step."""

    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


LINE_EVERY = 50
MOST = 10**9


@dataclass(frozen=True)
class FitSettings:
    """How a stage is optimised: AdamW with linear warm-up and, in the last share `decay` of the steps, cosine
    decay of the learning rate to zero. Raises InvalidArgument for a value out of range.
    """

    steps: int
    batch: int  # rows of one pass; a step takes accumulate passes on each process
    learning_rate: float
    warmup: int = 100
    decay: float = 1.0
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient; 0: any
    accumulate: int = 1
    ema_decay: float = 0.0  # 0: no moving average
    save_every: int = 500
    keep_every: int = 0  # steps between averages that are kept for good; 0: none
    sample_every: int = 0  # steps between sample grids, where the stage draws any; 0: none

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "save_every"):
            integer(name, getattr(self, name), 1, MOST)
        for name in ("warmup", "keep_every", "sample_every"):
            integer(name, getattr(self, name), 0, MOST)
        for name, most in (("decay", 1), ("ema_decay", 1), ("weight_decay", MOST), ("clip", MOST)):
            number(name, getattr(self, name), 0, most)
        if not number("learning_rate", self.learning_rate, 0, MOST):
            raise InvalidArgument("learning_rate", self.learning_rate, "above 0")

    def rate(self, step: int) -> float:
        """Learning rate at a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        start = max(self.warmup, round(self.steps * (1 - self.decay)))
        done = (step - start) / max(self.steps - start, 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))


class Average:
    """Exponential moving average of a module's parameters: decay min(decay, (1 + n) / (10 + n)) at update
    n. It begins with the parameters, or where it was; decay 0: there is none, and the module stands for it.
    """

    def __init__(self, module: nn.Module, decay: float, values: Mapping[str, Tensor] | None = None) -> None:
        self.decay = decay
        self.values: dict[str, Tensor] = dict(values or {}) if decay else {}
        if decay and not self.values:
            self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, n: int) -> None:
        """Move towards the module's parameters after its update n, counted from 0."""
        decay = min(self.decay, (1 + n) / (10 + n))
        names, parameters = zip(*module.named_parameters(), strict=True)
        torch._foreach_lerp_(
            [self.values[name] for name in names], [p.detach() for p in parameters], 1 - decay
        )

    @contextmanager
    def swapped_in(self, module: nn.Module) -> Iterator[None]:
        """Within the block the module holds the averages, in evaluation mode."""
        kept = {name: p.detach().clone() for name, p in module.named_parameters()}
        module.load_state_dict(self.values, strict=False)
        module.eval()
        try:
            yield
        finally:
            module.load_state_dict(kept, strict=False)
            module.train()


def fit(
    name: str,
    module: nn.Module,
    loss: Loss,
    settings: FitSettings,
    folder: Path,
    seed: int,
    report: Callable[[str], None] = print,
    bfloat16: bool = False,
    *,
    workers: Workers = ALONE,
    sample: Callable[[int], None] | None = None,
    tensorboard: bool = False,
    critic: nn.Module | None = None,
    memory: Memory | None = None,
    origin: Origin | None = None,
) -> None:
    """Minimise loss(step, generator) over the module's parameters; ends with the averaged weights in the
    module.

    Every pass draws from a generator of (seed, step, pass), so a run resumed from `folder/name.pt`
    equals an unbroken one, and processes that share the passes do what one would that accumulates them all.
    The state is written to a temporary name and renamed; `folder/name.csv` gets step, loss, learning rate and
    seconds. A loss or a gradient that is NaN or Inf raises NonFiniteOutput and leaves the last saved state.

    `bfloat16`: the loss is computed under autocast; weights, averages and the optimiser stay float32.
    `sample`: called with the step, every `settings.sample_every`, while the module holds the averages.
    `critic`: the part of the module that plays against the rest: clipped apart, and with less momentum.
    `memory`: of the loss, kept with the state of the first process.
    `origin`: what the weights come from, kept with the state too. CheckpointError where the saved state has
    another, or another seed; what counts is said in `training.origin`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_file = folder / f"{name}.pt"
    optimizer = new_optimizer(module, settings, critic)
    origin = {"seed": str(seed), **(origin or {})}
    start, averages = _resume(state_file, module, optimizer, memory, origin)
    average = Average(module, settings.ema_decay, averages)
    module.train()
    total, since = 0.0, start
    with ExitStack() as stack:
        curve = None
        if workers.leads and start < settings.steps:
            curve = stack.enter_context(Curve(folder, name, start, report, tensorboard))
        for step in range(start, settings.steps):
            try:
                value = advance(module, optimizer, loss, settings, step, seed, workers, bfloat16)
            except NonFiniteOutput as error:
                raise NonFiniteOutput(f"{name}: {error}; the last good state is {state_file}") from None
            if settings.ema_decay:
                average.update(module, step)
            total += value
            if curve is None:
                continue
            done = step + 1
            last = done == settings.steps
            if done % LINE_EVERY == 0 or last:
                curve.add(done, settings.steps, total / (done - since), settings.rate(step))
                total, since = 0.0, done
            if settings.keep_every and done % settings.keep_every == 0:
                kept = average.values if settings.ema_decay else module.state_dict()
                save_tensors(folder / f"{name}-{done}.pt", kept)
            if done % settings.save_every == 0 or last:
                _save(state_file, done, module, optimizer, average, memory, origin)
                curve.draw()
            if sample is not None and settings.sample_every and (done % settings.sample_every == 0 or last):
                with average.swapped_in(module):
                    sample(done)
    workers.wait()
    if settings.ema_decay:
        module.load_state_dict(average.values, strict=False)
    module.eval()


def new_optimizer(
    module: nn.Module, settings: FitSettings, critic: nn.Module | None = None
) -> torch.optim.AdamW:
    """AdamW over the module's parameters, with those of the critic in a group of their own, of less momentum.
    (betas: Radford et al. 2015, arXiv:1511.06434)
    """
    apart = list(critic.parameters()) if critic is not None else []
    rest = [parameter for parameter in module.parameters() if not any(parameter is p for p in apart)]
    groups: list[dict[str, Any]] = [{"params": rest}]
    if apart:
        groups.append({"params": apart, "betas": (0.5, 0.9)})
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=settings.weight_decay,
        fused=True,
    )


def advance(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    settings: FitSettings,
    step: int,
    seed: int,
    workers: Workers = ALONE,
    bfloat16: bool = False,
) -> float:
    """One step of `fit`, without its average: gradients of all passes, clipped group by group, and an update
    at the step's rate. Returns the mean loss; NonFiniteOutput, and no update, where it or the gradient is NaN
    or Inf.
    """
    value = _backward(module, loss, step, seed, settings.accumulate, workers, bfloat16)
    if not math.isfinite(value):
        raise NonFiniteOutput(f"the loss is {value} at step {step}")
    for group in optimizer.param_groups:
        group["lr"] = settings.rate(step)
        norm = float(nn.utils.clip_grad_norm_(group["params"], settings.clip or math.inf))
        if not math.isfinite(norm):
            raise NonFiniteOutput(f"the gradient's norm is {norm} at step {step}")
    optimizer.step()
    return value


def _backward(
    module: nn.Module,
    loss: Loss,
    step: int,
    seed: int,
    accumulate: int,
    workers: Workers,
    bfloat16: bool,
) -> float:
    """Leave the mean gradient of a step's passes, over all processes, in the module; return the mean loss."""
    device = next(module.parameters()).device
    passes = accumulate * workers.count
    module.zero_grad(set_to_none=True)
    value = torch.zeros((), device=device)
    for part in range(workers.rank, passes, workers.count):
        generator = numbered_generator(seed, step * passes + part)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            share = loss(step, generator) / passes
        share.backward()
        value += share.detach()
    workers.summed([*gradients(module), value])
    return float(value)


def numbered_generator(seed: int, number: int) -> torch.Generator:
    """Generator `number` of a seed, on the CPU. PyTorch's reads 32 bits alone; those of one seed lie a golden
    section of them away from those of the next.
    """
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + number) % 2**32)


def _save(
    file: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average,
    memory: Memory | None,
    origin: Origin,
) -> None:
    state = {
        "step": step,
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average.values,
        "memory": {} if memory is None else memory.state_dict(),
        "origin": dict(origin),
    }
    save_tensors(file, state)


def _resume(
    file: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    memory: Memory | None,
    origin: Origin,
) -> tuple[int, Mapping[str, Tensor]]:
    """Load the saved state, if any, and return the step to go on from and the averages at it. Of the
    optimiser its moments are taken up; its settings stay those asked for now.
    """
    if not file.exists():
        return 0, {}
    device = next(module.parameters()).device
    state: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
    refuse_another(file, state.get("origin"), origin)
    asked = [
        {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]
    try:
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        for group, settings in zip(optimizer.param_groups, asked, strict=True):
            group.update(settings)
        if memory is not None:
            memory.load_state_dict(state.get("memory", {}))
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            file, None, f"is the state of another configuration: {first_line(error)}"
        ) from None
    return int(state["step"]), state["average"]
