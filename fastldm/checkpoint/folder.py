"""Diffusers folders: model_index.json, and a subfolder with configuration and weights for each network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastldm.checkpoint.container import Entry, WeightFile
from fastldm.checkpoint.defaults import read_abilities
from fastldm.checkpoint.detect import FOREIGN_CLASSES, family_of
from fastldm.checkpoint.limits import read_json
from fastldm.checkpoint.overrides import overlay
from fastldm.checkpoint.pickles import open_weights
from fastldm.checkpoint.rename import modern_text_key, modern_vae_key
from fastldm.checkpoint.source import ABILITIES, PARTS, Part, Skipped, Source, as_matrix
from fastldm.errors import CheckpointError
from fastldm.models.pixels import PIXELS

INDEX = "model_index.json"
CLASSES = {
    "unet": ("UNet2DConditionModel", "UNet2DModel"),
    "vae": ("AutoencoderKL", "VQModel", PIXELS),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection", "LDMBertModel"),
    "class_embedder": ("ClassEmbedder",),
    "rescaler": ("SpatialRescaler",),
}
PAPER_CLASS = "LatentDiffusion"  # of a model of the paper, of which a folder is fastldm's own layout
NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")
MAX_SHARDS = 256
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<before>\w+))?"
    r"\.(?P<format>safetensors|bin)(?P<index>\.index(?:\.(?P<after>\w+))?\.json)?"
)


def open_folder(path: Path, overrides: Mapping[str, Any], allow_pickle: bool = False) -> Source:
    """Read a diffusers folder's configurations and the headers of its weight files."""
    if not (path / INDEX).is_file():
        raise CheckpointError(path, None, _not_a_model(path))
    index = read_json(path / INDEX)
    present = _check_index(path / INDEX, index)
    skipped, variant = Skipped(), overrides.get("variant")
    files: list[WeightFile] = []
    parts = {}
    for name in present:
        config_file = path / name / "config.json"
        config = read_json(config_file)
        if name in ("unet", "vae"):  # whose class decides what they are
            config["_class_name"] = config.get("_class_name") or present[name]
        config = overlay(config, overrides.get(name))
        weight_file: Path = config_file
        shards: list[WeightFile] = []
        if config.get("_class_name") != PIXELS:
            weight_file, shards = _weight_files(path / name, variant, allow_pickle)
        parts[name] = Part(config, config_file, weight_file, _tensors(name, shards, skipped), lambda key: key)
        files += shards
    if variant and all(_variant(part.weight_file) != variant for part in parts.values()):
        raise CheckpointError(path, None, f"holds no weights of the variant {variant!r}")
    scheduler_file = path / "scheduler" / "scheduler_config.json"
    configs = {name: part.config for name, part in parts.items()}
    family = family_of(configs)
    return Source(
        path=path,
        family=family,
        parts=parts,
        abilities=read_abilities(family, configs, index.get(ABILITIES), path / INDEX),
        scheduler=overlay(read_json(scheduler_file), overrides.get("scheduler")),
        scheduler_file=scheduler_file,
        tokenizer=path / "tokenizer",
        files=tuple(files),
        skipped=dict(skipped),
        warnings=(),
    )


def _not_a_model(path: Path) -> str:
    """What to say of a folder without model_index.json."""
    why = f"has no {INDEX}, so it is no diffusers folder"
    inside = sorted(path.glob("*.safetensors"))
    if (path.parent / INDEX).is_file():
        return f"{why}, but one of its components: give {path.parent}"
    if inside:
        return f"{why}; a single file such as {inside[0]} can be given by its own path"
    return why


def _check_index(file: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """The networks that there are, and their classes; pipelines of other families and components that fastldm
    does not have are refused.
    """
    pipeline = str(index.get("_class_name"))
    for beginning, why in FOREIGN_CLASSES.items():
        if pipeline.startswith(beginning):
            raise CheckpointError(file, "_class_name", f"is {pipeline!r:.80}: {why}")
    present = {
        name: value[1]
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[1] is not None and not name.startswith("_")
    }
    for name, kind in present.items():
        if name not in (*CLASSES, "tokenizer", "scheduler", *NOT_NEEDED):
            raise CheckpointError(file, name, f"is a component that fastldm does not know: {kind!r:.80}")
        if name in CLASSES and kind not in CLASSES[name]:
            raise CheckpointError(
                file, name, f"is of class {kind!r:.80}; fastldm supports {' and '.join(CLASSES[name])}"
            )
    for name in ("unet", "vae") if pipeline == PAPER_CLASS else PARTS:
        if name not in present:
            raise CheckpointError(file, name, "is missing: the model has no such component")
    return {name: present[name] for name in CLASSES if name in present}


def _variant(file: Path) -> str | None:
    """Of which variant a weight file or index is, "" for a plain one; None for any other file."""
    match = _WEIGHTS.fullmatch(file.name)
    return (match["before"] or match["after"] or "") if match else None


def _weight_files(folder: Path, variant: str | None, allow_pickle: bool) -> tuple[Path, list[WeightFile]]:
    """The file or index to blame for a component's missing tensors, and its weight files.

    Of the variant asked for, else the plain files: some models have a variant of one component only. Without
    one asked for, safetensors before pickles; the plain files, else fp16, else bf16, else the first variant
    by name. One file before shards.
    """
    if not folder.is_dir():
        raise CheckpointError(folder, None, "is missing: a diffusers folder has a folder of that name")
    found = []
    for file in folder.iterdir():
        kind = _variant(file)
        if kind is not None and (variant is None or kind in (variant, "")):
            instead = variant is not None and kind != variant
            order = {"": 0, "fp16": 1, "bf16": 2}.get(kind, 3)
            pickled, sharded = ".bin" in file.suffixes, ".index" in file.suffixes
            found.append((instead, pickled, order, kind, sharded, file))
    if not found:
        of_variant = f" of the variant {variant!r}, nor plain ones" if variant else ""
        raise CheckpointError(folder, None, f"holds no weights{of_variant}, neither .safetensors nor .bin")
    *_, sharded, file = min(found)
    return file, _shards(file, allow_pickle) if sharded else [open_weights(file, allow_pickle)]


def _shards(index_file: Path, allow_pickle: bool) -> list[WeightFile]:
    """The files beside a shard index that it names; they must hold exactly the tensors that it says."""
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(index_file, "weight_map", "must map tensor names to file names")
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS:
        raise CheckpointError(
            index_file, "weight_map", f"names {len(names)} files; the limit is {MAX_SHARDS}"
        )
    for name in names:
        if not re.fullmatch(r"[\w][\w.\-]*\.(safetensors|bin)", name):
            raise CheckpointError(
                index_file,
                "weight_map",
                f"names the file {name!r:.80}; a plain name of a safetensors or .bin file is allowed",
            )
    shards = [open_weights(index_file.with_name(name), allow_pickle) for name in names]
    for shard in shards:
        for key in shard.entries:
            if weight_map.pop(key, None) != shard.path.name:
                raise CheckpointError(
                    shard.path, key, f"is in this file, but not according to {index_file.name}"
                )
    if weight_map:
        key, name = next(iter(weight_map.items()))
        raise CheckpointError(
            index_file.with_name(name), key, f"is missing, although {index_file.name} names it"
        )
    return shards


def _tensors(part: str, files: list[WeightFile], skipped: Skipped) -> dict[str, Entry]:
    """A component's tensors by the names in use today; harmless ones are counted."""
    found: dict[str, Entry] = {}
    for file in files:
        for key, entry in file.entries.items():
            if skipped.take(key):
                continue
            name = {"vae": modern_vae_key, "text_encoder": modern_text_key}.get(part, str)(key)
            if name in found:
                raise CheckpointError(file.path, key, f"stands for the same tensor as {found[name].name}")
            found[name] = as_matrix(entry) if part == "vae" and ".attentions." in name else entry
    return found
