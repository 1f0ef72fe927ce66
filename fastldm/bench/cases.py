"""What is raced, in plain figures that every process may read at no cost."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Model:
    """A diffusers folder, and what the inputs of its networks look like."""

    name: str
    folder: str
    in_channels: int  # of the UNet
    latent_channels: int
    context_width: int
    tokens: int  # of a prompt
    factor: int  # pixels along a side of a latent
    multiple: int  # of pixels, that the UNet's levels divide
    side: int  # pixels along a side of its pictures
    has_text: bool

    @classmethod
    def of(cls, name: str, folder: Path) -> Model:
        """Read from the configurations."""
        unet, vae = read(folder / "unet"), read(folder / "vae")
        has_text = (folder / "text_encoder").is_dir()
        text = read(folder / "text_encoder") if has_text else {}
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        return cls(
            name,
            str(folder),
            in_channels=unet["in_channels"],
            latent_channels=vae["latent_channels"],
            context_width=unet["cross_attention_dim"],
            tokens=text.get("max_position_embeddings", 77),
            factor=factor,
            multiple=factor * 2 ** (len(unet["block_out_channels"]) - 1),
            side=unet.get("sample_size", 64) * factor,
            has_text=has_text,
        )


@dataclass(frozen=True)
class Case:
    """Pictures made at once, and the pixels along their sides."""

    batch: int
    side: int


def read(folder: Path) -> dict[str, Any]:
    """The configuration of a network."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
