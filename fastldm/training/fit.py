"""One optimisation loop for every stage: seeded, resumable at any step, with warm-up, cosine decay,
clipping and EMA.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastldm.checkpoint.atomic import replacing
from fastldm.errors import CheckpointError, NonFiniteOutput


@dataclass(frozen=True)
class FitSettings:
    """How a stage is optimised: AdamW with linear warm-up and, in the last share `decay` of the steps, cosine
    decay of the learning rate to zero.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 100
    decay: float = 1.0
    weight_decay: float = 0.01
    clip: float = 1.0
    ema_decay: float = 0.0  # 0: no moving average
    save_every: int = 500
    keep_every: int = 0  # steps between averages that are kept for good; 0: none

    def rate(self, step: int) -> float:
        """Learning rate at a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        start = max(self.warmup, round(self.steps * (1 - self.decay)))
        done = (step - start) / max(self.steps - start, 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))


class Average:
    """Exponential moving average of a module's parameters: decay min(decay, (1 + n) / (10 + n)) at update
    n.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
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
        """Within the block the module holds the averages."""
        kept = {name: p.detach().clone() for name, p in module.named_parameters()}
        module.load_state_dict(self.values, strict=False)
        try:
            yield
        finally:
            module.load_state_dict(kept, strict=False)


def fit(
    name: str,
    module: nn.Module,
    loss: Callable[[int, torch.Generator], Tensor],
    settings: FitSettings,
    folder: Path,
    seed: int,
    report: Callable[[str], None] = print,
    bfloat16: bool = False,
) -> None:
    """Minimise loss(step, generator) over the module's parameters; ends with the averaged weights in the
    module.

    `bfloat16`: the loss is computed under autocast; weights, averages and the optimiser stay float32.

    Every step draws from a generator seeded by (seed, step), so a run resumed from `folder/name.pt` equals
    an unbroken one. The state is written to a temporary name and renamed; `folder/name.csv` gets step,
    loss, learning rate and seconds. A loss that is NaN or Inf raises NonFiniteOutput and leaves the last
    saved state.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_file = folder / f"{name}.pt"
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    average = Average(module, settings.ema_decay)
    start = _resume(state_file, module, optimizer, average)
    module.train()
    began, total = time.perf_counter(), torch.zeros(())
    with open(folder / f"{name}.csv", "a" if start else "w", newline="") as log:
        curve = csv.writer(log)
        for step in range(start, settings.steps):
            generator = torch.Generator().manual_seed((seed << 32) + step)
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                value = loss(step, generator)
            if not torch.isfinite(value.detach()):
                raise NonFiniteOutput(
                    f"{name}: the loss is {value.item()} at step {step}; the last good state is {state_file}"
                )
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(module.parameters(), settings.clip)
            optimizer.step()
            if settings.ema_decay:
                average.update(module, step)
            total += value.detach()
            if (step + 1) % 50 == 0 or step + 1 == settings.steps:
                span = (step - start) % 50 + 1
                seconds = time.perf_counter() - began
                curve.writerow(
                    [step + 1, f"{float(total) / span:.5f}", f"{settings.rate(step):.2e}", f"{seconds:.1f}"]
                )
                log.flush()
                left = seconds / (step + 1 - start) * (settings.steps - step - 1)
                done = f"{name} {step + 1}/{settings.steps}"
                report(f"{done}  loss {float(total) / span:.4f}  {left / 60:.1f} min left")
                total.zero_()
            if settings.keep_every and (step + 1) % settings.keep_every == 0:
                with replacing(folder / f"{name}-{step + 1}.pt") as temporary:
                    torch.save(average.values if settings.ema_decay else module.state_dict(), temporary)
            if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                _save(state_file, step + 1, module, optimizer, average)
    if settings.ema_decay:
        module.load_state_dict(average.values, strict=False)
    module.eval()


def _save(
    file: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, average: Average
) -> None:
    state = {
        "step": step,
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average.values,
    }
    with replacing(file) as temporary:
        torch.save(state, temporary)


def _resume(file: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: Average) -> int:
    """Load the saved state, if any, and return the step to go on from."""
    if not file.exists():
        return 0
    state: dict[str, Any] = torch.load(file, weights_only=True)
    try:
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            file, None, f"is the state of another configuration: {str(error).splitlines()[0]}"
        ) from None
    average.values = state["average"]
    return int(state["step"])
