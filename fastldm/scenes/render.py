"""From a scene to its picture and its segmentation map."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fastldm.scenes.palette import IMAGE_SIZE, KINDS, PALETTE
from fastldm.scenes.scene import Scene, SceneObject
from fastldm.scenes.silhouettes import posed

Pixels = NDArray[np.uint8]

SUPERSAMPLING = 4

_CLASS = {kind: i + 1 for i, kind in enumerate(KINDS)}


@dataclass(frozen=True)
class Rendered:
    """A picture [128, 128, 3] and its map [128, 128]: 0 is background, 1 + KINDS.index(kind) an object."""

    image: Pixels
    segmentation: Pixels
    scene: Scene


def render(scene: Scene) -> Rendered:
    """The picture of a scene: the same bytes for the same scene."""
    paint = STYLES[scene.style]
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    image[:] = PALETTE[scene.background]
    segmentation = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    for thing in scene.objects:
        window, coverage = silhouette_coverage(thing)
        paint(image[window], coverage, PALETTE[thing.colour])
        segmentation[window][coverage >= 128] = _CLASS[thing.kind]
    return Rendered(image, segmentation, scene)


def silhouette_coverage(thing: SceneObject) -> tuple[tuple[slice, slice], Pixels]:
    """The window (rows, columns) of whole pixels around an object, and how far each is covered, 0 … 255."""
    x0, y0, x1, y1 = thing.box
    left, top, right, bottom = math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)
    parts, low, high = posed(thing.kind, thing.angle, thing.mirror)
    scale = np.array([x1 - x0, y1 - y0]) / (high - low)
    shift = np.array([x0 - left, y0 - top]) - low * scale
    # A pixel's centre is at its integer coordinate in Pillow, hence the half.
    scale, shift = scale * SUPERSAMPLING, shift * SUPERSAMPLING - 0.5
    canvas = Image.new("L", ((right - left) * SUPERSAMPLING, (bottom - top) * SUPERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    for points, ink in parts:
        draw.polygon((points * scale + shift).ravel().tolist(), fill=255 if ink else 0)
    coverage = np.asarray(canvas.reduce(SUPERSAMPLING))
    return (slice(top, bottom), slice(left, right)), coverage


def _paint_flat(canvas: Pixels, coverage: Pixels, colour: tuple[int, int, int]) -> None:
    # 255 * 255 + 127 still fits into 16 bits.
    alpha = coverage[..., None].astype(np.uint16)
    canvas[:] = (canvas * (255 - alpha) + np.array(colour, np.uint16) * alpha + 127) // 255


STYLES: dict[str, Callable[[Pixels, Pixels, tuple[int, int, int]], None]] = {"flat": _paint_flat}
"""Style name to a function that paints one object into its window of the picture, in place."""


def contact_sheet(images: Sequence[Pixels], columns: int, gap: int = 2) -> Image.Image:
    """The pictures [h, w, 3], all of one size, row by row in a grid on grey."""
    height, width = images[0].shape[:2]
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), (128, 128, 128))
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet.paste(Image.fromarray(image), (column * (width + gap), row * (height + gap)))
    return sheet
