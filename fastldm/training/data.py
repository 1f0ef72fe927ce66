"""Pictures of scenes with their captions, drawn once from a seed and kept in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastldm.scenes import SIZES, Scene, render, sample_scene
from fastldm.scenes.captions import FACTS, caption_and_facts, scene_labels


@dataclass(frozen=True)
class SceneData:
    """`images` uint8 [N, 128, 128, 3]; the scenes they show."""

    images: Tensor
    scenes: tuple[Scene, ...]

    @classmethod
    def draw(
        cls, count: int, seed: int, sizes: Sequence[int] | None = None, centred: float = 0.0
    ) -> SceneData:
        """`count` one-object scenes, none of a held-out pair.

        `sizes`: how often an object is small, medium, large (None: all alike); `centred`: the share that
        surely stands centred.
        """
        rng = np.random.default_rng(seed)
        names = tuple(SIZES)
        chances = None if sizes is None else np.array(sizes) / sum(sizes)
        scenes = []
        for _ in range(count):
            size = None if chances is None else names[rng.choice(len(names), p=chances)]
            position = "centre" if centred and rng.random() < centred else None
            scenes.append(sample_scene(rng, size=size, position=position))
        return cls(torch.from_numpy(np.stack([render(scene).image for scene in scenes])), tuple(scenes))

    def crops(self, batch: int, side: int, generator: torch.Generator) -> Tensor:
        """Random crops, float32 in −1…1: [batch, 3, side, side]."""
        rows = torch.randint(len(self.scenes), (batch,), generator=generator)
        room = self.images.shape[1] - side + 1
        corners = torch.randint(room, (batch, 2), generator=generator).tolist()
        parts = [
            self.images[row, y : y + side, x : x + side]
            for row, (y, x) in zip(rows.tolist(), corners, strict=True)
        ]
        return to_model(torch.stack(parts))

    def captions(self, rows: list[int], generator: torch.Generator) -> tuple[list[str], Tensor]:
        """A fresh caption for each row, and the facts it told as class indices [rows, facts], −1 where
        untold.
        """
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        texts, labels = [], []
        for row in rows:
            text, told = caption_and_facts(self.scenes[row], rng)
            found = scene_labels(self.scenes[row])
            texts.append(text)
            labels.append([found[fact] if fact in told else -1 for fact in FACTS])
        return texts, torch.tensor(labels)


def to_model(images: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] → float32 [N, 3, H, W] in −1…1, channels-last."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1
