"""What a diffusion model is trained for: which loss, how weighted, at which times; and the loss itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastldm.checks import choice, number
from fastldm.diffusion.losses import absolute_loss, min_snr_weight, simple_loss
from fastldm.diffusion.parameterization import add_noise, split_variance, target
from fastldm.diffusion.scheduler_config import SchedulerConfig
from fastldm.diffusion.schedules import shift_sigmas
from fastldm.diffusion.timesteps import (
    LossSecondMoment,
    logit_normal_sigmas,
    uniform_sigmas,
    uniform_times,
)
from fastldm.diffusion.variational import Chain, bound_term
from fastldm.errors import InvalidArgument

LOSSES = ("simple", "absolute", "hybrid", "vlb")
WEIGHTINGS = ("uniform", "min_snr")
TIMESTEPS = ("uniform", "loss_second_moment", "logit_normal")


@dataclass(frozen=True)
class Objective:
    """What training minimises. What the net predicts, and its variance, stand in the SchedulerConfig.

    loss        simple    L_simple, the mean squared error of the prediction (Ho et al. 2020, eq. 14)
                absolute  its mean absolute error (some models of Rombach et al. 2022)
                hybrid    L_simple + vlb_weight * L_vlb, where L_vlb trains the learned variance alone
                vlb       L_vlb, the variational bound in bits per dimension (Nichol & Dhariwal 2021)
    weighting   uniform, or min_snr: the error of x0 weighs min(SNR, gamma) (Hang et al. 2023)
    timesteps   uniform; loss_second_moment, in proportion to it, for vlb above all (Nichol & Dhariwal 2021);
                or for a flow model logit_normal (Esser et al. 2024), moved towards noise by config.shift

    Raises InvalidArgument for a value, and for a pair that contradicts itself.
    """

    loss: str = "simple"
    weighting: str = "uniform"
    timesteps: str = "uniform"
    gamma: float = 5.0
    vlb_weight: float = 1e-3
    logit_mean: float = 0.0
    logit_deviation: float = 1.0

    def __post_init__(self) -> None:
        choice("loss", self.loss, LOSSES)
        choice("weighting", self.weighting, WEIGHTINGS)
        choice("timesteps", self.timesteps, TIMESTEPS)
        number("gamma", self.gamma, 1e-6, 1e6)
        number("vlb_weight", self.vlb_weight, 0, 1e6)
        number("logit_mean", self.logit_mean, -100, 100)
        number("logit_deviation", self.logit_deviation, 1e-6, 100)
        if self.weighting == "min_snr" and self.loss in ("absolute", "vlb"):
            raise InvalidArgument("weighting", "min_snr", f"uniform with loss {self.loss}")
        for name, key, value in (
            ("gamma", "weighting", "min_snr"),
            ("vlb_weight", "loss", "hybrid"),
            ("logit_mean", "timesteps", "logit_normal"),
            ("logit_deviation", "timesteps", "logit_normal"),
        ):
            given = getattr(self, name)
            if getattr(self, key) != value and given != getattr(Objective, name):
                raise InvalidArgument(name, given, f"absent without {key} = {value}")

    def check(self, config: SchedulerConfig) -> None:
        """Raise InvalidArgument where this is no objective for a model of this config."""
        flow, learned = config.prediction == "flow", config.variance_type.startswith("learned")
        if flow and self.loss in ("hybrid", "vlb"):
            raise InvalidArgument("loss", self.loss, "simple or absolute for a flow model")
        if flow != (self.timesteps == "logit_normal") and self.timesteps != "uniform":
            allowed = f"uniform or {'logit_normal' if flow else 'loss_second_moment'} for this model"
            raise InvalidArgument("timesteps", self.timesteps, allowed)
        if self.loss == "hybrid" and not learned:
            allowed = "learned_range or learned with loss hybrid, which trains nothing else by L_vlb"
            raise InvalidArgument("variance_type", config.variance_type, allowed)
        if self.loss in ("simple", "absolute") and learned:
            allowed = f"a fixed one with loss {self.loss}, which does not train it"
            raise InvalidArgument("variance_type", config.variance_type, allowed)


class Places(NamedTuple):
    """Where in the process rows stand, [rows] each on the CPU: the model's time and the level float64, the
    step of the chain int64 or, of a flow, None, and the draw's weight float64.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    step: Tensor | None
    weight: Tensor


class Criterion:
    """An objective for a training process: noises clean rows, asks the model, and returns a loss a row.

    Stateless but for the losses that loss_second_moment remembers; `state_dict` keeps them for a resumed run.
    Where several processes train together, `gathered` gives the rows [all rows] of all from those of each, so
    that they remember the same.
    """

    def __init__(
        self,
        objective: Objective,
        config: SchedulerConfig,
        gathered: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> None:
        objective.check(config)
        self.objective, self.config, self.gathered = objective, config, gathered
        self.chain = None if config.prediction == "flow" else Chain.of(config)
        resamples = objective.timesteps == "loss_second_moment"
        self.resampler = LossSecondMoment(config.num_train_timesteps) if resamples else None

    def __call__(
        self, model: Callable[..., Tensor], clean: Tensor, *condition: Any, generator: torch.Generator
    ) -> Tensor:
        """The losses of clean rows float32 [rows, C, ...], to be averaged: [rows].

        model(x, t float32 [rows], *condition) → out, of 2C channels where the variance is learned. The CPU
        generator draws first the noise, then the times. Resampled losses are weighted so that their mean is
        that of uniform times. Raises InvalidArgument for another number of channels.
        """
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        places = self.draw(len(clean), generator)
        x = add_noise(clean, noise, places.alpha, places.sigma)
        out = model(x, places.t.to(clean.device, torch.float32), *condition).to(clean.dtype)
        losses = self.losses(clean, noise, x, out, places)
        if self.resampler is not None and places.step is not None:
            steps = self.gathered(places.step.to(losses.device))
            self.resampler.update(steps, self.gathered(losses.detach()))
        return losses * places.weight.to(losses)

    def draw(self, rows: int, generator: torch.Generator) -> Places:
        """Times for so many rows, as the objective says."""
        if self.chain is None:
            o = self.objective
            if o.timesteps == "logit_normal":
                sigma = logit_normal_sigmas(rows, o.logit_mean, o.logit_deviation, generator)
            else:
                sigma = uniform_sigmas(rows, generator)
            sigma = shift_sigmas(sigma, self.config.shift)
            length = self.config.num_train_timesteps
            return Places(sigma * length, 1 - sigma, sigma, None, torch.ones_like(sigma))
        if self.resampler is None:
            return self.at(uniform_times(len(self.chain), rows, generator))
        step, weight = self.resampler.draw(rows, generator)
        return self.at(step)._replace(weight=weight)

    def at(self, step: Tensor) -> Places:
        """These steps int64 [rows] of the chain; a flow has none."""
        assert self.chain is not None
        alpha, sigma = self.chain.levels(step)
        return Places(self.chain.times[step].double(), alpha, sigma, step, torch.ones_like(alpha))

    def losses(self, clean: Tensor, noise: Tensor, x: Tensor, out: Tensor, places: Places) -> Tensor:
        """The losses of the model's answer `out` at x, which is `clean` with this noise; without the draw's
        weight: [rows].
        """
        chain, step = self.chain, places.step
        learned = chain is not None and chain.learned
        predicted, place = split_variance(out, clean.shape[1], learned)
        if chain is None or step is None or self.objective.loss in ("simple", "absolute"):
            return self._error(clean, noise, predicted, places)
        if self.objective.loss == "vlb" or place is None:
            return len(chain) * bound_term(chain, clean, x, out, step)
        frozen = torch.cat([predicted.detach(), place], 1)  # the bound is to train the variance alone
        bound = len(chain) * bound_term(chain, clean, x, frozen, step)
        return self._error(clean, noise, predicted, places) + self.objective.vlb_weight * bound

    def _error(self, clean: Tensor, noise: Tensor, predicted: Tensor, places: Places) -> Tensor:
        prediction = self.config.prediction
        wanted = target(prediction, clean, noise, places.alpha, places.sigma)
        if self.objective.loss == "absolute":
            return absolute_loss(predicted, wanted)
        losses = simple_loss(predicted, wanted)
        if self.objective.weighting == "min_snr":
            weight = min_snr_weight(prediction, places.alpha, places.sigma, self.objective.gamma)
            losses = losses * weight.to(losses)
        return losses

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs beside weights and generator; often nothing."""
        return {} if self.resampler is None else self.resampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up a saved state; InvalidArgument where it is of another objective."""
        if self.resampler is not None:
            self.resampler.load_state_dict(state)
        elif state:
            raise InvalidArgument("state", sorted(state), "empty with these timesteps")
