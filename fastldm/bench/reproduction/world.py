"""The world to learn: a large flat object about the centre of a white ground, its kind the class, each in a
colour of its own; and renders to compare with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.bench.reproduction.settings import Settings
from fastldm.scenes import COLOURS, HELD_OUT_PAIRS, IMAGE_SIZE, KINDS, Scene, render, sample_scene

CLASSES = len(KINDS)
NULL = CLASSES
"""The class that stands for none."""

GROUND = "white"
_TRAINING, _REFERENCE = 11, 12


def own_colour(kind: str) -> str:
    """A kind's one colour: of those that scenes have it in, so that all occur about as often."""
    colours = [colour for colour in COLOURS if colour != GROUND]
    first = KINDS.index(kind) % len(colours)
    turned = colours[first:] + colours[:first]
    return next(colour for colour in turned if (kind, colour) not in HELD_OUT_PAIRS)


@dataclass(frozen=True)
class Pictures:
    """uint8 [N, side, side, 3], and the index of each one's kind in KINDS, int64 [N]."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class World:
    """Pictures to learn from, and others that no training sees. They are the same for every seed."""

    training: Pictures
    reference: Pictures

    @classmethod
    def draw(cls, settings: Settings) -> World:
        """Kinds in turn, so that each occurs as often as the others."""
        return cls(
            pictures(settings.pictures, settings.side, _TRAINING),
            pictures(settings.samples, settings.side, _REFERENCE),
        )


def pictures(count: int, side: int, seed: int) -> Pictures:
    """So many scenes rendered, and shrunk to side x side by averaging."""
    rng = np.random.default_rng(seed)
    labels = torch.arange(count) % CLASSES
    scenes = [_scene(rng, KINDS[label]) for label in labels.tolist()]
    return Pictures(torch.stack([shrunk(render(scene).image, side) for scene in scenes]), labels)


def _scene(rng: np.random.Generator, kind: str) -> Scene:
    """Nets as small as these learn such scenes in minutes, and then differ by what the tables ask about."""
    colour = own_colour(kind)
    return sample_scene(rng, kind=kind, colour=colour, background=GROUND, size="large", position="centre")


def shrunk(image: np.ndarray, side: int) -> Tensor:
    """A square picture uint8 [n * side, n * side, 3] averaged over n x n pixels, rounded."""
    n = len(image) // side
    blocks = image.reshape(side, n, side, n, 3).astype(np.float64).mean(axis=(1, 3))
    return torch.from_numpy(np.floor(blocks + 0.5).astype(np.uint8))


def enlarged(images: Tensor) -> Tensor:
    """Pictures uint8 [N, side, side, 3] at the size that the judge reads, bilinear."""
    pixels = images.permute(0, 3, 1, 2).float()
    large = F.interpolate(pixels, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    return large.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
