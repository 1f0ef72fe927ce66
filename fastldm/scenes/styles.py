"""The styles: each paints a scene into a picture and marks its objects in a segmentation map."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from fastldm.scenes.landscapes import VARIANTS, landscape, landscape_edges
from fastldm.scenes.palette import IMAGE_SIZE, KINDS, PALETTE
from fastldm.scenes.scene import BLOCK, Scene, SceneObject, snapped
from fastldm.scenes.silhouettes import posed
from fastldm.scenes.sprites import LARGEST, sprite

Pixels = NDArray[np.uint8]
Values = NDArray[np.float32]
Window = tuple[slice, slice]
Colour = tuple[int, int, int]

SUPERSAMPLING = 4

_CLASS = {kind: i + 1 for i, kind in enumerate(KINDS)}


def silhouette_coverage(thing: SceneObject, room: int = 0) -> tuple[Window, Pixels]:
    """The window (rows, columns) of whole pixels around an object, and how far each is covered, 0 … 255.

    The window is `room` pixels wider than the box on every side that is not the picture's own.
    """
    x0, y0, x1, y1 = thing.box
    left, top = (max(math.floor(low) - room, 0) for low in (x0, y0))
    right, bottom = (min(math.ceil(high) + room, IMAGE_SIZE) for high in (x1, y1))
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


def _backdrop(scene: Scene) -> Pixels:
    """What stands behind the objects, uint8 [128, 128, 3]; the caller's own."""
    if scene.sky is not None:
        return landscape(scene.background, scene.sky, _seed(scene) % VARIANTS).copy()
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    image[:] = PALETTE[scene.background]
    return image


def _seed(scene: Scene) -> int:
    """The same number for the same scene, on every machine."""
    return zlib.crc32(repr(scene).encode())


def _blend(canvas: Pixels, coverage: Pixels, colour: Colour) -> None:
    # 255 * 255 + 127 still fits into 16 bits.
    alpha = coverage[..., None].astype(np.uint16)
    canvas[:] = (canvas * (255 - alpha) + np.array(colour, np.uint16) * alpha + 127) // 255


def _paint_flat(scene: Scene, segmentation: Pixels) -> Pixels:
    image = _backdrop(scene)
    for thing in scene.objects:
        window, coverage = silhouette_coverage(thing)
        _blend(image[window], coverage, PALETTE[thing.colour])
        segmentation[window][coverage >= 128] = _CLASS[thing.kind]
    return image


LINE = 2.0
"""Width of the outlines in pixels."""

_LINES: tuple[Colour, ...] = ((26, 24, 32), (246, 240, 224), (128, 126, 134))


def _line_colour(*others: NDArray[np.float64]) -> Colour:
    """The first line colour, dark before light before grey, that stands out from all the others."""
    for line in _LINES[:-1]:
        if min(np.linalg.norm(other - line) for other in others) >= 120:
            return line
    return _LINES[-1]


def _paint_outlined(scene: Scene, segmentation: Pixels) -> Pixels:
    image = _backdrop(scene)
    ground = image.mean(axis=(0, 1))
    if scene.sky is not None:
        _blend(image, landscape_edges(scene.background, _seed(scene) % VARIANTS), _line_colour(ground))
    for thing in scene.objects:
        colour = PALETTE[thing.colour]
        window, within, whole = _outlined(thing)
        _blend(image[window], whole, _line_colour(ground, np.array(colour, np.float64)))
        _blend(image[window], within, colour)
        segmentation[window][whole >= 128] = _CLASS[thing.kind]
    return image


def _outlined(thing: SceneObject) -> tuple[Window, Pixels, Pixels]:
    """The window of an object, what of it lies within its line, and it with its line, which fills the box."""
    half = LINE / 2
    x0, y0, x1, y1 = thing.box
    inner = (x0 + half, y0 + half, x1 - half, y1 - half)
    window, coverage = silhouette_coverage(replace(thing, box=inner), room=3)
    soft = _softened(coverage, half) / 255
    # Across a straight edge the blur is the normal distribution function: ±1 deviation is 0.84 and 0.16,
    # and there it falls by 0.2 a pixel.
    within, whole = (np.clip((soft - level) * 5 + 0.5, 0, 1) for level in (0.84, 0.16))
    return window, (within * 255).astype(np.uint8), (whole * 255).astype(np.uint8)


def _paint_pixel(scene: Scene, segmentation: Pixels) -> Pixels:
    side = IMAGE_SIZE // BLOCK
    image = _backdrop(scene)[BLOCK // 2 :: BLOCK, BLOCK // 2 :: BLOCK].copy()
    classes = np.zeros((side, side), np.uint8)
    for thing in scene.objects:
        window, inked = _in_blocks(snapped(thing))
        image[window][inked] = PALETTE[thing.colour]
        classes[window][inked] = _CLASS[thing.kind]
    segmentation[:] = _enlarged(classes)
    return _enlarged(image)


def _in_blocks(thing: SceneObject) -> tuple[Window, NDArray[np.bool_]]:
    """The window of a snapped object in blocks, and which of them are inked."""
    left, top, right, bottom = (int(side) // BLOCK for side in thing.box)
    width, height = right - left, bottom - top
    if max(width, height) <= LARGEST:
        inked = sprite(thing.kind, width, height)
        inked = inked[:, ::-1] if thing.mirror else inked
    else:
        _, coverage = silhouette_coverage(thing)
        share = coverage.reshape(height, BLOCK, width, BLOCK).mean(axis=(1, 3))
        if thing.kind in _SYMMETRIC:
            share = (share + share[:, ::-1]) / 2
        inked = share >= 124
    return (slice(top, bottom), slice(left, right)), inked


_SYMMETRIC = {"circle", "square", "triangle", "star", "heart", "tree", "sun", "flower", "mushroom"}


def _enlarged(blocks: Pixels) -> Pixels:
    return blocks.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)


_PAPER = np.array((252, 249, 240), np.float32)


def _paint_watercolour(scene: Scene, segmentation: Pixels) -> Pixels:
    rng = np.random.default_rng(_seed(scene))
    wobble, blots, drift = _clouds(rng, 22), _clouds(rng, 13), _clouds(rng, 5)
    image = _softened(_backdrop(scene), 1.5 if scene.sky is not None else 0)
    strength = 0.87 + 0.04 * blots + 0.05 * drift
    for thing in scene.objects:
        window, coverage = silhouette_coverage(thing, room=3)
        soft = _softened(coverage, 1.0) / 255 + 0.16 * wobble[window]
        alpha, core = (np.clip((soft - level) * 2 + 0.5, 0, 1) for level in (0.5, 0.95))
        image[window] += (np.array(PALETTE[thing.colour], np.float32) - image[window]) * alpha[..., None]
        # Wet paint carries its pigment to the rim.
        strength[window] += 0.2 * alpha * (1 - core)
        segmentation[window][alpha >= 0.5] = _CLASS[thing.kind]
    image = _PAPER + (image - _PAPER) * strength[..., None]
    return image.clip(0, 255).round().astype(np.uint8)


def _softened(picture: Pixels, radius: float) -> Values:
    blurred = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius))
    return np.array(blurred, np.float32)


def _clouds(rng: np.random.Generator, cells: int) -> Values:
    """A soft random field, float32 [128, 128] between about -1 and 1, with that many bumps along a side."""
    coarse = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


PAINTERS: dict[str, Callable[[Scene, Pixels], Pixels]] = {
    "flat": _paint_flat,
    "outlined": _paint_outlined,
    "pixel": _paint_pixel,
    "watercolour": _paint_watercolour,
}
"""Style name to the function that returns the picture of a scene and writes its objects into the map."""
