"""The pictures, masks and maps that generate() is given, and the size that follows from them.

Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fastldm import images, maps
from fastldm.abilities import Abilities
from fastldm.checks import integer, number, refuse
from fastldm.images import Array, Picture
from fastldm.prompts import cannot

MAX_COUNT = 2**31 - 1  # of pixels a side and of images, before memory is asked
MAX_BLEND = 1024  # pixels
MAX_SIDE = 8192  # pixels of padding
DEFAULT_STRENGTH = 0.8


@dataclass(frozen=True)
class Canvas:
    """What a request draws on. Arrays are made when they are asked for, in the request's size.

    size      (width, height) that the model draws, multiples of its factor
    shown     (width, height) of the finished images
    starts    whether the first step sees the image, noised, and not noise alone
    """

    size: tuple[int, int]
    shown: tuple[int, int]
    pictures: list[Picture]
    masks: list[Array]
    maps: list[Array]
    strength: float
    blend: int
    upscale: bool
    starts: bool
    warnings: tuple[str, ...]

    @property
    def image(self) -> Array | None:
        """float32 [n, height, width, 3] in 0…1; to be upscaled: the small ones, edges repeated."""
        if not self.pictures:
            return None
        if not self.upscale:
            return images.stack(self.pictures, *self.size)
        small = images.stack(self.pictures, *self.pictures[0].size)
        down, across = (
            side * given // shown - given
            for side, shown, given in zip(self.size[::-1], self.shown[::-1], small.shape[1:3], strict=True)
        )
        return np.pad(small, ((0, 0), (0, down), (0, across), (0, 0)), mode="edge")

    @property
    def mask(self) -> Array | None:
        """bool [n, height, width]."""
        return np.stack([maps.resized(mask, *self.size) for mask in self.masks]) if self.masks else None

    @property
    def segmentation(self) -> Array | None:
        """int64 [n, height, width]."""
        return np.stack([maps.resized(each, *self.size) for each in self.maps]) if self.maps else None


def padded(
    image: object, *, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> tuple[Image.Image, np.ndarray[Any, np.dtype[np.bool_]]]:
    """A picture with so many pixels more on its sides, and the mask of these: what `generate` needs to draw
    on beyond the edges.

        picture, mask = fastldm.padded("in.png", right=64)
        pipe.generate("a meadow", image=picture, mask=mask, blend=8)

    image: as in `generate`, one. The new pixels repeat the edge. Raises InvalidArgument.
    """
    sides = {"left": left, "top": top, "right": right, "bottom": bottom}
    for name, value in sides.items():
        integer(name, value, 0, MAX_SIDE)
    if not any(sides.values()):
        refuse("right", right, "more than 0, or another side")
    [picture] = images.load_pictures(image, 1)
    pixels = np.round(images.stack([picture], *picture.size)[0] * 255).astype(np.uint8)
    around = ((top, bottom), (left, right))
    mask = np.pad(np.zeros(pixels.shape[:2], bool), around, constant_values=True)
    if mask.size > images.MAX_PIXELS:
        refuse(
            "image",
            f"{mask.shape[1]}x{mask.shape[0]} with its padding",
            f"at most {images.MAX_PIXELS} pixels",
        )
    return Image.fromarray(np.pad(pixels, (*around, (0, 0)), mode="edge")), mask


def check_canvas(
    abilities: Abilities,
    sizes: tuple[int, int, int],
    counts: tuple[int, int],
    *,
    image: object,
    mask: object,
    segmentation: object,
    upscale: object,
    strength: object,
    blend: object,
    width: object,
    height: object,
) -> Canvas:
    """The canvas of these arguments of generate(); InvalidArgument for the first wrong one.

    sizes: the model's factor, default width and height. counts: of images and of steps.
    """
    factor, *default = sizes
    count, steps = counts
    upscales = _check_task(abilities, image, mask, segmentation, upscale, strength, blend)
    strength_value = _check_strength(strength, image, mask, upscales, steps)
    pictures = [] if image is None else images.load_pictures(image, count)
    masks = [] if mask is None else maps.load_masks(mask, count)
    classes = [] if segmentation is None else maps.load_maps(segmentation, count, abilities.segmentation)
    for i, each in enumerate(masks):
        picture = pictures[i if len(pictures) > 1 else 0]
        if each.shape != picture.size[::-1]:
            given = f"{each.shape[1]}x{each.shape[0]}"
            refuse("mask", given, f"the size of its image, {picture.size[0]}x{picture.size[1]}")
        if not each.any():
            refuse("mask", "a mask without a white pixel", "at least one pixel to draw")
    if upscales:
        size, shown = _enlarged(abilities.upscaling, factor, pictures, width, height)
        warnings: tuple[str, ...] = ()
    else:
        first = pictures[0].size if pictures else classes[0].shape[::-1] if classes else None
        if first is not None:
            default = [max(side // factor, 1) * factor for side in first]
        size = (
            side_in_pixels("width", width, default[0], factor),
            side_in_pixels("height", height, default[1], factor),
        )
        shown = size
        warnings = tuple(
            f"{name} resized from {w}x{h} to {size[0]}x{size[1]} ({how})"
            for name, how, given_sizes in (
                ("image", "Lanczos", {picture.size for picture in pictures}),
                ("segmentation", "nearest", {each.shape[::-1] for each in classes}),
            )
            for w, h in sorted(given_sizes)
            if (w, h) != size
        )
    return Canvas(
        size=size,
        shown=shown,
        pictures=pictures,
        masks=masks,
        maps=classes,
        strength=strength_value,
        blend=0 if blend is None else integer("blend", blend, 0, MAX_BLEND),
        upscale=upscales,
        starts=bool(pictures) and not upscales and (not masks or strength_value < 1),
        warnings=warnings,
    )


def _check_task(
    abilities: Abilities,
    image: object,
    mask: object,
    segmentation: object,
    upscale: object,
    strength: object,
    blend: object,
) -> bool:
    """Whether the image is to be upscaled; InvalidArgument for what this model cannot do, or lacks."""
    if upscale is not None and not isinstance(upscale, bool):
        refuse("upscale", upscale, "True, False or None")
    for name, value, able in (
        ("mask", mask, abilities.inpainting),
        ("segmentation", segmentation, bool(abilities.segmentation)),
        ("upscale", upscale or None, abilities.upscaling > 0),
    ):
        if value is not None and not able:
            cannot(abilities, name, value)
    given: dict[str | None, Any] = {"image": image, "mask": mask, "segmentation": segmentation}
    needed = abilities.needs
    if needed in given and given[needed] is None:
        refuse(str(needed), None, f"not None: this model does {', '.join(abilities.tasks)}")
    if mask is not None and image is None:
        refuse("image", None, "the picture that mask= is for")
    if blend is not None and mask is None:
        refuse("blend", blend, "None without mask=")
    upscales = bool(upscale) or needed == "image"
    if upscales:
        if image is None:
            refuse("image", None, "the small picture that upscale=True enlarges")
        for name, value in (("mask", mask), ("segmentation", segmentation), ("strength", strength)):
            if value is not None:
                refuse(name, value, "None together with upscale=True")
    elif mask is not None and segmentation is not None:
        refuse("segmentation", segmentation, "None together with mask=")
    return upscales


def _check_strength(value: object, image: object, mask: object, upscales: bool, steps: int) -> float:
    if value is None:
        value = 1.0 if image is None or mask is not None or upscales else DEFAULT_STRENGTH
    elif image is None:
        refuse("strength", value, "None without image=")
    strength = number("strength", value, 0, 1)
    if strength == 0 or int(steps * strength) < 1:
        refuse("strength", value, f"0 < strength ≤ 1 with at least one of the {steps} steps left")
    return strength


def _enlarged(
    scale: int, factor: int, pictures: list[Picture], width: object, height: object
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size drawn, its sides multiples of the factor and of the scale, and the size shown."""
    small = pictures[0].size
    for picture in pictures:
        if picture.size != small:
            refuse("image", f"pictures of {small} and {picture.size}", "pictures of one size, to be upscaled")
    shown = (small[0] * scale, small[1] * scale)
    for name, given, side in zip(("width", "height"), (width, height), shown, strict=True):
        if given is not None and given != side:
            refuse(name, given, f"None or {side}: upscale=True draws {scale} times the image's sides")
    multiple = math.lcm(factor, scale)
    return (_up(shown[0], multiple), _up(shown[1], multiple)), shown


def _up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def side_in_pixels(name: str, value: object, default: int, factor: int) -> int:
    """The side of a picture, a multiple of the factor; InvalidArgument for what is none."""
    side = default if value is None else integer(name, value, 1, MAX_COUNT)
    if side % factor:
        refuse(name, value, f"a multiple of {factor}")
    return side
