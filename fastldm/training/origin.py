"""What a saved state comes from, so that no run goes on from one that belongs elsewhere.

The origin of a state is what its weights were fitted to and what gives them their meaning: the seed, the
pictures and captions, the vocabulary, the network's shape, the weights of an earlier stage or of another
model that it began from, and the process that a diffusion model undoes.

How it learns is no part of it, and may change on the way: steps, how often something is kept or drawn, batch
and accumulation, rates, clipping, averages, crops, the choice and the weights of the losses, the shares of
captions and hints, threads and devices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastldm.errors import CheckpointError

Origin: TypeAlias = Mapping[str, str]
"""A digest, or a word, for each thing that a state comes from; its names read well after "another"."""

NONE = "none"


def digest(*things: Any) -> str:
    """16 hexadecimal digits of the sha256 of tensors, modules, mappings, dataclasses and plain values.

    The fields of a dataclass that have their default do not count, so that a new field changes no digest.
    """
    found = hashlib.sha256()
    for thing in things:
        _feed(found, thing)
    return found.hexdigest()[:16]


def _feed(found: hashlib._Hash, thing: Any) -> None:
    if isinstance(thing, nn.Module):
        thing = thing.state_dict()
    elif is_dataclass(thing):
        given = {field.name: (getattr(thing, field.name), field.default) for field in fields(thing)}
        thing = {name: value for name, (value, default) in given.items() if value != default}
    if isinstance(thing, Mapping):
        for name, value in thing.items():
            _feed(found, name)
            _feed(found, value)
    elif isinstance(thing, Tensor):
        _feed(found, (str(thing.dtype), *thing.shape))
        found.update(thing.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    else:
        found.update(f"{thing!r}\n".encode())


def refuse_another(file: Path, kept: Origin | None, given: Origin) -> None:
    """CheckpointError for the state of a file whose origin differs from the one given, naming what differs.

    States of before origins were kept have none; they are taken for what they should be.
    """
    changed = [name for name, value in given.items() if kept is not None and kept.get(name, value) != value]
    if changed:
        why = f"was trained with another {', another '.join(changed)}; remove it to train anew"
        raise CheckpointError(file, None, f"{why}, or go on from its model, with start, in another folder")
