"""The hint block: channels beside the latents that tell the shipped UNet what a task is about.

One net serves every task. Behind the C latent channels stand a mask (1 where the picture is to be drawn), C
channels of what is known of the picture as latents, and 3 channels of a map or a small picture. All zero: no
hint, text alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAP_CHANNELS = 3
MAP_CLASSES = 3**MAP_CHANNELS - 1  # of a map


def hint_channels(latent_channels: int) -> int:
    """Channels of the hint block of a model with so many latent channels."""
    return 1 + latent_channels + MAP_CHANNELS


def inpainting_hint(mask: Tensor, known: Tensor) -> Tensor:
    """mask [N, 1, H, W] of the picture's pixels, 1 where it is to be drawn; known [N, C, h, w]: scaled
    latents of the picture with those pixels grey. → [N, C + 4, h, w]
    """
    small = F.interpolate(mask.to(known.dtype), known.shape[2:], mode="nearest")
    return torch.cat((small, known, known.new_zeros(len(known), MAP_CHANNELS, *known.shape[2:])), dim=1)


def map_hint(segmentation: Tensor, latent_channels: int, side: tuple[int, int]) -> Tensor:
    """segmentation int [N, H, W] with classes below 26 → [N, C + 4, *side]: everything is to be drawn, where
    the map says. Each class has a colour of its own, none of them grey.
    """
    code = segmentation.long()
    code = code + (code >= 13)  # 13 would be (0, 0, 0), which means no hint
    digits = torch.stack((code % 3, code // 3 % 3, code // 9), dim=1).float() - 1
    colours = F.interpolate(digits, side, mode="bilinear", antialias=True)
    rows = len(colours)
    return torch.cat(
        (colours.new_ones(rows, 1, *side), colours.new_zeros(rows, latent_channels, *side), colours), dim=1
    )


def upscaling_hint(small: Tensor, known: Tensor) -> Tensor:
    """small [N, 3, H, W] in −1…1: the small picture; known [N, C, h, w]: scaled latents of its enlargement.
    → [N, C + 4, h, w]: everything is to be drawn again.
    """
    colours = F.interpolate(small.to(known.dtype), known.shape[2:], mode="bilinear", antialias=True)
    return torch.cat((known.new_ones(len(known), 1, *known.shape[2:]), known, colours), dim=1)
