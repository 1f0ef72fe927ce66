"""Single files of SD1 and SD2: CompVis names hold all three networks, and seldom a configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastldm.checkpoint.container import Entry, WeightFile
from fastldm.checkpoint.defaults import SCHEDULERS, read_abilities
from fastldm.checkpoint.detect import (
    Shapes,
    family_of,
    infer_clip,
    infer_open_clip,
    infer_unet,
    infer_vae,
    text_stage,
)
from fastldm.checkpoint.limits import parse_json
from fastldm.checkpoint.networks import read_network_config
from fastldm.checkpoint.overrides import PREDICTIONS, overlay
from fastldm.checkpoint.rename import OPEN_CLIP, STAGES, Names, text_names, unet_names, vae_names
from fastldm.checkpoint.source import ABILITIES, CONDITIONERS, PARTS, Part, Skipped, Source, as_matrix
from fastldm.checkpoint.tensors import DTYPES, read_tensor
from fastldm.errors import CheckpointError
from fastldm.models.pixels import PixelConfig

METADATA = "fastldm"  # where fastldm keeps configurations and tokenizer in the single files it writes
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
PREDICTION_METADATA = ("prediction_type", "modelspec.prediction_type", "modelspec.predict_key")
# SD2 models trained for v have a larger deviation than this in the bias of the last of these norms (ComfyUI).
V_PREDICTION_STD = 0.09
_NORM = re.compile(r"model\.diffusion_model\.output_blocks\.(\d+)\.1\.transformer_blocks\.0\.norm1\.bias")


def open_stable(file: WeightFile, overrides: Mapping[str, Any]) -> Source:
    """Work out from a file's header which SD1 or SD2 model it is; of the tensors, only two small ones may be
    read.
    """
    embedded, path = embedded_in(file), file.path
    shapes = {key: entry.shape for key, entry in file.entries.items()}
    stage = text_stage(path, shapes)
    infer_text = infer_open_clip if stage == OPEN_CLIP else infer_clip
    inferred = {
        "unet": infer_unet(Shapes(path, STAGES["unet"], shapes)),
        "vae": infer_vae(Shapes(path, STAGES["vae"], shapes), scaling_factor(file)),
        "text_encoder": infer_text(Shapes(path, stage, shapes)),
    }
    family = family_of(inferred)
    prediction, warnings = _prediction(file, family, embedded, overrides)
    if family == "sd2" and prediction == "v_prediction":
        inferred["unet"]["sample_size"] = 96  # the published v models draw 768², the others 512²
    configs = configurations(inferred, embedded, overrides)
    names = single_names(configs, stage, path)
    skipped = Skipped()
    unused = partial(_unused_layer, stage, names["text_encoder"])
    tensors = renamed(path, file.entries, names, skipped, unused)
    scheduler = embedded.get("scheduler", SCHEDULERS[family])
    parts = {
        part: Part(configs[part], path, path, tensors[part], partial(name_in_file, names[part]))
        for part in PARTS
    }
    return Source(
        path=path,
        family=family,
        parts=parts,
        abilities=read_abilities(family, configs, embedded.get(ABILITIES), path),
        scheduler=overlay({**scheduler, "prediction_type": prediction}, overrides.get("scheduler")),
        scheduler_file=path,
        tokenizer=embedded.get("tokenizer"),
        files=(file,),
        skipped=dict(skipped),
        warnings=(*warnings, *_guessed_heads(inferred, embedded, overrides)),
    )


def name_in_file(names: Names, key: str) -> str:
    return names.to_single(key) or key


def single_names(configs: Mapping[str, Mapping[str, Any]], stage: str, file: Path) -> dict[str, Names]:
    """The renaming table of each network, of which the text encoder is kept under `stage`."""
    known = {part: read_network_config(part, configs[part], file) for part in PARTS}
    if isinstance(known["vae"], PixelConfig):
        raise CheckpointError(file, "vae", "is that of a model of pixels, which no single file can hold")
    return {
        "unet": unet_names(known["unet"]),
        "vae": vae_names(known["vae"].to_dict()),
        "text_encoder": text_names(known["text_encoder"].to_dict(), stage),
    }


def renamed(
    path: Path,
    entries: Mapping[str, Entry],
    names: Mapping[str, Names],
    skipped: Skipped,
    unused: Callable[[str], str | None],
) -> dict[str, dict[str, Entry]]:
    """A file's tensors by network and folder name.

    Harmless ones are counted, and those of which `unused` gives a kind; any other key is an error.
    """
    found: dict[str, dict[str, Entry]] = {part: {} for part in names}
    for key, entry in entries.items():
        if skipped.take(key):
            continue
        part, targets = next(((p, t) for p in names if (t := names[p].to_folder(key))), ("", ()))
        if not targets:
            if (kind := unused(key)) is None:
                raise CheckpointError(path, key, "is unexpected: no model of this kind has such a tensor")
            skipped.count(kind)
            continue
        for target, piece in zip(
            targets, _cut(path, entry, len(targets), names[part].heads(key)), strict=True
        ):
            if target in found[part]:
                why = f"stands for the same tensor as {found[part][target].name}"
                raise CheckpointError(path, key, why)
            of_map = ".attentions." in target and (part == "vae" or len(piece.shape) == 3)
            found[part][target] = as_matrix(piece) if of_map else piece
    return found


def _unused_layer(stage: str, names: Names, key: str) -> str | None:
    """A kind for a key of a layer beyond those of an OpenCLIP encoder that the model uses."""
    layer = re.fullmatch(rf"({re.escape(stage)}transformer\.resblocks\.)\d+(\..+)", key)
    known = layer is not None and names.to_folder(f"{layer[1]}0{layer[2]}") != ()
    return "unused_layer" if known else None


def _cut(path: Path, entry: Entry, parts: int, heads: int) -> list[Entry]:
    if parts < 2:
        return [entry] * parts
    if not entry.shape or entry.shape[0] % (parts * heads):
        of_heads = f" of {heads} heads each" if heads > 1 else ""
        why = f"has shape {list(entry.shape)}; expected {parts} equal parts{of_heads}"
        raise CheckpointError(path, entry.name, why)
    return entry.rows(parts, heads)


def embedded_in(file: WeightFile) -> dict[str, Any]:
    """The configurations and tokenizer files that fastldm wrote into this file's metadata, if it did."""
    text = file.metadata.get(METADATA)
    if text is None:
        return {}
    where = f"__metadata__.{METADATA}"
    found = parse_json(text.encode(), file.path, where)
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
        raise CheckpointError(file.path, where, "must map names to objects")
    if not set(found) <= {*PARTS, *CONDITIONERS, "scheduler", "tokenizer", ABILITIES}:
        raise CheckpointError(file.path, where, f"has unknown names: {', '.join(sorted(found))}")
    for name, content in found.get("tokenizer", {}).items():
        if name not in TOKENIZER_FILES or not isinstance(content, str):
            raise CheckpointError(file.path, where, f"holds the unknown tokenizer file {name!r}")
    return found


def configurations(
    inferred: Mapping[str, Any], embedded: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The networks' configurations: the embedded ones, else those inferred, with the user's fields. What is
    inferred of one tells its class where the embedded one does not.
    """
    configs = {}
    for part, told in inferred.items():
        config = dict(embedded.get(part, told))
        if "_class_name" in told:
            config["_class_name"] = config.get("_class_name") or told["_class_name"]
        configs[part] = overlay(config, overrides.get(part))
    return configs


def scaling_factor(file: WeightFile) -> float | None:
    """The factor from latents to unit variance, stored where training measured it."""
    entry = file.entries.get("scale_factor")
    if entry is None:
        return None
    if entry.numel != 1 or entry.dtype not in DTYPES:
        raise CheckpointError(
            file.path, "scale_factor", f"is {entry.dtype} {list(entry.shape)}; expected one number"
        )
    value = float(read_tensor(entry, torch.float32))
    if value <= 0:
        raise CheckpointError(file.path, "scale_factor", f"is {value}; expected a positive number")
    return value


def _prediction(
    file: WeightFile, family: str, embedded: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[str, list[str]]:
    """What the UNet predicts, and a warning when that is a guess.

    The user knows best, then the file's metadata. SD1 predicts the noise; SD2 models' weights give a hint.
    """
    stated = [
        overrides.get("scheduler", {}).get("prediction_type"),
        embedded.get("scheduler", {}).get("prediction_type"),
        *(file.metadata.get(name) for name in PREDICTION_METADATA),
    ]
    for value in stated:
        if isinstance(value, str) and value in PREDICTIONS:
            return PREDICTIONS[value], []
    if family.startswith("sd1"):
        return "epsilon", []
    matches = ((_NORM.fullmatch(key), entry) for key, entry in file.entries.items())
    biases = {int(match[1]): entry for match, entry in matches if match}
    guess = "epsilon"
    if family == "sd2" and biases:
        last = biases[max(biases)]
        if last.dtype in DTYPES and read_tensor(last, torch.float32).std(correction=0) > V_PREDICTION_STD:
            guess = "v_prediction"
    return guess, [f"guessed prediction_type {guess}; config='epsilon' or config='v_prediction' states it"]


def _guessed_heads(
    inferred: Mapping[str, Any], embedded: Mapping[str, Any], overrides: Mapping[str, Any]
) -> list[str]:
    """A warning for each network whose attention heads neither the file nor a published model tells."""
    warnings = []
    for part, field, published in (
        ("unet", "attention_head_dim", inferred["unet"]["block_out_channels"] == [320, 640, 1280, 1280]),
        ("text_encoder", "num_attention_heads", inferred["text_encoder"]["hidden_size"] in (768, 1024)),
    ):
        stated = {**embedded.get(part, {}), **overrides.get(part, {})}
        if not published and not {"attention_head_dim", "num_attention_heads"} & set(stated):
            states = f"config={{'{part}': {{'{field}': …}}}}"
            warnings.append(f"guessed {inferred[part][field]} attention heads; {states} states them")
    return warnings
