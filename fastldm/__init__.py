"""fastldm runs latent diffusion models, as fast as the hardware allows, without changing what they compute.

import fastldm
fastldm.generate("three black stars on a white background", steps=25).save("stars.png")
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastldm.errors import (
    BackendUnavailable,
    CheckpointError,
    FastLDMError,
    InvalidArgument,
    NonFiniteOutput,
    OutOfMemory,
)

if TYPE_CHECKING:
    from fastldm.api import generate, load
    from fastldm.canvas import padded
    from fastldm.interpolation import interpolate
    from fastldm.inversion import invert
    from fastldm.pipeline import Pipeline
    from fastldm.result import Result
    from fastldm.shortcuts import Shortcuts
    from fastldm.verification import verify

__version__ = "0.1.0"

_LAZY = {
    "generate": "api",
    "interpolate": "interpolation",
    "invert": "inversion",
    "load": "api",
    "padded": "canvas",
    "Pipeline": "pipeline",
    "Result": "result",
    "Shortcuts": "shortcuts",
    "verify": "verification",
}

__all__ = [
    "BackendUnavailable",
    "CheckpointError",
    "FastLDMError",
    "InvalidArgument",
    "NonFiniteOutput",
    "OutOfMemory",
    "Pipeline",
    "Result",
    "Shortcuts",
    "generate",
    "interpolate",
    "invert",
    "load",
    "padded",
    "verify",
]

# An uninstalled checkout keeps the Triton kernels beside the package: let `fastldm.kernels` be found there.
_checkout = Path(__file__).parents[1]
if (_checkout / "setup.py").is_file() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for."""
    if name in _LAZY:
        value = getattr(importlib.import_module(f"fastldm.{_LAZY[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fastldm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
