"""Reads a one-object picture back into words, with no learning: colours by distance, kinds by overlap."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastldm.scenes.palette import COLOURS, IMAGE_SIZE, KINDS, PALETTE, SIZES
from fastldm.scenes.scene import Box, SceneObject, position_of, size_of
from fastldm.scenes.silhouettes import posed
from fastldm.scenes.styles import Pixels, silhouette_coverage

Values = NDArray[np.float32]

GRID = 32
"""Side of the square that silhouettes are compared in, their longer side scaled to fill it."""

MIN_SCORE = 0.7
"""Below this overlap a picture is not readable: of 1500 each, fresh renders reach 0.9, blots 0.4 … 0.7."""

_MIN_SIDE = 16
_FOREIGN = 48.0
"""RGB distance from the blends of background and object at which a pixel belongs to neither."""

_PALETTE = np.array(list(PALETTE.values()), np.float32)


@dataclass(frozen=True)
class Reading:
    """What a picture shows; `colour` and `box` (x0, y0, x1, y1) are None when it holds no object, `kind` also
    when the object's silhouette is none of ours.

    `score` is the overlap with the best silhouette, 0 to 1, less for pixels of a third colour.
    """

    kind: str | None
    colour: str | None
    background: str
    box: Box | None
    score: float

    @property
    def size(self) -> str | None:
        """The word of SIZES that fits the box."""
        return None if self.box is None else size_of(self.box)

    @property
    def position(self) -> str | None:
        """The word of POSITIONS for where the box stands; None also between the clear places."""
        return None if self.box is None else position_of(self.box)


def read_object(image: Pixels) -> Reading:
    """The one object of a picture uint8 [128, 128, 3] on a plain background."""
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    background = _nearest(ground)
    nothing = Reading(None, None, background, None, 0.0)

    away = pixels - ground
    distance = _length(away)
    if np.mean(_length(border - ground) > _FOREIGN) > 0.1:
        return nothing
    # The strongest pixels lie inside the object; edges are blends with the background.
    inside = distance > 0.7 * np.quantile(distance, 1 - _MIN_SIDE**2 / 4 / IMAGE_SIZE**2)
    main = np.median(pixels[inside], axis=0) if inside.any() else ground
    colour = _nearest(main)
    reach = float(((main - ground) ** 2).sum())
    if colour == background or reach < _FOREIGN**2:
        return nothing

    mask = np.clip(away @ (main - ground) / reach, 0, 1)
    strangeness = _length(away - mask[..., None] * (main - ground))
    foreign = float((strangeness > _FOREIGN).sum()) / max(float(mask.sum()), 1.0)
    box = _bounds(mask)
    if box is None:
        return nothing
    kinds, templates, squares = _templates()
    found = _normalised(mask, box)
    # Tanimoto coefficient: the ratio of intersection to union, for coverages between 0 and 1.
    common = templates @ found
    overlap = common / (squares + found @ found - common)
    best = int(np.argmax(overlap))
    score = float(overlap[best]) * max(0.0, 1 - 2 * foreign)
    if score < MIN_SCORE:
        return Reading(None, colour, background, box, score)
    return Reading(kinds[best], colour, background, box, score)


def _length(colours: Values) -> Values:
    """Euclidean length over the last axis, the three channels."""
    lengths: Values = np.sqrt(np.einsum("...c,...c->...", colours, colours))
    return lengths


def _nearest(colour: Values) -> str:
    return COLOURS[int(np.argmin(((_PALETTE - colour) ** 2).sum(axis=1)))]


def _bounds(mask: Values) -> Box | None:
    """The rows and columns that hold more than a stray pixel; None when they are too few for an object."""
    solid = np.where(mask > 0.35, mask, 0)
    sides = []
    for axis in (0, 1):
        run = np.flatnonzero(solid.sum(axis=axis) > 0.8)
        if run.size < _MIN_SIDE:
            return None
        sides.append((float(run[0]), float(run[-1] + 1)))
    (x0, x1), (y0, y1) = sides
    return x0, y0, x1, y1


def _normalised(mask: Values, box: Box) -> Values:
    """The box's content scaled by one factor to fit GRID × GRID, centred; float32 [GRID * GRID]."""
    x0, y0, x1, y1 = box
    half = max(x1 - x0, y1 - y0) / 2
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    scale = 2 * half / GRID
    grid = Image.fromarray(mask).transform(
        (GRID, GRID),
        Image.Transform.AFFINE,
        (scale, 0, cx - half, 0, scale, cy - half),
        Image.Resampling.BILINEAR,
    )
    return np.asarray(grid).reshape(-1)


@lru_cache(maxsize=1)
def _templates() -> tuple[list[str], Values, Values]:
    """Kinds [n], their silhouettes float32 [n, GRID * GRID] in all poses, and the sums of squares [n]."""
    kinds, rows = [], []
    for kind in KINDS:
        for size, (smallest, largest) in SIZES.items():
            for angle in (-7.0, -3.5, 0.0, 3.5, 7.0):
                for mirror in (False, True):
                    _, low, high = posed(kind, angle, mirror)
                    width, height = (high - low) * (smallest + largest) / 2 / (high - low).max()
                    x0, y0 = (IMAGE_SIZE - width) / 2, (IMAGE_SIZE - height) / 2
                    thing = SceneObject(kind, "black", size, (x0, y0, x0 + width, y0 + height), angle, mirror)
                    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
                    window, coverage = silhouette_coverage(thing)
                    mask[window] = coverage / np.float32(255)
                    box = _bounds(mask)
                    assert box is not None
                    kinds.append(kind)
                    rows.append(_normalised(mask, box))
    templates = np.stack(rows)
    return kinds, templates, (templates**2).sum(axis=1)
