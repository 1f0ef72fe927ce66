"""Hints for training: what inpainting, semantic synthesis and upscaling are told of a picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.models.hints import inpainting_hint, map_hint, upscaling_hint
from fastldm.training.data import PictureData

UPSCALING = 4
GREY = 127.5


def random_masks(count: int, side: int, generator: torch.Generator) -> Tensor:
    """One rectangle of a quarter to three quarters of the side each way, anywhere: float32 [count, 1, side,
    side], 1 inside.
    """
    extent = (torch.rand((count, 2), generator=generator) * 0.5 + 0.25) * side
    corner = torch.rand((count, 2), generator=generator) * (side - extent)
    at = torch.arange(side).expand(count, 2, side)
    inside = (at >= corner[..., None]) & (at < (corner + extent)[..., None])
    return (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None].float()


def make_hints(
    data: PictureData, count: int, encode: Callable[[Tensor], Tensor], generator: torch.Generator
) -> Tensor:
    """A hint for each of the first `count` pictures, of the kinds in turn: inpainting, maps where the data
    has any, upscaling. [count, C + 4, h, w]

    `encode`: pictures uint8 [N, H, W, 3] → scaled latents [N, C, h, w].
    """
    images, maps = data.images[:count], data.segmentation[:count]
    side = images.shape[1]
    kinds = 3 if bool(maps.any()) else 2
    first, last = slice(0, None, kinds), slice(kinds - 1, None, kinds)

    masks = random_masks(len(images[first]), side, generator)
    hidden = torch.where(masks.bool(), GREY, images[first].permute(0, 3, 1, 2).float())
    inpainting = inpainting_hint(masks, encode(_to_pixels(hidden)))

    small = F.interpolate(images[last].permute(0, 3, 1, 2).float(), scale_factor=1 / UPSCALING, mode="area")
    large = F.interpolate(small, (side, side), mode="bicubic", antialias=True)

    made = torch.empty((count, *inpainting.shape[1:]))
    made[first] = inpainting
    made[last] = upscaling_hint(small / GREY - 1, encode(_to_pixels(large)))
    if kinds == 3:
        channels, cells = inpainting.shape[1] - 4, (inpainting.shape[2], inpainting.shape[3])
        made[1::3] = map_hint(maps[1::3], channels, cells)
    return made


def _to_pixels(images: Tensor) -> Tensor:
    """float [N, 3, H, W] in 0…255 → uint8 [N, H, W, 3]."""
    return images.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
