"""The small objects of pixel art, drawn by hand: at eight or nine blocks a scaled silhouette says nothing."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

Sprite = NDArray[np.bool_]

_SHEETS = (
    (
        "circle square triangle star",
        """
        ..####..  ########  ....#....  ....#....
        .######.  ########  ...###...  ....#....
        ########  ########  ...###...  ...###...
        ########  ########  ..#####..  #########
        ########  ########  ..#####..  .#######.
        ########  ########  .#######.  ..#####..
        .######.  ########  .#######.  ..#####..
        ..####..  ########  #########  .###.###.
        -         -         -          .#.....#.
        """,
    ),
    (
        "heart house tree sun",
        """
        .##...##.  ....#.##.  ...#...  #...#...#
        ####.####  ...#####.  ..###..  .#.....#.
        #########  ..######.  ..###..  ...###...
        #########  .#######.  .#####.  ..#####..
        .#######.  #########  ..###..  #.#####.#
        ..#####..  .##.#.##.  .#####.  ..#####..
        ...###...  .#######.  #######  ...###...
        ....#....  .###.###.  ...#...  .#.....#.
        -          .###.###.  ...#...  #...#...#
        """,
    ),
    (
        "moon cloud boat car",
        """
        ..####  ...###...  ....#....  ..#####..
        .###..  ..#####..  ..#.##...  ..#.#.#..
        ###...  .######..  .##.###..  #########
        ###...  #########  .##.####.  #########
        ###...  #########  ###.####.  .##...##.
        ###...  .#######.  ....#....  .##...##.
        .###..  -          #########  -
        ..####  -          .#######.  -
        -       -          ..#####..  -
        """,
    ),
    (
        "fish flower mushroom balloon",
        """
        ...##....  .##.##.  ..#####..  .####.
        ..####..#  #######  .###.###.  #.####
        .######.#  ###.###  ##.###.##  #.####
        ##.######  #######  #########  ######
        #########  .##.##.  #.#####.#  ######
        .######.#  ...#...  ...###...  .####.
        ..####..#  ##.#.##  ...###...  ..##..
        -          .#####.  ..#####..  ..#...
        -          ...#...  -          ...#..
        """,
    ),
)

LARGEST = 10
"""Blocks of the longer side up to which an object is drawn from its sprite."""


@cache
def _sprites() -> dict[str, Sprite]:
    sprites = {}
    for kinds, sheet in _SHEETS:
        columns = zip(*(line.split() for line in sheet.strip().splitlines()), strict=True)
        for kind, column in zip(kinds.split(), columns, strict=True):
            sprites[kind] = np.array([[block == "#" for block in row] for row in column if row != "-"])
    return sprites


def sprite_extent(kind: str) -> tuple[int, int]:
    """Width and height in blocks that the sprite of a kind is drawn for."""
    height, width = _sprites()[kind].shape
    return width, height


def sprite(kind: str, width: int, height: int) -> Sprite:
    """The sprite of a kind, bool [height, width]; blocks are repeated or left out to fit."""
    drawn = _sprites()[kind]
    rows, columns = (
        (np.arange(wanted) * 2 + 1) * had // (2 * wanted)
        for wanted, had in zip((height, width), drawn.shape, strict=True)
    )
    return drawn[np.ix_(rows, columns)]
