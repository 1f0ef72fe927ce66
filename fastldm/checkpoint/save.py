"""Writing a diffusers folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastldm.abilities import Abilities
from fastldm.checkpoint.atomic import replacing
from fastldm.checkpoint.container import Payload, write_safetensors
from fastldm.checkpoint.defaults import default_abilities
from fastldm.checkpoint.detect import family_of
from fastldm.checkpoint.folder import INDEX, PAPER_CLASS
from fastldm.checkpoint.source import ABILITIES
from fastldm.checkpoint.tensors import payload
from fastldm.diffusion import SchedulerConfig
from fastldm.models.bert import BERTModel
from fastldm.models.clip import CLIPTextModel
from fastldm.models.conditioners import ClassEmbedder, SpatialRescaler
from fastldm.models.pixels import PIXELS, Autoencoder
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.unet import UNet

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "class_embedder": "model.safetensors",
    "rescaler": "model.safetensors",
}
PAPER_CLASSES = {
    "text_encoder": ["diffusers", "LDMBertModel"],
    "class_embedder": ["fastldm", "ClassEmbedder"],
    "rescaler": ["fastldm", "SpatialRescaler"],
}


def save_folder(
    folder: str | os.PathLike[str],
    *,
    unet: UNet,
    vae: Autoencoder,
    text_encoder: CLIPTextModel | BERTModel | None = None,
    class_embedder: ClassEmbedder | None = None,
    rescaler: SpatialRescaler | None = None,
    tokenizer: Tokenizer | None,
    scheduler: SchedulerConfig | Mapping[str, Any],
    dtype: torch.dtype | None = None,
    abilities: Abilities | None = None,
) -> None:
    """Write a model as a diffusers folder, its weights in `dtype` (None: as they are).

    `abilities`: what it can be asked for, None: what its family can. A model that is there already is
    replaced once the new one is complete. CheckpointError when it cannot be written.
    """
    conditioners = {"text_encoder": text_encoder, "class_embedder": class_embedder, "rescaler": rescaler}
    networks: dict[str, Any] = {"unet": unet, "vae": vae}
    networks |= {name: network for name, network in conditioners.items() if network is not None}
    weights = {
        part: {key: payload(tensor.to(dtype or tensor.dtype)) for key, tensor in network.state_dict().items()}
        for part, network in networks.items()
    }
    configs = {part: network.config.to_dict() for part, network in networks.items()}
    fields = scheduler.to_dict() if isinstance(scheduler, SchedulerConfig) else scheduler
    if abilities is None:
        abilities = default_abilities(family_of(configs), configs)
    write_folder(Path(os.path.abspath(folder)), configs, weights, tokenizer, fields, abilities)


def write_folder(
    folder: Path,
    configs: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, Mapping[str, Payload]],
    tokenizer: Tokenizer | None,
    scheduler: Mapping[str, Any],
    abilities: Abilities,
) -> None:
    """Write a diffusers folder from its parts; parent folders are made as needed."""
    with replacing(folder) as temporary:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for part, tensors in weights.items():
            (temporary / part).mkdir(parents=True)
            _write_json(temporary / part / "config.json", configs[part])
            if tensors:  # pixels need none
                write_safetensors(temporary / part / WEIGHTS[part], tensors, {"format": "pt"})
        (temporary / "scheduler").mkdir()
        _write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
        family = family_of(configs)
        autoencoder = configs["vae"]["_class_name"]
        index: dict[str, Any] = {
            "_class_name": PAPER_CLASS,
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "unet": ["diffusers", configs["unet"]["_class_name"]],
            "vae": ["fastldm" if autoencoder == PIXELS else "diffusers", autoencoder],
            **{part: PAPER_CLASSES[part] for part in configs if part in PAPER_CLASSES},
        }
        if family.startswith("sd"):
            index |= {
                "_class_name": f"StableDiffusion{'Inpaint' if family.endswith('-inpaint') else ''}Pipeline",
                "feature_extractor": [None, None],
                "requires_safety_checker": False,
                "safety_checker": [None, None],
                "text_encoder": ["transformers", "CLIPTextModel"],
            }
        if tokenizer is not None:
            (temporary / "tokenizer").mkdir()
            tokenizer.save(temporary / "tokenizer")
            stated = json.loads((temporary / "tokenizer" / "tokenizer_config.json").read_bytes())
            index["tokenizer"] = ["transformers", stated["tokenizer_class"]]
        if abilities != default_abilities(family, configs):
            index[ABILITIES] = abilities.to_dict()
        _write_json(temporary / INDEX, index)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
