"""The judge: reads pictures of scenes back into words, by a small detector that learnt from renders alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from fastldm.errors import CheckpointError, InvalidArgument
from fastldm.scenes.judge_net import BOX_UNIT, CELL, Cells, JudgeNet
from fastldm.scenes.palette import COLOURS, IMAGE_SIZE, KINDS, LANDSCAPES, SKIES, STYLES
from fastldm.scenes.scene import Box, Placed, size_of

WEIGHTS = Path(__file__).parents[1] / "assets" / "judge" / "model.safetensors"

GROUNDS = COLOURS + LANDSCAPES
NO_SKY = "none"
FACTS: dict[str, tuple[str, ...]] = {"background": GROUNDS, "sky": (NO_SKY, *SKIES), "style": STYLES}
"""What is read of a whole picture, and its classes."""

CLASSES = {"kinds": ",".join(KINDS), "colours": ",".join(COLOURS)} | {
    fact: ",".join(names) for fact, names in FACTS.items()
}
"""The order of the outputs, kept beside the weights."""

MIN_HEAT = 0.4
"""Chance from which there is an object."""

MIN_CHANCE = 0.8
"""Chance from which a kind or a colour is named. At 0.6, 0.8 and 0.9 the judge reads 99.88, 99.52 and 99.00 %
of the objects of the hardest style, so that 0.8 surely leaves 99 %; and it takes 13, 9 and 5 % of near misses
for our objects. (`python -m benchmarks.judge`)
"""

_BATCH = 32


@dataclass(frozen=True)
class Seen(Placed):
    """One object of a picture; `kind` or `colour` is None where the picture shows none of ours clearly.

    `box`: x0, y0, x1, y1 in pixels. `score`: the chance that object, kind and colour are right, 0 to 1.
    """

    kind: str | None
    colour: str | None
    box: Box
    score: float

    @property
    def size(self) -> str:
        """The word of SIZES that fits the box best."""
        return size_of(self.box)


@dataclass(frozen=True)
class Reading:
    """What a picture shows: objects from the surest on, a colour or landscape as background, its sky."""

    objects: tuple[Seen, ...]
    background: str
    sky: str | None
    style: str


class Judge:
    """Reads pictures of 128 x 128 pixels: a uint8 array or tensor [N, 128, 128, 3], or a list of RGB images
    of PIL or of arrays [128, 128, 3]. InvalidArgument for anything else.

    One call reads any number of pictures; threads may share a judge. `min_chance`: from which chance a kind
    or a colour is named.
    """

    def __init__(self, net: JudgeNet, min_chance: float = MIN_CHANCE) -> None:
        self.net, self.min_chance = net.eval().requires_grad_(False), min_chance
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None, min_chance: float = MIN_CHANCE) -> Judge:
        """From a file that `fastldm train` wrote; None is the judge that fastldm ships.

        CheckpointError when it cannot be read, or learnt other names than this version has.
        """
        file = Path(WEIGHTS if path is None else path)
        try:
            with safe_open(file, "pt") as stored:
                learnt = stored.metadata() or {}
                state = {key: stored.get_tensor(key).float() for key in stored.keys()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(file, None, f"cannot be read: {error}") from None
        for name, order in CLASSES.items():
            if learnt.get(name) != order:
                raise CheckpointError(file, None, f"is a judge of other {name}: {learnt.get(name)}")
        net = new_net()
        try:
            net.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(file, None, f"is another network: {error}") from None
        return cls(net, min_chance)

    def read(self, images: object) -> list[Reading]:
        """The scene of each picture."""
        return self.read_with_features(images)[0]

    @torch.inference_mode()
    def read_with_features(self, images: object) -> tuple[list[Reading], Tensor]:
        """The scene of each picture, and `features`, by one look at it."""
        readings, features = [], []
        for batch in _batches(images):
            _, merged, deep = self.net.levels(batch)
            found = _objects(self.net.cells(merged), self.min_chance)
            features.append(self.net.pooled(deep))
            facts = [logits.argmax(1).tolist() for logits in self.net.whole(features[-1])]
            for objects, background, sky, style in zip(found, *facts, strict=True):
                readings.append(
                    Reading(objects, GROUNDS[background], SKIES[sky - 1] if sky else None, STYLES[style])
                )
        return readings, torch.cat(features)

    @torch.inference_mode()
    def segment(self, images: object) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Maps [N, 128, 128]: 0 is background, 1 + KINDS.index(kind) an object."""
        maps = []
        for batch in _batches(images):
            fine, merged, _ = self.net.levels(batch)
            logits = F.interpolate(
                self.net.map(fine, merged), scale_factor=2, mode="bilinear", align_corners=False
            )
            maps.append(logits.argmax(1).to(torch.uint8).numpy())
        return np.concatenate(maps)

    @torch.inference_mode()
    def features(self, images: object) -> Tensor:
        """A vector for each picture, float32 [N, 128], for the Fréchet distance between sets of pictures."""
        return torch.cat([self.net.pooled(self.net.levels(batch)[2]) for batch in _batches(images)])


def new_net(**options: Any) -> JudgeNet:
    """The network for the classes of this world; `options` as of JudgeNet."""
    return JudgeNet(len(KINDS), len(COLOURS), tuple(map(len, FACTS.values())), **options)


def _batches(images: object) -> Iterator[Tensor]:
    """The pictures, some at a time: float32 in −1…1 [n, 3, 128, 128], channels-last."""
    for part in _pixels(images).split(_BATCH):
        yield part.permute(0, 3, 1, 2).float() / 127.5 - 1


def _pixels(images: object) -> Tensor:
    """All pictures, uint8 [N, 128, 128, 3]."""
    if isinstance(images, list | tuple):
        arrays = [_checked(np.asarray(image), (IMAGE_SIZE, IMAGE_SIZE, 3)) for image in images]
        images = np.stack(arrays) if arrays else None
    elif isinstance(images, Tensor):
        images = images.numpy(force=True)
    shape = getattr(images, "shape", ())[:1] or (1,)
    return torch.from_numpy(_checked(images, (*shape, IMAGE_SIZE, IMAGE_SIZE, 3)).copy())


def _checked(array: object, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.shape == shape and array.size:
        return array
    given = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
    allowed = f"RGB pictures of {IMAGE_SIZE} x {IMAGE_SIZE} pixels: uint8 [N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3]"
    raise InvalidArgument("images", given, allowed)


def _objects(cells: Cells, min_chance: float) -> list[tuple[Seen, ...]]:
    """The objects of each picture: where the heat peaks, the surest of those whose boxes overlap."""
    heat = cells.heat.sigmoid()
    peaks = (heat == F.max_pool2d(heat, 3, 1, 1)) & (heat >= MIN_HEAT)
    picture, _, row, column = peaks.nonzero(as_tuple=True)
    sure = heat[picture, 0, row, column]
    kinds, kind_chance = _named(cells.kind[picture, :, row, column], KINDS, min_chance)
    colours, colour_chance = _named(cells.colour[picture, :, row, column], COLOURS, min_chance)
    score = (sure * kind_chance * colour_chance).tolist()
    centre = torch.stack([column, row], 1) * CELL + CELL / 2
    low, high = (cells.box[picture, :, row, column] * BOX_UNIT).chunk(2, dim=1)
    boxes = torch.cat([centre - low, centre + high], 1).clamp(0, IMAGE_SIZE).tolist()
    found: list[list[Seen]] = [[] for _ in range(len(heat))]
    for i in sure.argsort(descending=True).tolist():
        others, box = found[picture[i]], (boxes[i][0], boxes[i][1], boxes[i][2], boxes[i][3])
        if all(overlap(box, other.box) <= 0.5 for other in others):
            others.append(Seen(kinds[i], colours[i], box, score[i]))
    return [tuple(objects) for objects in found]


def _named(logits: Tensor, names: tuple[str, ...], least: float) -> tuple[list[str | None], Tensor]:
    """The likeliest name of each row, None where it is none of ours or not sure, and its chance."""
    chance, best = logits.softmax(1).max(1)
    best[chance < least] = len(names)
    return [(*names, None)[i] for i in best.tolist()], chance


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    common = width * height
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return common / (areas - common)
