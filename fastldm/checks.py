"""Checks of single values: each returns the value in its plain form or raises a one-line `InvalidArgument`.

Nothing here imports torch. A tensor is recognised through `sys.modules`: who passes one has imported torch.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np

from fastldm.errors import InvalidArgument

if TYPE_CHECKING:
    import torch

    Tensor: TypeAlias = torch.Tensor | np.ndarray[Any, Any]


def integer(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int within low…high; True, 64.0 and "4" are none."""
    allowed = f"an integer {low}…{high}"
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        refuse(name, value, allowed)
    return int(value)


def number(name: str, value: object, low: float, high: float) -> float:
    """`value` as a finite float within low…high."""
    allowed = f"a number {low}…{high}"
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        refuse(name, value, allowed)
    if not low <= value <= high:  # false for nan
        refuse(name, value, allowed)
    return float(value)


def choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        refuse(name, value, f"one of {', '.join(choices)}")
    return str(value)


def shape_of(name: str, value: object, wanted: tuple[int | str, ...]) -> tuple[int, ...]:
    """The shape of a dense float tensor or array, equal to `wanted`; a word there stands for any size ≥ 1."""
    allowed = f"a tensor of finite floats [{', '.join(map(str, wanted))}]"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        if not is_dense(value) or value.dtype not in floats:
            refuse(name, value, allowed)
    elif not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        refuse(name, value, allowed)
    given = tuple(value.shape)
    pairs = zip(given, wanted, strict=False)
    if len(given) != len(wanted) or not all(
        size == want if isinstance(want, int) else size for size, want in pairs
    ):
        refuse(name, value, allowed)
    return given


def is_dense(value: torch.Tensor) -> bool:
    """Whether a tensor has a number in memory for each of its places."""
    layout = sys.modules["torch"].strided
    return value.layout == layout and not value.is_nested and value.device.type != "meta"


def tensor(name: str, value: object, shape: tuple[int | str, ...] | None) -> Tensor | None:
    """A float32 copy of a tensor or array, all finite; with shape None the shape has been checked before."""
    if value is None:
        return None
    if shape is not None:
        shape_of(name, value, shape)
    copy: Any
    if isinstance(value, np.ndarray):
        with np.errstate(over="ignore"):
            copy = np.array(value, dtype=np.float32, order="C")
        finite = np.isfinite(copy).all()
    else:
        torch = sys.modules["torch"]
        copy = value.detach().to(torch.float32, copy=True)  # type: ignore[attr-defined]
        finite = torch.isfinite(copy).all()
    if not finite:
        refuse(name, value, "finite float32 values, no NaN or Inf")
    return copy


class _Shown:
    """Stands in an error for a value whose repr is long, has several lines or fails."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def refuse(name: str, value: object, allowed: str) -> NoReturn:
    raise InvalidArgument(name, shown(value), allowed)


def shown(value: object) -> object:
    """`value` itself where its repr is one short line, else its type (and shape)."""
    if value is None or isinstance(value, bool | float | str | np.generic):
        return value[:120] if isinstance(value, str) else value
    if isinstance(value, int):
        return value if value.bit_length() <= 256 else _Shown(f"<int of {value.bit_length()} bits>")
    if type(value) in (list, tuple) and len(value) <= 8:  # type: ignore[arg-type]
        parts = [shown(item) for item in value]  # type: ignore[attr-defined]
        if not any(isinstance(part, _Shown) for part in parts):
            return value
    shape = getattr(value, "shape", None)
    dtype = f" {value.dtype} {list(shape)}" if isinstance(shape, tuple) and hasattr(value, "dtype") else ""
    return _Shown(f"<{type(value).__name__}{dtype}>")
