"""What files do not say: the schedulers of single files, those of Stable Diffusion's own folders, and what a
family can be asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastldm.abilities import Abilities

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

ABILITIES = "_fastldm"
"""Where a folder's model_index.json, and the metadata of a single file, say what a model can be asked for."""


def default_abilities(family: str) -> Abilities:
    """What every model of a family can be asked for."""
    return Abilities(needs="mask") if family.endswith("-inpaint") else Abilities()


def read_abilities(family: str, stated: object, file: Path) -> Abilities:
    """What a model says that it can be asked for, else what its family can; CheckpointError names a wrong
    field.
    """
    return default_abilities(family) if stated is None else Abilities.from_dict(stated, str(file), ABILITIES)
