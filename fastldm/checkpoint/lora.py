"""LoRA files: low-rank changes of a model's weights, read and checked against it, and written.

W' = W + strength · alpha/rank · up · down; of a convolution, `down` carries the kernel and `up` is 1×1. (Hu
et al. 2021, arXiv:2106.09685)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastldm.checkpoint.atomic import replacing
from fastldm.checkpoint.container import Entry, Payload, SafetensorsFile, write_safetensors
from fastldm.checkpoint.info import sha256
from fastldm.checkpoint.lora_config import (
    CONFIG_FILE,
    METADATA,
    LoraConfig,
    peft_fields,
    read_lora_config,
)
from fastldm.checkpoint.lora_names import PEFT, Spellings
from fastldm.checkpoint.tensors import DTYPES, payload, read_tensor
from fastldm.errors import CheckpointError, InvalidArgument

BLOCK = 1 << 20  # numbers of a weight that are added up at a time
INTEGERS = {f"{sign}{bits}" for sign in "IU" for bits in (8, 16, 32, 64)}  # merge scripts write alphas so
DIFFUSERS_FILE, PEFT_FILE = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"


@dataclass(frozen=True)
class LowRank:
    """What a LoRA adds to one weight: scale · up · down, [out, rank] and [rank, in · kernel]."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class Lora:
    """A LoRA file, checked against a model: its changes by module ("unet.mid_block…"); sha256 of the file."""

    path: Path
    hash: str
    changes: Mapping[str, LowRank]


def merge(weight: Tensor, original: Tensor, changes: Iterable[tuple[LowRank, float]]) -> bool:
    """weight ← original + Σ strength · scale · up · down: added up in float32, rounded once to its dtype.
    Returns whether all its numbers are finite.

    Both in the same memory layout, channels-last or contiguous. On a CPU some rows at a time, which stay in
    the caches: memory fresh from the system for a whole weight in float32 would cost more than the sum.
    """
    order = [0, 1]
    if weight.dim() == 4:
        order = [0, 1, 2, 3] if weight.is_contiguous() else [0, 2, 3, 1]
    wanted, given = (each.permute(order).view(len(weight), -1) for each in (weight, original))
    factors = []
    for change, strength in changes:
        down = change.down.view(-1, *weight.shape[1:]).permute(order).flatten(1)
        up, down = (factor.to(weight.device, torch.float32) for factor in (change.up, down))
        factors.append((up, down, strength * change.scale))
    sums = []
    rows = max(1, BLOCK // wanted.shape[1]) if weight.is_cpu else len(weight)
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        total = given[part].to(weight.device, torch.float32, copy=True)
        for up, down, scale in factors:
            total.addmm_(up[part], down, alpha=scale)
        wanted[part].copy_(total)
        sums.append(wanted[part].sum(dtype=torch.float32))  # Inf and NaN outlast a sum
    return bool(torch.isfinite(torch.stack(sums)).all())


def read_lora(path: str | os.PathLike[str], networks: Mapping[str, nn.Module]) -> Lora:
    """Read a LoRA for these networks ("unet", "text_encoder"): a .safetensors file, or a folder of diffusers
    or peft that holds one.

    Names are those of peft, diffusers and kohya; without an alpha, alpha is the rank. Nothing is allocated
    before every shape fits. CheckpointError names the file and the key that no module has, that does not fit,
    lacks its partner or is not finite.
    """
    place = _find(path)
    file = SafetensorsFile(place)
    spellings = Spellings(networks)
    found: dict[str, dict[str, Entry]] = {}
    unknown = []
    for key, entry in file.entries.items():
        spot = spellings.place(key)
        if spot is None:
            unknown.append(key)
        elif (same := found.setdefault(spot.module, {}).setdefault(spot.factor, entry)) is not entry:
            raise CheckpointError(place, key, f"is given twice: {same.name} is the same factor")
    if unknown:
        raise CheckpointError(place, unknown[0], spellings.why_not(unknown) + _made_for(file.metadata))
    if not found:
        raise CheckpointError(place, None, "holds no LoRA: it has no tensors")
    for module, entries in found.items():
        _check(file, entries, module, spellings.modules[module].weight.shape)
    configs = {part: read_lora_config(file, part) for part in networks}
    changes = {module: _low_rank(file, entries, module, configs) for module, entries in found.items()}
    return Lora(place, sha256(place), changes)


def _find(path: str | os.PathLike[str]) -> Path:
    """The file that the path means."""
    name = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(name, str) or not name or "\0" in name:
        raise InvalidArgument("path", path, "a LoRA file (.safetensors), or a folder with one")
    place = Path(name).expanduser()
    if not place.is_dir():
        return place
    for candidate in (place / DIFFUSERS_FILE, place / PEFT_FILE):
        if candidate.is_file():
            return candidate
    raise CheckpointError(place, None, f"holds neither {DIFFUSERS_FILE} nor {PEFT_FILE}")


def _made_for(metadata: Mapping[str, str]) -> str:
    """What the file says of its base model, to be added to an error."""
    said = metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture")
    return f"; the file says that it was made for {said!r:.60}" if said else ""


def _check(file: SafetensorsFile, entries: Mapping[str, Entry], module: str, shape: torch.Size) -> None:
    """Refuse factors that do not change a weight of this shape. 1×1 kernels may be written or not."""

    def refuse(entry: Entry, why: str) -> CheckpointError:
        return CheckpointError(file.path, entry.name, why)

    for factor in ("down", "up"):
        if factor not in entries:
            raise refuse(next(iter(entries.values())), f"has no partner: {module} lacks its {factor}")
    for factor, entry in entries.items():
        if entry.dtype not in DTYPES and not (factor == "alpha" and entry.dtype in INTEGERS):
            raise refuse(entry, f"is {entry.dtype}; a LoRA holds floats")
    outputs, inputs, *kernel = _trimmed(shape)
    rank = (*entries["down"].shape, 0)[0]
    if rank == 0:
        raise refuse(entries["down"], f"is {list(entries['down'].shape)}: its rank is 0")
    wanted = {"down": [rank, inputs, *kernel], "up": [outputs, rank]}
    if "mid" in entries:
        wanted |= {"down": [rank, inputs], "mid": [rank, rank, *kernel]}
    for factor, size in wanted.items():
        given = entries[factor].shape
        if _trimmed(given) != size:
            why = f"is {list(given)}, but {module} is {list(shape)} and needs {size}"
            other = "; was it made for another base model?" if factor == "down" else ""
            raise refuse(entries[factor], f"{why}{other}{_made_for(file.metadata)}")
    if "alpha" in entries and entries["alpha"].shape not in ((), (1,)):
        raise refuse(entries["alpha"], f"is {list(entries['alpha'].shape)}; alpha is one number")


def _trimmed(shape: Iterable[int]) -> list[int]:
    """A weight's shape without a kernel of 1×1."""
    sizes = list(shape)
    return sizes[:2] if sizes[2:] == [1, 1] else sizes


def _low_rank(
    file: SafetensorsFile, entries: Mapping[str, Entry], module: str, configs: Mapping[str, LoraConfig]
) -> LowRank:
    """The change that checked factors describe, copied out of the file."""
    down, up = (read_tensor(entries[factor]).clone() for factor in ("down", "up"))
    rank, alpha = len(down), None
    if "mid" in entries:  # a convolution cut twice: 1×1, then the kernel, then 1×1
        mid = read_tensor(entries["mid"], torch.float32)
        down = torch.einsum("rshw,si->rihw", mid, down.float().flatten(1))
    if "alpha" in entries:
        alpha = _number(entries["alpha"])
        if alpha <= 0:
            raise CheckpointError(file.path, entries["alpha"].name, f"is {alpha:g}; expected above 0")
    part, _, name = module.partition(".")
    return LowRank(down.flatten(1), up.flatten(1), configs[part].scale(name, rank, alpha))


def _number(entry: Entry) -> float:
    """The one number of a tensor, float or integer."""
    if entry.dtype in DTYPES:
        return read_tensor(entry, torch.float32).item()
    return float(int.from_bytes(b"".join(entry.chunks()), "little", signed=entry.dtype[0] == "I"))


def write_lora(
    folder: str | os.PathLike[str],
    factors: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
    alpha: float,
) -> None:
    """Write a LoRA, of one rank: `factors` are (down, up) by network ("unet", "text_encoder") and module.

    The folder gets one file for diffusers, and for peft a folder of each network with an adapter_config.json
    (the text encoder's names start with `text_model.`, which transformers 5.6 and later leave out). An older
    LoRA there is replaced once this one is complete. CheckpointError when it cannot be written.
    """
    target = Path(os.path.abspath(folder))
    configs = {
        part: peft_fields(len(next(iter(modules.values()))[0]), alpha, list(modules))
        for part, modules in factors.items()
    }
    flat = {f"{part}.{name}": value for part, fields in configs.items() for name, value in fields.items()}
    with replacing(target) as temporary:
        temporary.mkdir(parents=True)
        whole: dict[str, Payload] = {}
        for part, modules in factors.items():
            own = {
                f"{name}.lora_{factor}.weight": payload(tensor)
                for name, pair in modules.items()
                for factor, tensor in zip("AB", pair, strict=True)
            }
            whole |= {f"{part}.{key}": tensor for key, tensor in own.items()}
            (temporary / part).mkdir()
            peft = {PEFT + key: tensor for key, tensor in own.items()}
            write_safetensors(temporary / part / PEFT_FILE, peft, {"format": "pt"})
            text = json.dumps(configs[part], indent=2) + "\n"
            (temporary / part / CONFIG_FILE).write_text(text, encoding="utf-8")
        write_safetensors(temporary / DIFFUSERS_FILE, whole, {"format": "pt", METADATA: json.dumps(flat)})
