"""The diffusion process: schedules, parameterisations, scheduler configs, sampler tables, targets."""

from fastldm.diffusion.losses import Posterior, posterior, q_sample, simple_loss
from fastldm.diffusion.parameterization import PREDICTIONS, add_noise, target, to_x0
from fastldm.diffusion.samplers import COLUMNS, SAMPLERS, SamplerTable, build_table
from fastldm.diffusion.scheduler_config import SchedulerConfig, alphas_cumprod

__all__ = [
    "COLUMNS",
    "PREDICTIONS",
    "SAMPLERS",
    "Posterior",
    "SamplerTable",
    "SchedulerConfig",
    "add_noise",
    "alphas_cumprod",
    "build_table",
    "posterior",
    "q_sample",
    "simple_loss",
    "target",
    "to_x0",
]
