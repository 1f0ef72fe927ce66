"""What every stage of a run shares: its configuration, its device, its processes, where it reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fastldm.training.config import TrainConfig
from fastldm.training.fit import FitSettings, Loss, Memory, fit
from fastldm.training.origin import Origin
from fastldm.training.parallel import ALONE, Workers


@dataclass(frozen=True)
class Session:
    """A run under way."""

    config: TrainConfig
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    workers: Workers = ALONE
    report: Callable[[str], None] = print

    def say(self, text: str) -> None:
        """Report, from one of the processes."""
        if self.workers.leads:
            self.report(text)

    def fit(
        self,
        name: str,
        module: nn.Module,
        loss: Loss,
        settings: FitSettings,
        seed: int,
        sample: Callable[[int], None] | None = None,
        critic: nn.Module | None = None,
        memory: Memory | None = None,
        *,
        origin: Origin,
    ) -> None:
        """`fastldm.training.fit.fit` in this run's folder, its seeds counted from the run's."""
        fit(
            name,
            module,
            loss,
            settings,
            self.config.folder,
            self.config.seed + seed,
            self.report,
            self.config.bfloat16,
            workers=self.workers,
            sample=sample,
            tensorboard=self.config.tensorboard,
            critic=critic,
            memory=memory,
            origin=origin,
        )
