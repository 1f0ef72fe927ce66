"""Samplers as tables: one row of numbers a step, built before the first step runs.

Latents live in variance-preserving space for every sampler, so the net's input is never scaled:
x = alpha*x0 + sigma*noise with alpha^2 + sigma^2 = 1 (flow: alpha = 1 - sigma). One step is

    x0 = x0_x*x + x0_out*out, held to +-clamp
    x  = next_x*x + next_x0*x0 + next_prev*(x0 of the step before) + noise*randn

Where the net learns the variance, the noise of a step is noise*exp(log_variance/2)*randn.

A sampler is one function (config, steps, eta) -> Plan and one entry in SAMPLERS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastldm.diffusion.parameterization import variance_bounds, x0_coefficients
from fastldm.diffusion.scheduler_config import SchedulerConfig, alphas_cumprod
from fastldm.diffusion.schedules import (
    exponential_sigmas,
    interpolate,
    karras_sigmas,
    shift_sigmas,
    spaced_times,
    times_of_sigmas,
)
from fastldm.errors import InvalidArgument

COLUMNS = ("t", "x0_x", "x0_out", "next_x", "next_x0", "next_prev", "noise", "guidance", "clamp")

# Samplers with a free share of fresh noise; the others' is fixed.
TAKES_ETA = ("ddim", "ddim_compvis", "euler", "dpmpp_2m")

# diffusers' stand-in for alpha_bar = 0 in samplers that work in sigma = sqrt((1 - alpha_bar)/alpha_bar).
_TINY_ALPHA_BAR = 2.0**-24


class Grid(NamedTuple):
    """Each step's time, the level the net sees and the level the step lands on: float64 [steps]."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    next_alpha: Tensor
    next_sigma: Tensor


class Update(NamedTuple):
    """The columns that make the next x: float64 [steps]."""

    next_x: Tensor
    next_x0: Tensor
    next_prev: Tensor
    noise: Tensor


class Plan(NamedTuple):
    """A whole run: its grid, its updates, what unit noise is scaled by at the start, the bound on x0, and
    the bounds [steps, 2] of a learned log variance.
    """

    grid: Grid
    update: Update
    initial_scale: float = 1.0
    clamp: float = math.inf
    log_variances: Tensor | None = None


@dataclass(frozen=True)
class SamplerTable:
    """One request's n steps.

    `rows` float32 [n+1, len(COLUMNS)] (`rows64`: the same in float64) has a row a step, then the identity
    row, in which a finished request rests. `timesteps` float64 [n]. `draws[i]`: step i reads noise. Text to
    image starts from initial_scale*noise, image to image from start_alpha*x0 + start_sigma*noise.
    `log_variances` float64 [n, 2] or None: the bounds of the log variance that the net's second half of
    channels places (`parameterization.log_variance`). `levels` float64 [n, 2], None for an inverse: the alpha
    and sigma at which x stands before each step.
    """

    rows: Tensor
    rows64: Tensor
    timesteps: Tensor
    initial_scale: float
    start_alpha: float
    start_sigma: float
    draws: tuple[bool, ...]
    log_variances: Tensor | None = None
    levels: Tensor | None = None

    @property
    def levels_after(self) -> Tensor:
        """The alpha and sigma at which x stands after each step, the last clean: float64 [n, 2].
        InvalidArgument for an inverse.
        """
        if self.levels is None:
            raise InvalidArgument("table", "an inverse", "one of build_table")
        return torch.cat((self.levels[1:], self.levels.new_tensor([[1.0, 0.0]])))

    def row(self, step: int) -> dict[str, float]:
        """A step's numbers by column, in float64."""
        return dict(zip(COLUMNS, self.rows64[step].tolist(), strict=True))


def move(grid: Grid, eta: float) -> Update:
    """From level (a, s) to (a1, s1), keeping x0 and the noise but for a share eta that is drawn anew.

    DDIM (Song et al. 2021, eq. 12 and 16); with eta 0 the Euler step of the probability flow ODE, with 1 the
    ancestral step. Zero terminal SNR makes s1^2 - noise^2 a negative rounding error, held at 0.
    """
    _, a, s, a1, s1 = grid
    noise = eta * (s1 / s) * (1 - (a / a1) ** 2).clamp(min=0).sqrt()
    kept = (s1**2 - noise**2).clamp(min=0).sqrt()
    return Update(kept / s, a1 - kept * a / s, torch.zeros_like(s), noise)


def ddim(config: SchedulerConfig, steps: int, eta: float) -> Plan:
    """DDIM (Song et al. 2021); a step lands length // steps earlier, on or near the next time."""
    kept = alphas_cumprod(config)
    t = _integer_times(config, steps)
    before = t - config.num_train_timesteps // steps
    final = 1.0 if config.set_alpha_to_one else float(kept[0])
    landed = torch.where(before >= 0, kept[before.clamp(min=0)], final)
    grid = _vp_grid(t, kept[t], landed)
    return Plan(grid, move(grid, eta), clamp=config.clip_range)


def ddim_compvis(config: SchedulerConfig, steps: int, eta: float) -> Plan:
    """DDIM as the code of the latent diffusion paper runs it: every (length // steps)-th time from 1 on, as
    many as there are (31 for 30 steps of 1000), down to the level of time 0, without a bound on x0.

    Raises InvalidArgument for a number of steps whose times pass the end, with which the original crashes.
    """
    kept = alphas_cumprod(config)
    if not _fits_compvis(steps, len(kept)):
        near = (range(steps, 0, -1), range(steps, len(kept) + 1))
        found = (next((n for n in way if _fits_compvis(n, len(kept))), None) for way in near)
        named = " or ".join(str(n) for n in found if n is not None)
        raise InvalidArgument("steps", steps, f"{named} near it with ddim_compvis, whose times pass the end")
    t = torch.arange(1, len(kept) + 1, len(kept) // steps).flip(0)
    grid = _vp_grid(t, kept[t], torch.cat([kept[t[1:]], kept[:1]]))
    return Plan(grid, move(grid, eta))


def ddpm(config: SchedulerConfig, steps: int, eta: float) -> Plan:
    """The posterior from time to time (Ho et al. 2020, alg. 2): `move` with eta 1, or with another variance.

    A learned one draws unit noise, but for the last step (Nichol & Dhariwal 2021, sections 3.1 and 4).
    """
    kept = alphas_cumprod(config)
    t = _integer_times(config, steps)
    grid = _vp_grid(t, kept[t], torch.cat([kept[t[1:]], kept.new_ones(1)]))
    update = move(grid, 1.0)
    beta = 1 - (grid.alpha / grid.next_alpha) ** 2
    bounds = None
    if config.variance_type.startswith("fixed_large"):
        update = update._replace(noise=beta.sqrt() * (t > 0))
    elif config.variance_type.startswith("learned"):
        small = torch.where(update.noise > 0, update.noise**2, beta)  # the last step reads neither
        bounds = torch.stack(variance_bounds(config.variance_type, small.log(), beta.log()), 1)
        update = update._replace(noise=(update.noise > 0).double())
    return Plan(grid, update, clamp=config.clip_range, log_variances=bounds)


def euler(config: SchedulerConfig, steps: int, eta: float) -> Plan:
    """Euler's method in sigma (Karras et al. 2022, alg. 2, no churn); eta 1: k-diffusion's ancestral step.

    As in diffusers: where the spacing reaches sigma_max it starts from sigma_max*noise, not from
    sqrt(1 + sigma_max^2)*noise, and a final sigma above 0 leaves x0 + sigma*noise, not divided by
    sqrt(1 + sigma^2).
    """
    table = _sigmas(config)
    spacing = config.timestep_spacing or "linspace"
    t = spaced_times(spacing, steps, len(table), config.steps_offset)
    sigma = interpolate(table, t)
    curved = _curve(config, steps, float(sigma[0]), float(sigma[-1]))
    if curved is not None:
        t, sigma = times_of_sigmas(table, curved), curved
    grid = _sigma_grid(config, t, sigma, float(table[0]))
    update = move(grid, eta)
    for column in update:
        column[-1] /= grid.next_alpha[-1]
    return Plan(grid, update, 1.0 if spacing == "leading" else float(grid.sigma[0]))


def euler_a(config: SchedulerConfig, steps: int, eta: float) -> Plan:
    """k-diffusion's Euler ancestral; as diffusers' class, only on the schedule's own sigmas and down to 0."""
    plain = replace(config, use_karras_sigmas=False, use_exponential_sigmas=False, final_sigmas_type="zero")
    return euler(plain, steps, 1.0)


def dpmpp_2m(config: SchedulerConfig, steps: int, eta: float) -> Plan:
    """DPM-Solver++(2M) (Lu et al. 2022, alg. 2); eta 1 is its SDE variant.

    `move` holds x0 constant over the step; the second order adds x0's slope in log SNR over the step before.
    """
    grid = _dpm_grid(config, steps)
    update = move(grid, 1.0 if config.algorithm_type.startswith("sde") else eta)
    log_snr = (grid.alpha / grid.sigma).log()
    ahead, behind = (grid.next_alpha / grid.next_sigma).log() - log_snr, log_snr - log_snr.roll(1)
    if config.solver_type == "heun":
        weight = grid.next_alpha + update.next_x0 / torch.log1p(-update.next_x0 / grid.next_alpha)
    else:
        weight = update.next_x0 / 2
    few = config.lower_order_final and steps < 15
    second = (update.next_x0 != 0) & (config.solver_order > 1)
    second[0] = False
    second[-1] &= not (config.final_sigmas_type == "zero" or config.euler_at_final or few)
    slope = torch.where(second, weight * ahead / behind, 0)
    return Plan(grid, update._replace(next_x0=update.next_x0 + slope, next_prev=-slope))


def flow_euler(config: SchedulerConfig, steps: int, eta: float) -> Plan:
    """Euler's method along x = (1 - sigma)*x0 + sigma*noise (Esser et al. 2024); t = sigma*length.

    The shift applies to the end points, then to every point, as in both reference implementations.
    """
    length = config.num_train_timesteps
    ends = shift_sigmas(torch.tensor([1.0, 1 / length], dtype=torch.float64), config.shift)
    even = torch.linspace(float(ends[0]), float(ends[1]), steps, dtype=torch.float64)
    sigma = shift_sigmas(even, config.shift)
    curved = _curve(config, steps, float(sigma[0]), float(sigma[-1]))
    sigma = sigma if curved is None else curved
    landed = torch.cat([sigma[1:], sigma.new_zeros(1)])
    grid = Grid(sigma * length, 1 - sigma, sigma, 1 - landed, landed)
    return Plan(grid, move(grid, 0.0))


SAMPLERS: dict[str, Callable[[SchedulerConfig, int, float], Plan]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "ddim_compvis": ddim_compvis,
    "euler": euler,
    "euler_a": euler_a,
    "dpmpp_2m": dpmpp_2m,
    "flow_euler": flow_euler,
}


def build_table(
    config: SchedulerConfig,
    steps: int,
    *,
    sampler: str | None = None,
    eta: float = 0.0,
    guidance_scale: float = 1.0,
    strength: float = 1.0,
) -> SamplerTable:
    """The table of one request: `steps` steps (ddim_compvis may make it some more), or with `strength` below
    1 the last of them, as in diffusers.

    `sampler` None is the config's own; another one keeps the training process and brings its own conventions.
    Raises InvalidArgument naming the argument.
    """
    name = config.sampler if sampler is None else sampler
    if name not in config.samplers:
        raise InvalidArgument("sampler", sampler, f"one of {', '.join(config.samplers)} for this model")
    _check("steps", steps, 1, config.num_train_timesteps, integer=True)
    _check("eta", eta, 0, 1)
    if eta != 0 and name not in TAKES_ETA:
        raise InvalidArgument("eta", eta, f"0 with sampler {name}; {', '.join(TAKES_ETA)} take more")
    _check("guidance_scale", guidance_scale, -1000, 1000)
    _check("strength", strength, 0, 1)
    plan = SAMPLERS[name](config, int(steps), float(eta))
    steps = len(plan.grid.t)
    start = _skipped(steps, strength, keep_part=config.prediction == "flow")
    if start == steps:
        raise InvalidArgument("strength", strength, f"at least {1 / steps:g}, which keeps 1 of {steps} steps")

    grid, update = (
        Grid(*(column[start:] for column in plan.grid)),
        Update(*(column[start:] for column in plan.update)),
    )
    if config.prediction == "epsilon" and bool((grid.alpha == 0).any()):
        allowed = "v_prediction or sample where the schedule reaches zero signal (rescale_betas_zero_snr)"
        raise InvalidArgument("prediction_type", config.prediction_type, allowed)
    # The first step has no step before it: what it would read of that step's x0 it takes from its own.
    update.next_x0[0] += update.next_prev[0]
    update.next_prev[0] = 0
    x0_x, x0_out = x0_coefficients(config.prediction, grid.alpha, grid.sigma)
    columns = {"t": grid.t, "x0_x": x0_x, "x0_out": x0_out, **update._asdict()}
    columns["guidance"] = torch.full_like(grid.t, guidance_scale)
    columns["clamp"] = torch.full_like(grid.t, plan.clamp)
    rest = {**dict.fromkeys(COLUMNS, 0.0), "next_x": 1.0, "clamp": math.inf}
    last = torch.tensor([[rest[name] for name in COLUMNS]], dtype=torch.float64)
    rows = torch.cat([torch.stack([columns[name] for name in COLUMNS], dim=1), last])
    return SamplerTable(
        rows=rows.float(),
        rows64=rows,
        timesteps=grid.t,
        initial_scale=plan.initial_scale,
        start_alpha=float(grid.alpha[0]),
        start_sigma=float(grid.sigma[0]),
        draws=tuple((update.noise != 0).tolist()),
        log_variances=None if plan.log_variances is None else plan.log_variances[start:],
        levels=torch.stack([grid.alpha, grid.sigma], dim=1),
    )


def _check(name: str, value: Any, low: float, high: float, *, integer: bool = False) -> None:
    number = hasattr(value, "__index__" if integer else "__float__") and not isinstance(value, bool)
    if not (number and low <= value <= high):
        raise InvalidArgument(name, value, f"{'an integer' if integer else 'a number'} from {low} to {high}")


def _skipped(steps: int, strength: float, *, keep_part: bool) -> int:
    """How many steps image to image leaves out; a step begun is kept by diffusers for SD3, dropped for SD."""
    if keep_part:
        return int(max(steps - min(steps * strength, steps), 0))
    return steps - min(int(steps * strength), steps)


def _fits_compvis(steps: int, length: int) -> bool:
    """Whether the last of the times 1, 1 + length // steps, ... is one of training."""
    gap = length // steps
    return (length - 1) // gap * gap + 1 < length


def _integer_times(config: SchedulerConfig, steps: int) -> Tensor:
    spacing = config.timestep_spacing or "leading"
    return spaced_times(spacing, steps, config.num_train_timesteps, config.steps_offset).round().long()


def _dpm_grid(config: SchedulerConfig, steps: int) -> Grid:
    """DPM-Solver's levels: whole times, though a curve's sigmas stand at fractional ones.

    A curve's times are rounded, or cut off where diffusers cuts them (1e-6 keeps whole ones whole).
    """
    table = _sigmas(config)
    curved = _curve(config, steps, float(table[-1]), float(table[0]))
    if curved is not None:
        t = times_of_sigmas(table, curved)
        rounds = config.use_karras_sigmas and config.beta_schedule != "squaredcos_cap_v2"
        return _sigma_grid(config, t.round() if rounds else (t + 1e-6).floor(), curved, float(table[0]))
    length = int((-table.log() >= config.lambda_min_clipped).sum())
    if steps > length:
        allowed = f"an integer from 1 to {length} with lambda_min_clipped={config.lambda_min_clipped:g}"
        raise InvalidArgument("steps", steps, allowed)
    spacing = config.timestep_spacing or "linspace"
    t = spaced_times(spacing, steps, length, config.steps_offset, past_end=True).round()
    return _sigma_grid(config, t, table[t.long()], float(table[0]))


def _vp_grid(t: Tensor, kept: Tensor, landed: Tensor) -> Grid:
    return Grid(t.double(), kept.sqrt(), (1 - kept).sqrt(), landed.sqrt(), (1 - landed).sqrt())


def _sigma_grid(config: SchedulerConfig, t: Tensor, sigma: Tensor, lowest: float) -> Grid:
    """The grid over falling sigma = noise/signal; the last step lands on 0, or on `lowest` where asked."""
    final = 0.0 if config.final_sigmas_type == "zero" else lowest
    landed = torch.cat([sigma[1:], sigma.new_tensor([final])])
    alpha, next_alpha = (1 + sigma**2).rsqrt(), (1 + landed**2).rsqrt()
    return Grid(t, alpha, sigma * alpha, next_alpha, landed * next_alpha)


def _sigmas(config: SchedulerConfig) -> Tensor:
    """noise/signal at every training time, rising and finite."""
    kept = alphas_cumprod(config)
    if config.rescale_betas_zero_snr:
        kept[-1] = _TINY_ALPHA_BAR
    return ((1 - kept) / kept).sqrt()


def _curve(config: SchedulerConfig, steps: int, first: float, last: float) -> Tensor | None:
    """The sigmas of a schedule made in sigma space, or None where the config asks for none."""
    first = first if config.sigma_max is None else config.sigma_max
    last = last if config.sigma_min is None else config.sigma_min
    if config.use_karras_sigmas:
        return karras_sigmas(steps, first, last)
    return exponential_sigmas(steps, first, last) if config.use_exponential_sigmas else None
