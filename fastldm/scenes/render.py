"""From a scene to its picture and its segmentation map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fastldm.scenes.palette import IMAGE_SIZE
from fastldm.scenes.scene import Scene
from fastldm.scenes.styles import PAINTERS, Pixels


@dataclass(frozen=True)
class Rendered:
    """A picture [128, 128, 3] and its map [128, 128]: 0 is background, 1 + KINDS.index(kind) an object."""

    image: Pixels
    segmentation: Pixels
    scene: Scene


def render(scene: Scene) -> Rendered:
    """The picture of a scene: the same bytes for the same scene."""
    segmentation = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    image = PAINTERS[scene.style](scene, segmentation)
    return Rendered(image, segmentation, scene)


def contact_sheet(images: Sequence[Pixels], columns: int, gap: int = 2) -> Image.Image:
    """The pictures [h, w, 3], all of one size, row by row in a grid on grey."""
    height, width = images[0].shape[:2]
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), (128, 128, 128))
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet.paste(Image.fromarray(image), (column * (width + gap), row * (height + gap)))
    return sheet
