"""Masks and segmentation maps in: one number a pixel, from files, pictures, arrays and tensors.

Nothing here imports torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from fastldm.checks import is_dense, refuse
from fastldm.errors import InvalidArgument
from fastldm.images import FORMATS, MAX_PIXELS, Array, eight_bit, open_picture

MASKS = (
    "a picture, a path of one, or an array or tensor [height, width] of bools, uint8 or floats 0…1: white, "
    "1 or True where the picture is to be drawn anew; one, or as many as images"
)


def load_masks(value: object, count: int) -> list[Array]:
    """The one or `count` masks that generate()'s `mask` names: bool [height, width], True from half of the
    range on, each still in its own size. Errors: `InvalidArgument` "mask".
    """
    return [_mask(item) for item in _items("mask", value, count)]


def load_maps(value: object, count: int, names: tuple[str, ...]) -> list[Array]:
    """The one or `count` segmentation maps that generate()'s `segmentation` names: uint8 or int64 [height,
    width], each number one of the classes `names`. Errors: `InvalidArgument` "segmentation".
    """
    return [_map(item, names) for item in _items("segmentation", value, count)]


def resized(plane: Array, width: int, height: int) -> Array:
    """A mask or map in another size: the nearest value of each pixel."""
    if plane.shape == (height, width):
        return plane
    rows, columns = (
        (np.arange(new) * 2 + 1) * old // (2 * new)
        for new, old in zip((height, width), plane.shape, strict=True)
    )
    return plane[rows[:, None], columns]


def _items(name: str, value: object, count: int) -> list[object]:
    value = _array(name, value)
    if isinstance(value, np.ndarray) and value.ndim == 3:
        value = list(value)
    items = list(value) if isinstance(value, list | tuple) else [value]
    if len(items) not in (1, count):
        refuse(name, f"{len(items)} of them", f"one, or one for each of the {count} results")
    return [_array(name, item) for item in items]


def _array(name: str, value: Any) -> Any:
    """A tensor as an array; anything else as it is."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return value
    if not is_dense(value):
        refuse(name, value, "a dense tensor")
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).numpy()


def _mask(value: object) -> Array:
    if isinstance(value, str | os.PathLike | Image.Image):
        return _plane("mask", value, _grey) >= 128
    if not isinstance(value, np.ndarray) or value.ndim != 2 or not 0 < value.size <= MAX_PIXELS:
        refuse("mask", value, MASKS)
    if value.dtype == np.bool_:
        return value.copy()
    if value.dtype == np.uint8:
        return np.asarray(value >= 128) if value.max() > 1 else value.astype(bool)
    if value.dtype.kind != "f" or not (np.isfinite(value).all() and value.min() >= 0 and value.max() <= 1):
        refuse("mask", value, MASKS)
    return np.asarray(value >= 0.5)


def _grey(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "F"):  # their range is anybody's guess
        refuse("mask", f"a picture of mode {picture.mode}", MASKS)
    return eight_bit(picture).convert("L")


def _map(value: object, names: tuple[str, ...]) -> Array:
    allowed = (
        "a picture of palette numbers or grey levels, a path of one, or an array [height, width] of integers "
        f"0…{len(names) - 1}, the classes; one, or as many as images"
    )
    if isinstance(value, str | os.PathLike | Image.Image):
        value = _plane("segmentation", value, lambda picture: _numbers(picture, allowed))
    if not isinstance(value, np.ndarray) or value.ndim != 2 or not 0 < value.size <= MAX_PIXELS:
        refuse("segmentation", value, allowed)
    if value.dtype.kind not in "iu":
        refuse("segmentation", value, allowed)
    lowest, highest = int(value.min()), int(value.max())
    if lowest < 0 or highest >= len(names):
        refuse("segmentation", f"a map with {lowest}…{highest}", f"classes 0…{len(names) - 1}")
    return value.astype(np.int64)


def _numbers(picture: Image.Image, allowed: str) -> Image.Image:
    if picture.mode not in ("P", "L"):
        refuse("segmentation", f"a picture of mode {picture.mode}", allowed)
    return picture


def _plane(name: str, value: Any, turn: Callable[[Image.Image], Image.Image]) -> Array:
    """The pixels of a picture or of a file of bounded size, upright, turned into one number each."""
    if isinstance(value, Image.Image):
        return _pixels(name, value, turn)
    with open_picture(value, name, FORMATS) as picture:
        return _pixels(name, picture, turn)


def _pixels(name: str, picture: Image.Image, turn: Callable[[Image.Image], Image.Image]) -> Array:
    width, height = picture.size
    if not 0 < width * height <= MAX_PIXELS:
        refuse(name, f"{width}x{height}", f"1 to {MAX_PIXELS} pixels")
    try:
        return np.array(turn(ImageOps.exif_transpose(picture)))
    except InvalidArgument:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on a hostile file
        refuse(name, picture, f"a picture that can be decoded ({error!s:.100})")
