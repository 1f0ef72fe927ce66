"""Reading a component's config.json into its frozen dataclass, refusing what would change the numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields as dataclass_fields
from typing import Any

from fastldm.errors import CheckpointError


def read_config(
    cls: type,
    given: Mapping[str, Any],
    file: str,
    *,
    fixed: Mapping[str, Any],
    inert: Collection[str] = (),
    derived: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The dataclass fields of `cls` found in a config.json, type-checked.

    `fixed`: fields with the only value this network has. `inert`: fields that change no number. `derived`:
    dataclass fields that the file does not have. `defaults`: what an absent field means in the file's
    format where that differs from the dataclass. Any other field must be null, false, zero or empty. Raises
    CheckpointError naming the field.
    """
    own = {field.name: field.default for field in dataclass_fields(cls) if field.name not in derived}
    found: dict[str, Any] = dict(defaults or {})
    for name, value in given.items():
        if name in own:
            if value is not None:
                found[name] = _typed(name, value, own[name], file)
        elif name in fixed:
            if value != fixed[name]:
                raise CheckpointError(file, name, f"is {value!r}; fastldm supports {fixed[name]!r}")
        elif value and not name.startswith("_") and name not in inert:
            raise CheckpointError(file, name, f"is {value!r}; fastldm does not know this field")
    return found


def per_level(
    fields: Mapping[str, Any], name: str, levels: int, file: str, most: int = 256
) -> tuple[int, ...] | None:
    """A field that is one integer for all levels or a list of one each, none above `most`."""
    value = fields.get(name)
    if value is None:
        return None
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
    if len(values) != levels or not all(type(item) is int and 0 < item <= most for item in values):
        raise CheckpointError(file, name, f"is {value!r}; expected one positive integer, or {levels} of them")
    return values


def _typed(name: str, value: Any, example: Any, file: str) -> Any:
    """`value` as the type of `example`; lists become tuples of ints."""
    if isinstance(example, tuple):
        if isinstance(value, list | tuple) and value and all(type(item) in (int, bool) for item in value):
            if all(0 <= item <= 65536 for item in value) and len(value) <= 64:
                return tuple(value)
        raise CheckpointError(file, name, f"is {value!r}; expected a list of small integers")
    if isinstance(example, bool):
        if isinstance(value, bool):
            return value
        raise CheckpointError(file, name, f"is {value!r}; expected true or false")
    if isinstance(example, int):
        if type(value) is int and 0 < value <= 1_000_000:
            return value
        raise CheckpointError(file, name, f"is {value!r}; expected a positive integer")
    if isinstance(example, float):
        if type(value) in (int, float) and abs(value) < 1e6:
            return float(value)
        raise CheckpointError(file, name, f"is {value!r}; expected a number")
    if isinstance(example, str) and isinstance(value, str):
        return value
    raise CheckpointError(file, name, f"is {value!r}; expected {type(example).__name__}")
