"""Between a diffusers folder and a single file: bytes move, numbers do not."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from fastldm.checkpoint.container import Entry, Payload, write_safetensors
from fastldm.checkpoint.defaults import default_abilities
from fastldm.checkpoint.load import Config, open_source, pad_id, read_scheduler, read_tokenizer
from fastldm.checkpoint.networks import build, read_network_config
from fastldm.checkpoint.paper import paper_names
from fastldm.checkpoint.pickles import PickleFile
from fastldm.checkpoint.rename import CLIP, OPEN_CLIP, Names
from fastldm.checkpoint.save import write_folder
from fastldm.checkpoint.single import METADATA, single_names
from fastldm.checkpoint.source import ABILITIES, Source, as_convolution
from fastldm.errors import CheckpointError, InvalidArgument
from fastldm.models.clip import CLIP_L
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.unet_config import UNCONDITIONAL

_VAE_PROJECTION = re.compile(
    r"first_stage_model\.\w+\.(mid\.attn_1|(down|up)\.\d+\.attn\.\d+)\.(q|k|v|proj_out)\.weight"
)


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    config: Config = None,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> Path:
    """Write a diffusers folder as a single .safetensors file, or a single file as a folder; return where.

    With `allow_pickle` the single file may be a pickle; that can be written as .safetensors too.

    Weights keep their dtype and every bit, there and back. Keys that no network needs are left out. The
    single file's metadata holds what shapes do not tell (configurations, prediction type, a tokenizer that is
    not CLIP's), so that nothing is guessed when it is loaded. A destination that exists is refused unless
    `overwrite`; when writing fails it is left as it was.
    """
    model = open_source(source, config, allow_pickle)
    place = _destination(model, destination, overwrite)
    build(model)
    prediction = read_scheduler(model).prediction
    words = read_tokenizer(model, tokenizer)
    if place.suffix != ".safetensors":
        configs = {name: part.config for name, part in model.parts.items()}
        weights = {name: _payloads(part.tensors) for name, part in model.parts.items()}
        write_folder(place, configs, weights, words, model.scheduler, model.abilities)
    else:
        write_safetensors(place, _payloads(single_tensors(model)), _metadata(model, prediction, words))
    return place


def _destination(model: Source, destination: str | os.PathLike[str], overwrite: bool) -> Path:
    """Where the other layout of a model may be written."""
    name = os.fspath(destination)
    place = Path(os.path.abspath(name))
    to_folder, from_folder = place.suffix != ".safetensors", model.path.is_dir()
    pickled = not from_folder and isinstance(model.files[0], PickleFile)
    if not name or (to_folder == from_folder and not pickled):
        allowed = "a file that ends in .safetensors" if from_folder else "a folder, for the source is a file"
        raise InvalidArgument("destination", name, allowed)
    if place.exists():
        is_free = place.is_dir() and not any(place.iterdir())
        if place.is_dir() != to_folder or place.samefile(model.path) or not (is_free or overwrite):
            raise InvalidArgument("destination", name, "a path that is free, or overwrite=True")
    return place


def _payloads(tensors: Mapping[str, Entry]) -> dict[str, Payload]:
    return {key: Payload(entry.dtype, entry.shape, entry.chunks()) for key, entry in tensors.items()}


def single_tensors(model: Source) -> dict[str, Entry]:
    """The tensors of a model by their names in a single file."""
    names = _names(model)
    found: dict[str, Entry] = {}
    for name, part in model.parts.items():
        for key in part.tensors:
            single = names[name].to_single(key)
            assert single is not None, key
            keys, heads = names[name].to_folder(single), names[name].heads(single)
            entry = _joined(single, keys, part.tensors, heads)
            if _VAE_PROJECTION.fullmatch(single):
                entry = as_convolution(entry, 2)
            elif name == "unet" and ".attentions." in key and part.config["_class_name"] == UNCONDITIONAL:
                entry = as_convolution(entry, 1)
            found[single] = entry
    return found


def _names(model: Source) -> dict[str, Names]:
    configs = {name: part.config for name, part in model.parts.items()}
    if model.family.startswith("ldm"):
        return paper_names({part: read_network_config(part, configs[part], model.path) for part in configs})
    return single_names(configs, OPEN_CLIP if model.family.startswith("sd2") else CLIP, model.path)


def _joined(single: str, keys: tuple[str, ...], tensors: Mapping[str, Entry], heads: int) -> Entry:
    """The tensor that these are the parts of, along the first dimension; head by head where it is so kept."""
    parts = [tensors[key] for key in keys]
    first = parts[0]
    if len(parts) == 1:
        return replace(first, name=single)
    if any(part.dtype != first.dtype for part in parts):
        why = f"cannot be joined into {single}: dtypes {', '.join(part.dtype for part in parts)}"
        raise CheckpointError(first.spans[0].file.path, first.name, why)
    by_head = zip(*(part.pieces(heads) for part in parts), strict=True)
    spans = tuple(span for head in by_head for span in head)
    return Entry(single, first.dtype, (first.shape[0] * len(parts), *first.shape[1:]), spans)


def _metadata(model: Source, prediction: str, tokenizer: Tokenizer | None) -> dict[str, str]:
    """What the tensors of a single file do not tell."""
    configs = {name: part.config for name, part in model.parts.items()}
    embedded: dict[str, object] = {**configs, "scheduler": model.scheduler}
    if model.abilities != default_abilities(model.family, configs):
        embedded[ABILITIES] = model.abilities.to_dict()
    if tokenizer is not None and not _is_plain_clip(tokenizer, model.family):
        with TemporaryDirectory() as folder:
            tokenizer.save(folder)
            embedded["tokenizer"] = {
                file.name: file.read_text("utf-8") for file in sorted(Path(folder).iterdir())
            }
    return {
        "format": "pt",
        "prediction_type": prediction,
        METADATA: json.dumps(embedded, separators=(",", ":"), sort_keys=True),
    }


def _is_plain_clip(tokenizer: Tokenizer, family: str) -> bool:
    """Whether a single file of this family is read with this very tokenizer anyway."""
    if not family.startswith("sd"):
        return False
    facts = (tokenizer.vocab_size, tokenizer.max_length, tokenizer.pad_id)
    if facts != (CLIP_L.vocab_size, CLIP_L.max_position_embeddings, pad_id(family)):
        return False
    return tokenizer.backend.get_vocab() == Tokenizer.clip(pad_id(family)).backend.get_vocab()
