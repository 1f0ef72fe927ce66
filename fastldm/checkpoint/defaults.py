"""Scheduler configurations for single files, which hold none: those of Stable Diffusion's own folders."""

from __future__ import annotations

from typing import Any

_BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "trained_betas": None,
}
_DDIM = {
    "_class_name": "DDIMScheduler",
    **_BETAS,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_PNDM = {
    "_class_name": "PNDMScheduler",
    **_BETAS,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

SCHEDULERS: dict[str, dict[str, Any]] = {
    "sd1": _PNDM,
    "sd1-inpaint": _DDIM,
    "sd2": _DDIM,
    "sd2-inpaint": _DDIM,
}
