"""The variational bound on -log p(x0), in bits per dimension: its terms, for training and as a metric.

The chain is the whole training process or a strided part of it. Its reverse p(x_{t-1} | x_t) is a Gaussian
whose mean comes from the net's x0 and whose variance is fixed or, of twice as many channels, learned.
(Ho et al. 2020, eq. 5; Nichol & Dhariwal 2021, sections 3.1 and 3.3)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastldm.diffusion.likelihood import discretized_log_likelihood, normal_kl
from fastldm.diffusion.losses import Posterior, posterior
from fastldm.diffusion.parameterization import (
    add_noise,
    log_variance,
    per_row,
    split_variance,
    to_x0,
    variance_bounds,
)
from fastldm.diffusion.scheduler_config import SchedulerConfig, alphas_cumprod
from fastldm.diffusion.schedules import spaced_times
from fastldm.errors import InvalidArgument


class Reverse(NamedTuple):
    """p(x_{t-1} | x_t) = N(mean, exp(log_variance)), and the x0 behind it; all broadcast to x_t's shape."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor


class Bound(NamedTuple):
    """The bound in bits per dimension: total [rows] = prior [rows] + the sum of terms [rows, times].

    x0_mse [rows, times]: how far the net's x0 is from the truth, the distortion at that rate. Times rise.
    """

    total: Tensor
    prior: Tensor
    terms: Tensor
    x0_mse: Tensor


@dataclass(frozen=True)
class Chain:
    """A diffusion chain of n times, and what its net predicts. Tables are float64 [n], on the CPU.

    `times` int64 rise; the net is called with them. The log variance of the reverse step lies at or, learned,
    between `log_low` and `log_high`.
    """

    prediction: str
    learned: bool
    times: Tensor
    alphas_cumprod: Tensor
    posterior: Posterior
    log_low: Tensor
    log_high: Tensor

    @classmethod
    def of(cls, config: SchedulerConfig, steps: int | None = None) -> Chain:
        """The chain of a training process: all of it, or `steps` of its times, evenly from first to last.

        Raises InvalidArgument for a flow model, for `steps` out of range, and for a net that predicts noise
        where the chain ends without signal.
        """
        kept, length = alphas_cumprod(config), config.num_train_timesteps
        if config.prediction == "epsilon" and kept[-1] == 0:
            raise InvalidArgument(
                "prediction_type", "epsilon", "v_prediction or sample with zero terminal SNR"
            )
        times = torch.arange(length)
        if steps is not None:
            if type(steps) is not int or not 2 <= steps <= length:
                raise InvalidArgument("steps", steps, f"an integer from 2 to {length}")
            times = spaced_times("linspace", steps, length).round().long().flip(0)
        kept = kept[times]
        q = posterior(kept)
        log_betas = (1 - kept[1:] / kept[:-1]).log()
        # At the first time beta-tilde is 0: that of the second stands in, for fixed_large too.
        log_large = torch.cat([q.log_variance[:1], log_betas])
        if config.variance_type == "learned_range":
            log_large[0] = (1 - kept[0]).log()
        low, high = variance_bounds(config.variance_type, q.log_variance, log_large)
        learned = config.variance_type.startswith("learned")
        return cls(config.prediction, learned, times, kept, q, low, high)

    def __len__(self) -> int:
        return len(self.times)

    def levels(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of x at these steps of the chain: float64, shaped like `step`."""
        kept = self.alphas_cumprod[step]
        return kept.sqrt(), (1 - kept).sqrt()


def reverse(chain: Chain, x: Tensor, out: Tensor, step: Tensor, clamp: float = math.inf) -> Reverse:
    """The net's p(x_{t-1} | x_t), of its answer `out` at x [rows, C, ...]; step int64 [rows] into the chain,
    on the CPU.

    A learned variance is read from the second half of out's 2C channels. x0 is held to +-clamp. Raises
    InvalidArgument for another number of channels.
    """
    variance = per_row(chain.log_low[step], x)
    out, place = split_variance(out, x.shape[1], chain.learned)
    if place is not None:
        variance = log_variance(place, chain.log_low[step], chain.log_high[step])
    x0 = to_x0(chain.prediction, x, out, *chain.levels(step)).clamp(-clamp, clamp)
    return Reverse(_posterior_mean(chain, x0, x, step), variance, x0)


def bound_term(
    chain: Chain, x0: Tensor, x: Tensor, out: Tensor, step: Tensor, clamp: float = math.inf
) -> Tensor:
    """One term of the bound a row, in bits per dimension: [rows].

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at the first time -log p(x_0 | x_t) of 8-bit pixels.
    """
    return _term(chain, x0, x, reverse(chain, x, out, step, clamp), step)


def prior_bits(chain: Chain, x0: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || N(0, 1)) in bits per dimension: [rows]. No net can change it."""
    kept = chain.alphas_cumprod[-1]
    none = torch.zeros_like(kept)
    return _bits(normal_kl(kept.sqrt() * x0, (1 - kept).log(), none, none))


@torch.no_grad()
def bits_per_dimension(
    model: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    chain: Chain,
    noise: Iterable[Tensor],
    clamp: float = math.inf,
) -> Bound:
    """The whole bound on -log p(x0) of these rows: prior, every step and decoder; one pass of the net a time.

    x0 [rows, C, ...] are 8-bit pixels scaled to -1…1. model(x, t [rows]) → out. noise: unit noise shaped like
    x0, one a time from the last to the first; `unit_noise` draws it. A test set's mean total is its NLL.
    """
    rows, terms, errors = len(x0), [], []
    for back, drawn in zip(range(len(chain) - 1, -1, -1), noise, strict=False):
        step = torch.full((rows,), back)
        x = add_noise(x0, drawn, *chain.levels(step))
        out = model(x, chain.times[step].to(x0.device, torch.float32)).to(x.dtype)
        p = reverse(chain, x, out, step, clamp)
        terms.append(_term(chain, x0, x, p, step))
        errors.append((p.x0 - x0).square().flatten(1).mean(1))
    if len(terms) < len(chain):
        raise InvalidArgument("noise", f"{len(terms)} draws", f"one a time of the chain ({len(chain)})")
    prior, by_time = prior_bits(chain, x0), torch.stack(terms[::-1], 1)
    return Bound(prior + by_time.sum(1), prior, by_time, torch.stack(errors[::-1], 1))


def _term(chain: Chain, x0: Tensor, x: Tensor, p: Reverse, step: Tensor) -> Tensor:
    mean, variance = _posterior_mean(chain, x0, x, step), per_row(chain.posterior.log_variance[step], x)
    kl = normal_kl(mean, variance, p.mean, p.log_variance)
    decoder = -discretized_log_likelihood(x0, p.mean, 0.5 * p.log_variance)
    return _bits(torch.where(per_row(step, x) == 0, decoder, kl))


def _posterior_mean(chain: Chain, x0: Tensor, x: Tensor, step: Tensor) -> Tensor:
    """The mean of q(x_{t-1} | x_t, x_0)."""
    q = chain.posterior
    return per_row(q.mean_x0[step], x) * x0 + per_row(q.mean_xt[step], x) * x


def unit_noise(like: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Unit noise without end, of the shape, dtype and device of `like`; drawn on the generator's device."""
    while True:
        drawn = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=generator.device)
        yield drawn.to(like.device)


def _bits(nats: Tensor) -> Tensor:
    """The mean over all but the rows, in bits."""
    return nats.flatten(1).mean(1) / math.log(2)
