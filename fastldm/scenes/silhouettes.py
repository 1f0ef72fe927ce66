"""The sixteen silhouettes, as polygons.

A silhouette is a tuple of parts painted in order; a part is an outline [n, 2] in units where y points down,
and a flag that is True for ink and False where the background shows through (a door, an eye). Only ink parts
span the box.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Part = tuple[Points, bool]
Silhouette = tuple[Part, ...]


def _ink(*points: tuple[float, float]) -> Part:
    return np.array(points, dtype=np.float64), True


def _arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float, n: int = 48) -> Points:
    """Points [n, 2] of an ellipse from angle start to stop (radians, clockwise on screen)."""
    t = np.linspace(start, stop, n)
    return np.stack([cx + rx * np.cos(t), cy + ry * np.sin(t)], axis=1)


def _ellipse(cx: float, cy: float, rx: float, ry: float, tilt: float = 0.0) -> Points:
    outline: Points = _arc(0, 0, rx, ry, 0, 2 * np.pi) @ _rotation(tilt).T
    return outline + (cx, cy)


def _box(x0: float, y0: float, x1: float, y1: float) -> Points:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=np.float64)


def _rotation(angle: float) -> Points:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([(c, -s), (s, c)])


def _circle() -> Silhouette:
    return ((_ellipse(0, 0, 1, 1), True),)


def _square() -> Silhouette:
    return ((_box(-1, -1, 1, 1), True),)


def _triangle() -> Silhouette:
    return (_ink((0, -0.88), (1, 0.88), (-1, 0.88)),)


def _star() -> Silhouette:
    angle = np.arange(10) * np.pi / 5 - np.pi / 2
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.45)
    return ((np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1), True),)


def _heart() -> Silhouette:
    t = np.linspace(0, 2 * np.pi, 64)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return ((np.stack([x, -y], axis=1), True),)


def _house() -> Silhouette:
    return (
        _ink((-1, -0.08), (0, -0.95), (1, -0.08)),
        (_box(0.42, -0.95, 0.7, -0.2), True),
        (_box(-0.76, -0.1, 0.76, 0.95), True),
        (_box(-0.19, 0.38, 0.19, 0.96), False),
        (_box(-0.58, 0.08, -0.3, 0.36), False),
        (_box(0.3, 0.08, 0.58, 0.36), False),
    )


def _tree() -> Silhouette:
    return (
        _ink((0, -1), (0.48, -0.36), (-0.48, -0.36)),
        _ink((0, -0.72), (0.64, 0.12), (-0.64, 0.12)),
        _ink((0, -0.3), (0.8, 0.62), (-0.8, 0.62)),
        (_box(-0.18, 0.6, 0.18, 1), True),
    )


def _sun() -> Silhouette:
    ray = np.array([(0.66, -0.2), (1, 0), (0.66, 0.2)])
    rays = tuple((ray @ _rotation(k * np.pi / 4).T, True) for k in range(8))
    return ((_ellipse(0, 0, 0.5, 0.5), True), *rays)


def _moon() -> Silhouette:
    offset, radius = 0.5, 0.75
    tip = (1 + offset**2 - radius**2) / (2 * offset)
    outer = np.arccos(tip)
    inner = np.arccos((tip - offset) / radius)
    crescent = [
        _arc(0, 0, 1, 1, outer, 2 * np.pi - outer),
        _arc(offset, 0, radius, radius, 2 * np.pi - inner, inner),
    ]
    return ((np.concatenate(crescent), True),)


def _cloud() -> Silhouette:
    return (
        (_ellipse(-0.6, 0.24, 0.4, 0.4), True),
        (_ellipse(-0.08, -0.2, 0.56, 0.56), True),
        (_ellipse(0.56, 0.2, 0.44, 0.44), True),
        (_box(-0.6, 0.1, 0.56, 0.64), True),
    )


def _boat() -> Silhouette:
    return (
        _ink((-1, 0.42), (1, 0.42), (0.62, 0.98), (-0.62, 0.98)),
        (_box(0, 0.2, 0.14, 0.5), True),
        _ink((0, -1), (0.86, 0.24), (0, 0.24)),
        _ink((-0.18, -0.66), (-0.18, 0.24), (-0.8, 0.24)),
    )


def _car() -> Silhouette:
    body = [(-1, 0.42), (-1, -0.02), (-0.86, -0.14), (-0.62, -0.16), (-0.4, -0.74), (0.42, -0.74)]
    body += [(0.66, -0.16), (0.9, -0.1), (1, 0.04), (1, 0.42)]
    wheels = tuple(
        (_ellipse(x, 0.42, radius, radius), ink)
        for x in (-0.52, 0.52)
        for radius, ink in ((0.39, False), (0.28, True))
    )
    return (
        _ink(*body),
        (np.array([(-0.42, -0.16), (-0.27, -0.58), (-0.07, -0.58), (-0.07, -0.16)]), False),
        (np.array([(0.09, -0.16), (0.09, -0.58), (0.3, -0.58), (0.46, -0.16)]), False),
        *wheels,
    )


def _fish() -> Silhouette:
    return (
        (_ellipse(-0.2, 0.04, 0.8, 0.56), True),
        _ink((0.36, 0.02), (1, -0.56), (0.84, 0.04), (1, 0.64)),
        _ink((-0.5, -0.4), (0.22, -0.8), (0.2, -0.36)),
        (_ellipse(-0.6, -0.08, 0.1, 0.1), False),
    )


def _flower() -> Silhouette:
    angle = np.arange(6) * np.pi / 3 + np.pi / 6
    petals = tuple(
        (_ellipse(0.43 * np.cos(a), 0.43 * np.sin(a) - 0.27, 0.3, 0.3), True) for a in angle.tolist()
    )
    return (
        (_box(-0.08, 0.1, 0.08, 1), True),
        *petals,
        (_ellipse(0, -0.27, 0.3, 0.3), True),
        (_ellipse(0, -0.27, 0.18, 0.18), False),
        (_ellipse(0.36, 0.74, 0.36, 0.13, -0.5), True),
        (_ellipse(-0.36, 0.74, 0.36, 0.13, 0.5), True),
    )


def _mushroom() -> Silhouette:
    cap = np.concatenate([_arc(0, 0, 1, 0.86, np.pi, 2 * np.pi), _arc(0, 0, 1, 0.16, 0, np.pi)])
    return (
        (cap, True),
        _ink((-0.28, 0), (0.28, 0), (0.38, 0.86), (-0.38, 0.86)),
        (_ellipse(-0.5, -0.26, 0.15, 0.15), False),
        (_ellipse(0.02, -0.5, 0.17, 0.17), False),
        (_ellipse(0.52, -0.22, 0.14, 0.14), False),
    )


def _balloon() -> Silhouette:
    y = np.linspace(0.5, 1, 12)
    x = 0.09 * np.sin((y - 0.5) * 4 * np.pi)
    string = np.concatenate([np.stack([x - 0.06, y], 1), np.stack([x + 0.06, y], 1)[::-1]])
    return (
        (_ellipse(0, -0.29, 0.72, 0.71), True),
        _ink((0, 0.32), (0.2, 0.58), (-0.2, 0.58)),
        (string, True),
        (_ellipse(-0.32, -0.56, 0.1, 0.2, 0.6), False),
    )


_SHAPES: dict[str, Callable[[], Silhouette]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "house": _house,
    "tree": _tree,
    "sun": _sun,
    "moon": _moon,
    "cloud": _cloud,
    "boat": _boat,
    "car": _car,
    "fish": _fish,
    "flower": _flower,
    "mushroom": _mushroom,
    "balloon": _balloon,
}


@lru_cache(maxsize=len(_SHAPES))
def _shape(kind: str) -> tuple[Points, tuple[tuple[slice, bool], ...], NDArray[np.bool_]]:
    """All points [n, 2] of a kind, the slice and flag of each part, and which points are ink [n]."""
    parts = _SHAPES[kind]()
    ends = np.cumsum([len(points) for points, _ in parts]).tolist()
    slices = tuple(
        (slice(end - len(points), end), ink) for end, (points, ink) in zip(ends, parts, strict=True)
    )
    inked = np.concatenate([np.full(len(points), ink) for points, ink in parts])
    return np.concatenate([points for points, _ in parts]), slices, inked


def posed(kind: str, angle: float, mirror: bool) -> tuple[Silhouette, Points, Points]:
    """The silhouette mirrored and turned by `angle` degrees, with the corners [2] and [2] of its ink."""
    points, slices, inked = _shape(kind)
    turned = points @ (_rotation(np.deg2rad(angle)) @ np.diag([-1.0 if mirror else 1.0, 1.0])).T
    ink_only = turned[inked]
    parts = tuple((turned[part], ink) for part, ink in slices)
    return parts, ink_only.min(axis=0), ink_only.max(axis=0)
