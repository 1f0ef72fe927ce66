"""scheduler_config.json of a diffusers folder: a model's training process, and how its author samples it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastldm.diffusion.parameterization import VARIANCES
from fastldm.diffusion.schedules import BETA_SCHEDULES, SPACINGS, rescale_zero_terminal_snr
from fastldm.errors import CheckpointError, InvalidArgument

# Classes whose numbers these samplers give.
_HONOURED = {
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DDPMParallelScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "FlowMatchEulerDiscreteScheduler": "flow_euler",
}
# Classes that run as their nearest relative. Any other class with a beta schedule runs as ddim.
_NEAREST = {
    "PNDMScheduler": "ddim",
    "LMSDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "euler",
    "KDPM2DiscreteScheduler": "euler",
    "KDPM2AncestralDiscreteScheduler": "euler_a",
    "DPMSolverSinglestepScheduler": "dpmpp_2m",
    "DPMSolverSDEScheduler": "dpmpp_2m",
    "DEISMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "dpmpp_2m",
    "SASolverScheduler": "dpmpp_2m",
    "FlowMatchHeunDiscreteScheduler": "flow_euler",
}
# Classes with defaults of their own, where they change numbers; the common ones are those of DDIM.
_K_DEFAULTS: dict[str, object] = {"beta_start": 0.00085, "beta_end": 0.012}
_OWN_DEFAULTS: dict[str, dict[str, object]] = {
    "PNDMScheduler": {"set_alpha_to_one": False},
    "HeunDiscreteScheduler": _K_DEFAULTS,
    "KDPM2DiscreteScheduler": _K_DEFAULTS,
    "KDPM2AncestralDiscreteScheduler": _K_DEFAULTS,
    "DPMSolverSDEScheduler": _K_DEFAULTS,
    "LCMScheduler": {**_K_DEFAULTS, "beta_schedule": "scaled_linear"},
    "TCDScheduler": {**_K_DEFAULTS, "beta_schedule": "scaled_linear"},
}
# Fields that change nothing here: notes, options of switches that are off or of solvers that run as another.
_INERT = frozenset(
    "skip_prk_steps tensor_format dynamic_thresholding_ratio sample_max_value flow_shift time_shift_type"
    " base_shift max_shift base_image_seq_len max_image_seq_len original_inference_steps timestep_scaling"
    " predict_x0 solver_p disable_corrector predictor_order corrector_order noise_sampler_seed".split()
)
# Fields that change numbers and are followed at this value only.
_ONLY_AT: dict[str, object] = {
    "thresholding": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "stochastic_sampling": False,
    "invert_sigmas": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "predict_epsilon": True,
    "shift_terminal": None,
}

_Check = tuple[Callable[[Any], bool], str]


def _integer(low: int, high: int) -> _Check:
    return lambda v: type(v) is int and low <= v <= high, f"an integer from {low} to {high}"


def _number(low: float, high: float) -> _Check:
    return lambda v: type(v) in (int, float) and low < v < high, f"a number between {low:g} and {high:g}"


def _choice(*names: str) -> _Check:
    return lambda v: type(v) is str and v in names, "one of " + ", ".join(names)


def _or_none(check: _Check) -> _Check:
    return lambda v: v is None or check[0](v), check[1]


_FLAG: _Check = (lambda v: type(v) is bool, "true or false")
_CHECKS: dict[str, _Check] = {
    "num_train_timesteps": _integer(2, 100_000),
    "prediction_type": _choice("epsilon", "v_prediction", "sample", "original_sample"),
    "beta_start": _number(0, 1),
    "beta_end": _number(0, 1),
    "beta_schedule": _choice(*BETA_SCHEDULES),
    "trained_betas": (
        lambda v: v is None or (type(v) is tuple and all(type(b) is float and 0 < b < 1 for b in v)),
        "a list of num_train_timesteps numbers between 0 and 1",
    ),
    "rescale_betas_zero_snr": _FLAG,
    "timestep_spacing": _or_none(_choice(*SPACINGS)),
    "steps_offset": _integer(0, 99_999),
    "set_alpha_to_one": _FLAG,
    "clip_sample": _or_none(_FLAG),
    "clip_sample_range": _number(0, math.inf),
    "variance_type": _choice(*VARIANCES),
    "use_karras_sigmas": _FLAG,
    "use_exponential_sigmas": _FLAG,
    "sigma_min": _or_none(_number(0, math.inf)),
    "sigma_max": _or_none(_number(0, math.inf)),
    "final_sigmas_type": _choice("zero", "sigma_min"),
    "solver_order": _integer(1, 3),
    "solver_type": _choice("midpoint", "heun", "logrho", "bh1", "bh2"),
    "algorithm_type": _choice("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver", "deis"),
    "lower_order_final": _FLAG,
    "euler_at_final": _FLAG,
    "lambda_min_clipped": (lambda v: type(v) in (int, float) and v < math.inf, "a number, or -Infinity"),
    "shift": _number(0, math.inf),
}


@dataclass(frozen=True)
class SchedulerConfig:
    """A model's training process and its author's sampling settings, under diffusers' names and defaults.

    Two defaults depend on the sampler and are None until a file sets them: `timestep_spacing` (leading for
    ddim and ddpm, else linspace) and `clip_sample` (on for the classes that clip, DDIM and DDPM; off where
    the file of another class runs with those samplers). Raises InvalidArgument for a bad value.
    """

    class_name: str = "DDIMScheduler"
    num_train_timesteps: int = 1000
    prediction_type: str = "epsilon"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip_sample: bool | None = None
    clip_sample_range: float = 1.0
    variance_type: str = "fixed_small"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"
    solver_order: int = 2
    solver_type: str = "midpoint"
    algorithm_type: str = "dpmsolver++"
    lower_order_final: bool = True
    euler_at_final: bool = False
    lambda_min_clipped: float = -math.inf
    shift: float = 1.0
    inert: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for name, (holds, allowed) in _CHECKS.items():
            value = getattr(self, name)
            if not holds(value):
                raise InvalidArgument(name, value, allowed)
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise InvalidArgument("trained_betas", self.trained_betas, f"{self.num_train_timesteps} numbers")
        if self.use_karras_sigmas and self.use_exponential_sigmas:
            raise InvalidArgument("use_exponential_sigmas", True, "false with use_karras_sigmas")

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any], *, file: str = "scheduler_config.json") -> SchedulerConfig:
        """The config of a parsed scheduler_config.json; null means not given.

        Raises CheckpointError, naming `file` and the field, for a bad value, for a setting that is not
        followed, and for an unknown field unless it is false: it may change numbers.
        """
        given = {key: value for key, value in entries.items() if value is not None and key[:1] != "_"}
        name = entries.get("_class_name")
        betas = any(key.startswith("beta_") for key in given)
        if not isinstance(name, str) or not (betas or name in _HONOURED or name in _NEAREST):
            raise CheckpointError(file, "_class_name", f"fastldm has nothing near a scheduler {name!r}")
        values: dict[str, Any] = {"class_name": name, **_OWN_DEFAULTS.get(name, {})}
        inert: dict[str, Any] = {}
        for key, value in given.items():
            value = tuple(value) if isinstance(value, list) else value
            if key in _INERT:
                inert[key] = value
            elif key in _ONLY_AT:
                if value != _ONLY_AT[key]:
                    raise CheckpointError(file, key, f"{value!r} is not supported, only {_ONLY_AT[key]!r}")
            elif key in _CHECKS:
                values[key] = value
            elif value is not False:
                raise CheckpointError(file, key, f"unknown, and {value!r} may change what the model computes")
        try:
            config = cls(**values, inert=tuple(inert.items()))
            if config.prediction != "flow":
                alphas_cumprod(config)
            return config
        except InvalidArgument as error:
            raise CheckpointError(file, error.name, f"{error.value!r}: allowed is {error.allowed}") from None

    def to_dict(self) -> dict[str, Any]:
        """What scheduler_config.json holds for this config; `from_dict` of it gives an equal config."""
        always = {"num_train_timesteps"}
        if self.prediction != "flow":
            always |= {"beta_start", "beta_end", "beta_schedule", "prediction_type"}
        entries: dict[str, Any] = {"_class_name": self.class_name}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in always or (field.name in _CHECKS and value != field.default):
                entries[field.name] = value
        entries.update(self.inert)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in entries.items()}

    @property
    def sampler(self) -> str:
        """The sampler that runs this class: its own, or the nearest."""
        return _HONOURED.get(self.class_name) or _NEAREST.get(self.class_name, "ddim")

    @property
    def prediction(self) -> str:
        """What the net predicts, one of PREDICTIONS."""
        if self.sampler.startswith("flow"):
            return "flow"
        return "sample" if self.prediction_type == "original_sample" else self.prediction_type

    @property
    def samplers(self) -> tuple[str, ...]:
        """The samplers that this training process can run with."""
        from fastldm.diffusion.samplers import SAMPLERS  # which is built on this module

        flow = self.prediction == "flow"
        return tuple(name for name in SAMPLERS if name.startswith("flow") == flow)

    @property
    def clip_range(self) -> float:
        """The bound that ddim and ddpm hold x0 to; infinite where they do not clip."""
        clips = self.clip_sample
        if clips is None:
            clips = _HONOURED.get(self.class_name) in ("ddim", "ddpm")
        return self.clip_sample_range if clips else math.inf

    @property
    def warnings(self) -> tuple[str, ...]:
        """What runs otherwise than the file says, one sentence each."""
        said = []
        if self.class_name not in _HONOURED:
            said.append(f"scheduler {self.class_name} runs as its nearest relative, {self.sampler!r}")
        elif self.sampler == "dpmpp_2m":
            if self.solver_order == 3:
                said.append("solver_order 3 runs as order 2")
            if self.algorithm_type in ("dpmsolver", "sde-dpmsolver"):
                said.append(f"algorithm_type {self.algorithm_type} runs as {self.algorithm_type}++")
        elif self.sampler == "ddim" and self.clip_range < math.inf:
            said.append("clip_sample: ddim takes the noise from the clipped x0, as use_clipped_model_output")
        return tuple(said)


def alphas_cumprod(config: SchedulerConfig) -> Tensor:
    """alpha_bar at every training time: float64 [num_train_timesteps], falling from below 1.

    It ends above 0, or at exactly 0 with rescale_betas_zero_snr. Raises InvalidArgument for a flow model and
    for betas so small or large that float64 cannot tell the levels apart.
    """
    if config.prediction == "flow":
        raise InvalidArgument("config", config.class_name, "a scheduler with a beta schedule")
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float64)
    else:
        schedule = BETA_SCHEDULES[config.beta_schedule]
        betas = schedule(config.num_train_timesteps, config.beta_start, config.beta_end)
    kept = (1 - betas).cumprod(0)
    if not (kept[0] < 1 and kept[-1] > 1e-30 and bool((kept.diff() < 0).all())):
        culprit = "beta_schedule" if config.trained_betas is None else "trained_betas"
        allowed = "betas with which alpha_bar falls at every step and stays above 1e-30"
        raise InvalidArgument(culprit, getattr(config, culprit), allowed)
    return rescale_zero_terminal_snr(kept) if config.rescale_betas_zero_snr else kept
