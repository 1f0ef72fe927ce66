"""The `config=` argument: what its user knows better than the model files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastldm.checkpoint.limits import read_json
from fastldm.checkpoint.source import CONDITIONERS, PARTS
from fastldm.errors import InvalidArgument

PREDICTIONS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v_prediction": "v_prediction",
    "v": "v_prediction",
    "sample": "sample",
}
ALLOWED = (
    "'epsilon', 'v_prediction', 'sample', a dict or JSON file of config.json fields under unet, vae, "
    "text_encoder, class_embedder, rescaler, scheduler, with prediction_type, variant; a "
    "scheduler_config.json; a diffusers folder"
)
FILES = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}


def read_overrides(config: str | os.PathLike[str] | Mapping[str, Any] | None) -> dict[str, Any]:
    """The `config=` argument as fields by component; InvalidArgument for one that is no such thing.

    A path is that of a JSON file of this form, of a scheduler_config.json, or of a diffusers folder, of which
    only the configurations are used. `variant` names the weight files of a folder ("fp16"), where a component
    has such; "non_ema" asks a single file for the weights that were not averaged.
    """
    if config is None:
        return {}
    if isinstance(config, str) and config in PREDICTIONS:
        config = {"prediction_type": config}
    elif isinstance(config, str | os.PathLike):
        config = _from_path(config)
    if not isinstance(config, Mapping):
        raise InvalidArgument("config", config, ALLOWED)
    if str(config.get("_class_name", "")).endswith("Scheduler"):
        config = {"scheduler": config}
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in (*PARTS, *CONDITIONERS, "scheduler") and isinstance(value, Mapping):
            found[key] = {**value, **found.get(key, {})}
        elif key == "variant" and isinstance(value, str):
            found[key] = value
        elif key == "prediction_type" and isinstance(value, str) and value in PREDICTIONS:
            found["scheduler"] = {**found.get("scheduler", {}), "prediction_type": PREDICTIONS[value]}
        else:
            raise InvalidArgument("config", {key: value}, ALLOWED)
    return found


def _from_path(path: str | os.PathLike[str]) -> dict[str, Any]:
    place = Path(path)
    if place.is_dir():
        found = {name: read_json(place / file) for name, file in FILES.items() if (place / file).is_file()}
        if found:
            return found
    elif place.is_file() and place.suffix == ".json":
        return read_json(place)
    raise InvalidArgument("config", os.fspath(path), ALLOWED)


def overlay(config: Mapping[str, Any], changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """A component's configuration with some fields replaced, or all when the changes are of another class."""
    if changes and changes.get("_class_name", config.get("_class_name")) != config.get("_class_name"):
        return dict(changes)
    return {**config, **(changes or {})}
