"""The landscapes: a sky with two or three tones of ground below it, the same picture each time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fastldm.scenes.palette import IMAGE_SIZE

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]

VARIANTS = 4
"""Pictures of each landscape under each sky; hills, waves and stars stand elsewhere in each."""

_SCALE = 4  # supersampling
_NO_TINT = (1.0, 1.0, 1.0)

# From the zenith to the horizon.
_SKY: dict[str, tuple[Colour, ...]] = {
    "day": ((126, 194, 240), (160, 212, 244)),
    "sunset": ((150, 96, 158), (228, 124, 136), (255, 188, 140)),
    "night": ((16, 20, 54), (46, 56, 110)),
}
_LIGHT: dict[str, tuple[float, float, float]] = {
    "day": _NO_TINT,
    "sunset": (1.0, 0.8, 0.78),
    "night": (0.36, 0.44, 0.62),
}
_STAR: Colour = (236, 232, 200)


def _wave(level: float, height: float, length: float, phase: float) -> NDArray[np.float64]:
    """A polygon [n, 2] in pixels: all below a sine around `level`."""
    x = np.linspace(-1, IMAGE_SIZE + 1, 66)
    y = level - height * np.sin(2 * np.pi * (x / length + phase))
    corners = [(IMAGE_SIZE + 1, IMAGE_SIZE + 1), (-1, IMAGE_SIZE + 1)]
    return np.concatenate([np.stack([x, y], axis=1), corners])


def _dune(level: float, height: float, length: float, phase: float) -> NDArray[np.float64]:
    """Like `_wave`, with sharp crests that lean to one side."""
    x = np.linspace(-1, IMAGE_SIZE + 1, 131)
    t = (x / length + phase) % 1
    rise = np.where(t < 0.65, t / 0.65, (1 - t) / 0.35)
    y = level - height * np.sin(np.pi / 2 * rise) ** 1.4
    corners = [(IMAGE_SIZE + 1, IMAGE_SIZE + 1), (-1, IMAGE_SIZE + 1)]
    return np.concatenate([np.stack([x, y], axis=1), corners])


Ground = list[tuple[NDArray[np.float64], Colour]]


def _meadow(phase: float) -> Ground:
    return [
        (_wave(80, 7, 120, phase), (146, 204, 112)),
        (_wave(96, 6, 150, phase + 0.45), (112, 186, 84)),
    ]


def _snow(phase: float) -> Ground:
    return [
        (_wave(78, 9, 110, phase), (214, 228, 242)),
        (_wave(96, 5, 160, phase + 0.5), (244, 248, 252)),
    ]


def _beach(phase: float) -> Ground:
    return [
        (_wave(70, 0, 100, 0), (64, 150, 206)),
        (_wave(93, 2.5, 90, phase), (216, 190, 138)),
        (_wave(98, 2.5, 90, phase), (240, 216, 164)),
    ]


def _sea(phase: float) -> Ground:
    return [
        (_wave(66, 0, 100, 0), (76, 158, 214)),
        (_wave(84, 2.5, 43, phase), (56, 138, 204)),
        (_wave(105, 3.5, 64, phase + 0.4), (40, 118, 192)),
    ]


def _desert(phase: float) -> Ground:
    return [
        (_dune(88, 18, 112, phase), (222, 166, 102)),
        (_dune(108, 16, 136, phase + 0.5), (240, 192, 126)),
    ]


_GROUNDS: dict[str, Callable[[float], Ground]] = {
    "meadow": _meadow,
    "snow": _snow,
    "beach": _beach,
    "sea": _sea,
    "desert": _desert,
}


@cache
def landscape(name: str, sky: str, variant: int) -> Pixels:
    """The picture uint8 [128, 128, 3] of a landscape; read only."""
    sheet = Image.fromarray(np.repeat(np.repeat(_heaven(sky), _SCALE, 0), IMAGE_SIZE * _SCALE, 1))
    draw = ImageDraw.Draw(sheet)
    for x, y, radius in _stars(variant) if sky == "night" else []:
        box = [(x - radius) * _SCALE, (y - radius) * _SCALE, (x + radius) * _SCALE, (y + radius) * _SCALE]
        draw.ellipse(box, fill=_STAR)
    for outline, tone in _GROUNDS[name](variant / VARIANTS):
        draw.polygon((outline * _SCALE).ravel().tolist(), fill=_lit(tone, sky))
    picture = np.array(sheet.reduce(_SCALE))
    picture.flags.writeable = False
    return picture


@cache
def landscape_edges(name: str, variant: int) -> Pixels:
    """How far lines along the edges of the ground cover each pixel, 0 … 255, [128, 128]; read only."""
    sheet = Image.new("L", (IMAGE_SIZE * _SCALE, IMAGE_SIZE * _SCALE))
    draw = ImageDraw.Draw(sheet)
    for outline, _ in _GROUNDS[name](variant / VARIANTS):
        edge = (outline * _SCALE).ravel().tolist()
        draw.polygon(edge, fill=0)
        draw.line(edge[:-4], fill=255, width=2 * _SCALE, joint="curve")
    edges = np.array(sheet.reduce(_SCALE))
    edges.flags.writeable = False
    return edges


def _heaven(sky: str) -> Pixels:
    """The colours of a sky by rows, uint8 [128, 1, 3]."""
    stops = np.array(_SKY[sky], np.float64)
    at = np.linspace(0, 88, len(stops))
    rows = [np.interp(np.arange(IMAGE_SIZE), at, channel) for channel in stops.T]
    return np.stack(rows, axis=-1)[:, None].round().astype(np.uint8)


def _lit(tone: Colour, sky: str) -> Colour:
    red, green, blue = (round(part * light) for part, light in zip(tone, _LIGHT[sky], strict=True))
    return red, green, blue


def _stars(variant: int) -> list[tuple[float, float, float]]:
    """Centres and radii in pixels, spread over the sky."""
    rng = np.random.default_rng(variant)
    cells = [(column, row) for column in range(5) for row in range(3)]
    return [
        (
            (column + rng.uniform(0.15, 0.85)) * IMAGE_SIZE / 5,
            4 + (row + rng.uniform(0.1, 0.9)) * 20,
            rng.uniform(0.8, 1.3),
        )
        for column, row in cells
    ]
