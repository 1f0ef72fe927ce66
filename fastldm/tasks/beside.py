"""Channels beside the latents: how each kind of model is told of a mask, a map or a small picture.

A kind has a method for each task that its models do. All take pictures float [n, 3, H, W] in −1…1 and return
[n, channels, h, w] in the latents' size; `encode` turns pictures into scaled latents [n, C, h, w].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.models.conditioners import SpatialRescaler
from fastldm.models.hints import hint_channels, inpainting_hint, map_hint, upscaling_hint

Encode = Callable[[Tensor], Tensor]


class Beside:
    """What stands beside `latent_channels` channels of latents. `draws`: `encode` draws from the posterior,
    with the image's generator; else it takes the mean.
    """

    draws = False

    def __init__(self, latent_channels: int) -> None:
        self.latent_channels = latent_channels

    @property
    def channels(self) -> int:
        raise NotImplementedError

    def inpainting(self, pictures: Tensor, mask: Tensor, encode: Encode) -> Tensor:
        """mask bool [n, 1, H, W]: True where the pictures are to be drawn anew."""
        raise NotImplementedError

    def segmentation(self, maps: Tensor, side: tuple[int, int]) -> Tensor:
        """maps int64 [n, H, W] of classes; side: of the latents."""
        raise NotImplementedError

    def upscaling(self, small: Tensor, size: tuple[int, int], encode: Encode) -> Tensor:
        """small [n, 3, H, W]; size: (height, width) of the pictures to be drawn."""
        raise NotImplementedError


class HintBlock(Beside):
    """The shipped model's: every task in one net, no task all zero. See `fastldm.models.hints`."""

    @property
    def channels(self) -> int:
        return hint_channels(self.latent_channels)

    def inpainting(self, pictures: Tensor, mask: Tensor, encode: Encode) -> Tensor:
        return inpainting_hint(mask, encode(pictures.masked_fill(mask, 0.0)))

    def segmentation(self, maps: Tensor, side: tuple[int, int]) -> Tensor:
        return map_hint(maps, self.latent_channels, side)

    def upscaling(self, small: Tensor, size: tuple[int, int], encode: Encode) -> Tensor:
        large = F.interpolate(small, size, mode="bicubic", antialias=True).clamp(-1, 1)
        return upscaling_hint(small, encode(large))


class StableInpainting(Beside):
    """Mask, then latents of the picture with a grey hole: Stable Diffusion's inpainting models."""

    draws = True

    @property
    def channels(self) -> int:
        return 1 + self.latent_channels

    def inpainting(self, pictures: Tensor, mask: Tensor, encode: Encode) -> Tensor:
        known = encode(pictures.masked_fill(mask, 0.0))
        return torch.cat((_small(mask, known), known), dim=1)


class PaperInpainting(Beside):
    """Latents of the picture with a black hole, then the mask as −1 and 1: the latent diffusion paper's."""

    @property
    def channels(self) -> int:
        return self.latent_channels + 1

    def inpainting(self, pictures: Tensor, mask: Tensor, encode: Encode) -> Tensor:
        known = encode(pictures.masked_fill(mask, -1.0))
        return torch.cat((known, 2 * _small(mask, known) - 1), dim=1)


class PaperUpscaling(Beside):
    """The small picture itself, as large as the latents: the latent diffusion paper's."""

    @property
    def channels(self) -> int:
        return 3

    def upscaling(self, small: Tensor, size: tuple[int, int], encode: Encode) -> Tensor:
        return small


class PaperMap(Beside):
    """A map of classes, each an embedding, in the size of the latents: the latent diffusion paper's."""

    def __init__(self, latent_channels: int, rescaler: SpatialRescaler) -> None:
        super().__init__(latent_channels)
        self.rescaler = rescaler

    @property
    def channels(self) -> int:
        return self.rescaler.config.out_channels or self.rescaler.config.in_channels

    def segmentation(self, maps: Tensor, side: tuple[int, int]) -> Tensor:
        return self.rescaler.classes(maps)


def _small(mask: Tensor, like: Tensor) -> Tensor:
    """The mask in the size and dtype of latents."""
    return F.interpolate(mask.to(like.dtype), like.shape[2:], mode="nearest")


def beside_of(
    family: str, in_channels: int, latent_channels: int, rescaler: SpatialRescaler | None = None
) -> Beside | None:
    """What stands beside the latents of a model; None: nothing.

    The number of channels tells, save whose inpainting it is: that is the family's. A rescaler makes a map.
    """
    if rescaler is not None:
        return PaperMap(latent_channels, rescaler)
    paper = family.startswith("ldm")
    kinds: tuple[type[Beside], ...] = (
        (PaperInpainting, PaperUpscaling) if paper else (HintBlock, StableInpainting)
    )
    more = in_channels - latent_channels
    return next((made for kind in kinds if (made := kind(latent_channels)).channels == more), None)
