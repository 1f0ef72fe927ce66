"""What the judge must not take for an object: chimeras, fades, cuts, blobs, bent shapes, all made of renders.

Each spoils one object of a scene so far that its kind or its colour is none of ours; where it is still too
like the whole object, nothing is asked of the judge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from fastldm.scenes import COLOURS, IMAGE_SIZE, KINDS, Rendered, Scene, render

Pixels = NDArray[np.uint8]
Values = NDArray[np.float32]

LIKE = 0.75
"""Overlap of two silhouettes of one size, up to which a shape is another one."""

SEAM = 6.0
"""Mean difference of two borders, in 0 … 255, up to which the backdrops are one."""

SAME = 0.9
"""Overlap from which it is still the same."""

OURS, NONE, UNASKED = "ours", "none of ours", "unasked"


@dataclass(frozen=True)
class Spoilt:
    """A picture whose object 0 is spoilt, and where it shows: `mask` bool [128, 128].

    `kind` and `colour` are OURS when they are still those of the scene, else NONE or UNASKED.
    """

    image: Pixels
    rendered: Rendered
    mask: NDArray[np.bool_]
    kind: str
    colour: str


def chimera(whole: Rendered, rng: np.random.Generator) -> Spoilt | None:
    """One side of an object and the other side of an object of another kind."""
    other = _twin(whole, kind=_other(KINDS, whole.scene.objects[0].kind, rng))
    if other is None:
        return None
    side, a, b = _side(whole.scene, rng), _mask(whole), _mask(other)
    mixed = np.where(side, b, a)
    return _judged(whole, _blend(whole, other, side.astype(np.float32)), mixed, a, b)


def fade(whole: Rendered, rng: np.random.Generator) -> Spoilt | None:
    """Two kinds painted through each other."""
    other = _twin(whole, kind=_other(KINDS, whole.scene.objects[0].kind, rng))
    share = np.full((IMAGE_SIZE, IMAGE_SIZE), rng.uniform(0.35, 0.65), np.float32)
    if other is None:
        return None
    a, b = _mask(whole), _mask(other)
    if likeness(a, b) > LIKE:
        return None
    return Spoilt(_blend(whole, other, share), whole, a | b, NONE, UNASKED)


def two_colours(whole: Rendered, rng: np.random.Generator) -> Spoilt | None:
    """An object whose sides have different colours."""
    unlike = {whole.scene.objects[0].colour, whole.scene.background}
    other = _twin(whole, colour=str(rng.choice([name for name in COLOURS if name not in unlike])))
    mask, side = _mask(whole), _side(whole.scene, rng)
    if other is None or not 0.35 < side[mask].mean() < 0.65:
        return None
    return Spoilt(_blend(whole, other, side.astype(np.float32)), whole, mask, OURS, NONE)


def cut(whole: Rendered, rng: np.random.Generator) -> Spoilt | None:
    """An object of which a side is missing."""
    empty, side, mask = _without(whole), _side(whole.scene, rng), _mask(whole)
    if empty is None:
        return None
    return _judged(whole, _blend(whole, empty, side.astype(np.float32)), mask & ~side, mask)


def blob(whole: Rendered, rng: np.random.Generator) -> Spoilt | None:
    """A patch of an object's colour without a shape, its edge sharp or soft."""
    twin = _twin(whole, kind="square")
    empty = None if twin is None else _without(twin)
    if twin is None or empty is None:
        return None
    cells = int(rng.integers(3, 7))
    x0, y0, x1, y1 = (round(side) for side in whole.scene.objects[0].box)
    noise = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
    field = np.ones((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    size = (x1 - x0, y1 - y0)
    inside = np.asarray(noise.resize(size, Image.Resampling.BICUBIC))
    y, x = np.ogrid[-1 : 1 : 1j * size[1], -1 : 1 : 1j * size[0]]
    inside = inside - 0.45 * (x**4 + y**4).astype(np.float32)
    sharpness = float(rng.choice([2.0, 5.0, 30.0]))
    field[y0:y1, x0:x1] = 0.5 - sharpness * (inside - np.quantile(inside, rng.uniform(0.35, 0.6)))
    gone = field.clip(0, 1)  # the share of the backdrop
    mask = _mask(twin) & (gone < 0.5)
    return Spoilt(_blend(twin, empty, gone), twin, mask, NONE, UNASKED)


def bent(whole: Rendered, rng: np.random.Generator) -> Spoilt | None:
    """An object bent, out of its shape or only a little; what stands near it bends along at its edge."""
    x0, y0, x1, y1 = whole.scene.objects[0].box
    side = 1.3 * max(x1 - x0, y1 - y0)
    corner = torch.tensor([x0 + x1 - side, y0 + y1 - side]) / 2
    at = torch.stack(torch.meshgrid(*[torch.arange(IMAGE_SIZE) + 0.5] * 2, indexing="xy"), 2)
    inside = 2 * (at - corner) / side - 1  # −1…1 in a square that is a little larger than the box
    waves = torch.from_numpy(rng.standard_normal((1, 2, 5, 5)).astype(np.float32))
    waves[:, :, (0, -1)] = waves[:, :, :, (0, -1)] = 0  # the bend ends at the border of the square
    shift = F.grid_sample(waves, inside[None], "bicubic", "zeros", True)[0].permute(1, 2, 0)
    moved = at + float(rng.uniform(0.02, 0.2)) * side * shift

    def bend(values: Pixels, mode: str) -> Pixels:
        planes = torch.from_numpy(values).float().permute(2, 0, 1)[None]
        bent = F.grid_sample(planes, 2 * moved[None] / IMAGE_SIZE - 1, mode, "border", False)[0]
        return bent.round().to(torch.uint8).permute(1, 2, 0).numpy()

    mask = _mask(whole)
    bent_mask = bend(mask[..., None].astype(np.uint8), "nearest")[..., 0] > 0
    alike = likeness(bent_mask, mask)
    kind = NONE if alike < LIKE else OURS if alike > SAME else UNASKED
    return Spoilt(bend(whole.image, "bilinear"), whole, bent_mask, kind, OURS)


SPOILERS: tuple[Callable[[Rendered, np.random.Generator], Spoilt | None], ...] = (
    chimera,
    fade,
    two_colours,
    cut,
    blob,
    bent,
)


def spoil(whole: Rendered, rng: np.random.Generator) -> Spoilt | None:
    """Object 0 spoilt in a way drawn by lot; None where that way leaves too little or too much of it."""
    spoilt = SPOILERS[int(rng.integers(len(SPOILERS)))](whole, rng)
    return None if spoilt is None or spoilt.mask.sum() < 120 else spoilt


def chaos(rng: np.random.Generator) -> Pixels:
    """A picture without any scene: smooth blots or noise."""
    cells = int(rng.choice([4, 6, 9, 16, IMAGE_SIZE]))
    blots = Image.fromarray(rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8))
    return np.asarray(blots.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def likeness(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Intersection over union of two silhouettes, each stretched to fill a square."""
    if not a.any() or not b.any():
        return 0.0
    first, second = _filling(a), _filling(b)
    return float((first & second).sum() / (first | second).sum())


def bounds(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _filling(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.asarray(Image.fromarray(mask).resize((32, 32), Image.Resampling.NEAREST, bounds(mask)))


def _judged(whole: Rendered, image: Pixels, mask: NDArray[np.bool_], *originals: NDArray[np.bool_]) -> Spoilt:
    """None of ours where the mask is unlike each of the originals, else unasked."""
    unlike = all(likeness(mask, original) < LIKE for original in originals)
    return Spoilt(image, whole, mask, NONE if unlike else UNASKED, OURS)


def _mask(rendered: Rendered) -> NDArray[np.bool_]:
    """Where object 0 shows; objects do not overlap."""
    x0, y0, x1, y1 = rendered.scene.objects[0].box
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    window = slice(int(y0), int(np.ceil(y1))), slice(int(x0), int(np.ceil(x1)))
    mask[window] = rendered.segmentation[window] > 0
    return mask


def _twin(whole: Rendered, **facts: Any) -> Rendered | None:
    """The same scene, with other facts of object 0."""
    first, *rest = whole.scene.objects
    return _alike(whole, replace(whole.scene, objects=(replace(first, **facts), *rest)))


def _without(whole: Rendered) -> Rendered | None:
    """The same scene without object 0."""
    return _alike(whole, replace(whole.scene, objects=whole.scene.objects[1:]))


def _alike(whole: Rendered, scene: Scene) -> Rendered | None:
    """A scene with the backdrop of another, or None.

    Which hills a landscape has depends on the whole scene, so turns of no account are tried until both meet
    at the border.
    """
    for attempt in range(12 if scene.objects else 1):
        turned = tuple(replace(thing, angle=thing.angle + attempt * 1e-6) for thing in scene.objects)
        found = render(replace(scene, objects=turned))
        if np.abs(_border(found.image) - _border(whole.image)).mean() < SEAM:
            return found
    return None


def _border(image: Pixels) -> NDArray[np.int16]:
    return image[:, (0, -1)].astype(np.int16)


def _blend(a: Rendered, b: Rendered, share: Values) -> Pixels:
    """The picture a, and b where its share is 1."""
    mixed = a.image + share[..., None] * (b.image.astype(np.float32) - a.image)
    return mixed.round().clip(0, 255).astype(np.uint8)


def _side(scene: Scene, rng: np.random.Generator) -> NDArray[np.bool_]:
    """The pixels beyond a line through about the middle of object 0, at any angle."""
    x0, y0, x1, y1 = scene.objects[0].box
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.ogrid[:IMAGE_SIZE, :IMAGE_SIZE]
    across = (2 * x - x0 - x1) / (x1 - x0) * np.cos(angle) + (2 * y - y0 - y1) / (y1 - y0) * np.sin(angle)
    return across > rng.uniform(-0.2, 0.2)


def _other(names: tuple[str, ...], name: str, rng: np.random.Generator) -> str:
    return str(rng.choice([other for other in names if other != name]))
