"""The diffusion process: schedules, parameterisations, scheduler configs, sampler tables, objectives."""

from fastldm.diffusion.inversion import INVERTIBLE, inverse_table
from fastldm.diffusion.loop import Known, denoise, sample
from fastldm.diffusion.losses import (
    Posterior,
    absolute_loss,
    min_snr_weight,
    posterior,
    q_sample,
    simple_loss,
)
from fastldm.diffusion.objective import Criterion, Objective
from fastldm.diffusion.parameterization import PREDICTIONS, VARIANCES, add_noise, target, to_x0
from fastldm.diffusion.plms import plms
from fastldm.diffusion.samplers import COLUMNS, SAMPLERS, SamplerTable, build_table
from fastldm.diffusion.scheduler_config import SchedulerConfig, alphas_cumprod
from fastldm.diffusion.timesteps import LossSecondMoment
from fastldm.diffusion.variational import Bound, Chain, bits_per_dimension, bound_term, reverse, unit_noise

__all__ = [
    "COLUMNS",
    "INVERTIBLE",
    "PREDICTIONS",
    "SAMPLERS",
    "VARIANCES",
    "Bound",
    "Chain",
    "Criterion",
    "Known",
    "LossSecondMoment",
    "Objective",
    "Posterior",
    "SamplerTable",
    "SchedulerConfig",
    "absolute_loss",
    "add_noise",
    "alphas_cumprod",
    "bits_per_dimension",
    "bound_term",
    "build_table",
    "denoise",
    "inverse_table",
    "min_snr_weight",
    "plms",
    "posterior",
    "q_sample",
    "reverse",
    "sample",
    "simple_loss",
    "target",
    "to_x0",
    "unit_noise",
]
