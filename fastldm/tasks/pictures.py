"""Pictures on their way in, to latents and to what stands beside them, and on their way out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastldm.models.pixels import Autoencoder
from fastldm.runtime.memory import owned, to_device, to_host
from fastldm.tasks.beside import Beside

Draw = Callable[[tuple[int, ...]], Tensor]
"""A shape → unit noise, one picture's."""


class Given(Protocol):
    """What a request tells in arrays of one row, or of one an image: see `fastldm.arguments.Request`."""

    @property
    def image(self) -> Any: ...

    @property
    def mask(self) -> Any: ...

    @property
    def blend(self) -> int: ...

    @property
    def segmentation(self) -> Any: ...

    @property
    def upscale(self) -> bool: ...

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def shown(self) -> tuple[int, int]: ...


class Pictures:
    """The picture, mask and map of a request as the networks of a model take them, and its images."""

    def __init__(self, vae: Autoencoder, kind: Beside | None, device: torch.device) -> None:
        self.vae, self.kind, self.device = vae, kind, device

    def clean(self, request: Given, images: range, draws: Sequence[Draw]) -> Tensor:
        """Scaled latents float32 [n, C, h, w] of the picture of each of these images."""
        return encode(self.vae, self._signed(request, images), draws)

    def beside(self, request: Given, images: range, draws: Sequence[Draw]) -> Tensor | None:
        """What stands beside these images' latents [n, C', h, w]; None: the request tells of nothing."""
        kind = self.kind
        if kind is None:
            return None
        width, height = request.size
        encoded = partial(encode, self.vae, draws=draws if kind.draws else None)
        if request.segmentation is not None:
            factor = self.vae.config.factor
            maps = self._rows(request.segmentation, images)
            return kind.segmentation(maps, (height // factor, width // factor))
        if request.upscale:
            return kind.upscaling(self._signed(request, images), (height, width), encoded)
        if request.mask is not None:
            mask = self._rows(request.mask, images)[:, None]
            return kind.inpainting(self._signed(request, images), mask, encoded)
        return None

    def keeps(self, request: Given) -> bool:
        """Whether a mask has to be kept by the steps, for the model has no channels to be told of it."""
        return self.kind is None and request.mask is not None

    def kept_mask(self, request: Given, images: range) -> Tensor:
        """Where the latents of these images are given: float32 [n, 1, h, w], 1 there."""
        width, height = request.size
        factor = self.vae.config.factor
        drawn = self._rows(request.mask, images)[:, None].float()
        return 1 - F.interpolate(drawn, (height // factor, width // factor), mode="nearest")

    def finished(self, decoded: Tensor, output_type: str, request: Given | None = None) -> Any:
        """Decoded images float32 [n, 3, H, W] in −1…1 → images as `Result.images` has them.

        Of a request with a mask, its picture stands outside it, to the bit; they have the size it shows.
        """
        whole = 255.0 if output_type == "pil" else 1.0
        made = decoded.mul(whole / 2).add(whole / 2).clamp_(0, whole)
        if request is not None:
            if request.mask is not None:
                images = range(len(made))
                picture = self._rows(request.image, images).permute(0, 3, 1, 2) * whole
                made = paste(made, picture, self._rows(request.mask, images)[:, None], request.blend)
            made = made[..., : request.shown[1], : request.shown[0]]
        if output_type == "pt":
            return owned(made)
        if output_type == "np":
            return to_host(made.permute(0, 2, 3, 1).contiguous()).numpy()
        pixels = to_host(made.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()).numpy()
        return [Image.fromarray(picture) for picture in pixels]

    def _signed(self, request: Given, images: range) -> Tensor:
        """The request's picture of each of these images: [n, 3, H, W] in −1…1."""
        return self._rows(request.image, images).permute(0, 3, 1, 2) * 2 - 1

    def _rows(self, given: Any, images: range) -> Tensor:
        chosen = given[images.start : images.stop] if len(given) > 1 else given.repeat(len(images), axis=0)
        return to_device(torch.from_numpy(chosen), self.device)


def encode(vae: Autoencoder, pictures: Tensor, draws: Sequence[Draw] | None = None) -> Tensor:
    """Pictures [n, 3, H, W] in −1…1 → scaled latents [n, C, h, w] float32, each encoded alone.

    With `draws`, one a picture, each is drawn from its posterior; else it is the posterior's mean.
    """
    config = vae.config
    dtype = next((weight.dtype for weight in vae.parameters()), pictures.dtype)
    found = []
    for i in range(len(pictures)):
        posterior = vae.encode(pictures[i : i + 1].to(dtype))
        mean = posterior.mean
        drawn = mean if draws is None else posterior.sample(draws[i](tuple(mean.shape[1:])).to(dtype))
        found.append(drawn.float())
    return (torch.cat(found) - config.shift_factor) * config.scaling_factor


def paste(drawn: Tensor, picture: Tensor, mask: Tensor, blend: int = 0) -> Tensor:
    """What was drawn [n, 3, H, W] inside the mask, the picture outside, to the bit.

    mask bool [n or 1, 1, H, W]; picture [n or 1, 3, H, W]. `blend`: the two pass into each other over so many
    pixels inside the mask's edge.
    """
    if not blend:
        return torch.where(mask, drawn, picture)
    share = mask.to(drawn.dtype)
    for kernel, padding in (((1, 2 * blend + 1), (0, blend)), ((2 * blend + 1, 1), (blend, 0))):
        share = F.avg_pool2d(share, kernel, 1, padding, count_include_pad=False)
    # An average over a square is one half at a straight edge, and one from `blend` pixels inside it.
    mixed = torch.lerp(picture.expand_as(drawn), drawn, (2 * share - 1).clamp(0, 1))
    return torch.where(mask, mixed, picture)
