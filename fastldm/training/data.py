"""Pictures with captions, in memory; those of scenes are drawn from a seed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.scenes import (
    COLOURS,
    KINDS,
    Scene,
    caption_and_facts,
    draw_scene,
    label_prompt,
    layout_of,
    layout_prompt,
    render,
)
from fastldm.training.origin import digest

LAYOUTS = 0.1
LABELS = 0.1
"""Chances that a picture's prompt is a layout of boxes, or a class label where it shows one object."""


@dataclass(frozen=True)
class PictureData(ABC):
    """`images` uint8 [N, S, S, 3], and maps of the classes that they show, uint8 [N, S, S], 0 for none."""

    images: Tensor
    segmentation: Tensor

    @cached_property
    def pictures_digest(self) -> str:
        """Of the pictures."""
        return digest(self.images)

    @property
    @abstractmethod
    def captions_digest(self) -> str:
        """Of what the captions are made of."""

    @abstractmethod
    def captions(self, rows: list[int], generator: torch.Generator) -> list[tuple[str, frozenset[str]]]:
        """A caption for each row, and the facts that it told, as far as they are known."""

    def crops(self, batch: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random crops: float32 in −1…1 [batch, 3, side, side], and their maps uint8 [batch, side, side]."""
        rows = torch.randint(len(self.images), (batch,), generator=generator).tolist()
        room = self.images.shape[1] - side + 1
        corners = torch.randint(room, (batch, 2), generator=generator).tolist()
        windows = [
            (row, slice(y, y + side), slice(x, x + side)) for row, (y, x) in zip(rows, corners, strict=True)
        ]
        images = torch.stack([self.images[window] for window in windows])
        return to_model(images), torch.stack([self.segmentation[window] for window in windows])


@dataclass(frozen=True)
class SceneData(PictureData):
    """Pictures of scenes, drawn from a seed; their captions are phrased anew each time.

    `colours` uint8 [N, 128, 128]: 0 is background, 1 + COLOURS.index(colour) an object.
    """

    colours: Tensor
    scenes: tuple[Scene, ...]

    @classmethod
    def draw(cls, count: int, seed: int, stage: int = 1, arranged: float = 0.0) -> SceneData:
        """`count` scenes of a stage of the world, nothing held out among them; see `draw_scene`."""
        rng = np.random.default_rng(seed)
        scenes = tuple(draw_scene(rng, stage, arranged) for _ in range(count))
        first = render(scenes[0])
        images = np.empty((count, *first.image.shape), np.uint8)
        maps, colours = np.zeros((2, count, *first.segmentation.shape), np.uint8)
        for i, scene in enumerate(scenes):
            drawn = render(scene)
            images[i], maps[i] = drawn.image, drawn.segmentation
            for thing in scene.objects:  # no two boxes overlap
                x0, y0, x1, y1 = thing.box
                window = slice(int(y0), math.ceil(y1)), slice(int(x0), math.ceil(x1))
                colours[i][window] = (maps[i][window] > 0) * (1 + COLOURS.index(thing.colour))
        return cls(torch.from_numpy(images), torch.from_numpy(maps), torch.from_numpy(colours), scenes)

    def cells(self, factor: int) -> Tensor:
        """The share of each class, then of each colour, in each cell of factor × factor pixels: float16
        [N, classes + colours, h, w], background first in both.
        """
        parts = zip(self.segmentation.split(64), self.colours.split(64), strict=True)
        return torch.cat(
            [
                torch.cat(
                    (shares(kinds, factor, 1 + len(KINDS)), shares(hues, factor, 1 + len(COLOURS))), 1
                ).half()
                for kinds, hues in parts
            ]
        )

    @property
    def captions_digest(self) -> str:
        """Of the scenes, which the captions tell of."""
        return digest(self.scenes)

    def captions(self, rows: list[int], generator: torch.Generator) -> list[tuple[str, frozenset[str]]]:
        """A fresh caption for each row, and the facts that it told; now and then a label or a layout."""
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        return [prompt_and_facts(self.scenes[row], rng) for row in rows]


def shares(classes: Tensor, factor: int, count: int) -> Tensor:
    """The share of each class in each cell of factor × factor pixels: uint8 [N, H, W] → float32 [N, count, h,
    w].
    """
    return F.avg_pool2d(F.one_hot(classes.long(), count).permute(0, 3, 1, 2).float(), factor)


def share_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy between the classes read in each cell and the shares that they have there, [N, classes,
    h, w] both.
    """
    return -(wanted.float() * logits.float().log_softmax(1)).sum(1).mean()


def prompt_and_facts(scene: Scene, rng: np.random.Generator) -> tuple[str, frozenset[str]]:
    """What a picture of the scene may be asked for by, as a caption, a class label or a layout of boxes."""
    lot = rng.random()
    if lot < LAYOUTS:
        colours = bool(rng.integers(2))
        told = frozenset({"kind", "count", "colour"} if colours else {"kind", "count"})
        return layout_prompt(layout_of(scene, colours)), told
    if lot < LAYOUTS + LABELS and len(scene.objects) == 1:
        return label_prompt(scene.objects[0].kind), frozenset({"kind", "count"})
    return caption_and_facts(scene, rng)


def to_model(images: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] → float32 [N, 3, H, W] in −1…1, channels-last."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1
