"""Pictures as a model's decoder or a JPEG leaves them: a little soft, noisy, off in colour, in blocks."""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

_JPEG = 0.25
"""Share of these pictures that go through a JPEG of quality 40 to 90."""


def soften(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures uint8 [N, 128, 128, 3], the first half of them a little worse in some of these ways."""
    whole, images = images[len(images) // 2 :], images[: len(images) // 2]

    def some(*shape: int) -> Tensor:
        """Uniform in −1…1 for half of the pictures, 0 for the others [N, *shape]."""
        drawn = 2 * torch.rand(len(images), *shape, generator=generator) - 1
        return drawn * (torch.rand(len(images), *[1] * len(shape), generator=generator) < 0.5)

    pixels = images.permute(0, 3, 1, 2).float()
    size = pixels.shape[-2:]
    small = F.interpolate(F.avg_pool2d(pixels, 2), size, mode="bilinear")
    pixels = torch.lerp(pixels, small, some(1, 1, 1).abs())
    # Below 0 this sharpens, and edges ring as a decoder's do.
    pixels = torch.lerp(pixels, _blurred(pixels), some(1, 1, 1))
    pixels = (pixels - 128) * (1 + 0.06 * some(3, 1, 1)) + 128 + 10 * some(3, 1, 1)
    coarse = torch.randn(len(images), 3, 16, 16, generator=generator)
    pixels += 5 * some(1, 1, 1) * F.interpolate(coarse, size, mode="bilinear")
    pixels += 8 * some(1, 1, 1) * torch.randn(pixels.shape, generator=generator)
    soft = pixels.permute(0, 2, 3, 1).round().clamp(0, 255).to(torch.uint8).contiguous()
    qualities = torch.randint(40, 91, (len(images),), generator=generator).tolist()
    chosen = (torch.rand(len(images), generator=generator) < _JPEG).nonzero().flatten().tolist()
    for i in chosen:
        soft[i] = _jpeg(soft[i], qualities[i])
    return torch.cat([soft, whole])


def _blurred(pixels: Tensor) -> Tensor:
    """By a binomial kernel of 3 x 3."""
    row = torch.tensor([0.25, 0.5, 0.25])
    kernel = row.outer(row).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)


def _jpeg(image: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(image.numpy()).save(file, "JPEG", quality=quality)
    with Image.open(file) as picture:
        return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(image.shape)
