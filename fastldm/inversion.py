"""Inversion: the noise from which a model makes a given picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastldm.arguments import Request
from fastldm.checks import integer, refuse
from fastldm.diffusion import INVERTIBLE, inverse_table
from fastldm.pipeline import Pipeline
from fastldm.runtime.memory import to_device


def invert(
    pipe: Pipeline,
    image: Any = None,
    prompt: str | list[str] | None = None,
    *,
    latents: Any = None,
    steps: int = 100,
    guidance_scale: float = 1.0,
    negative_prompt: str | list[str] | None = None,
    sampler: str | None = None,
    width: int | None = None,
    height: int | None = None,
    refinements: int = 2,
    progress: bool | Callable[[int, int], object] | None = None,
    cuda_graph: bool | None = None,
) -> Tensor:
    """The noise from which `pipe` makes this image again: float32 [n, C, height/f, width/f].

    `pipe.generate(prompt, latents=noise)` with the same steps, guidance_scale, negative_prompt and sampler
    ends near the image's latents: with the shipped model, 100 steps and no guidance, within 1 % of their RMS.
    Each refinement costs as many passes as there are steps and brings the latents nearer; fewer steps and
    guidance take them away. NonFiniteOutput: too few steps for this guidance.

    image     as in `generate`; or latents=, clean ones as output_type="latent" gives them
    sampler   ddim, ddim_compvis, euler or flow_euler; the model's own by default
    progress, cuda_graph, width, height   as in `generate`

    Raises what `generate` does. (Song et al. 2021, arXiv:2010.02502; Pan et al. 2023, arXiv:2309.04907)
    """
    if image is None and latents is None:
        refuse("image", None, "an image, or latents=")
    extra = integer("refinements", refinements, 0, 100)
    request = pipe.check(
        prompt,
        image=image,
        strength=None if image is None else 1.0,
        latents=latents,
        steps=steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        sampler=sampler,
        width=width,
        height=height,
        output_type="latent",
        progress=progress,
        cuda_graph=cuda_graph,
    )
    if request.sampler not in INVERTIBLE:
        refuse("sampler", request.sampler, f"one of {', '.join(INVERTIBLE)} to invert")
    table = inverse_table(pipe.table(request), extra)
    if request.image is not None:
        latents = _encode(pipe, request)
        request = replace(request, image=None, starts_from_image=False, latents=latents)
    noise: Tensor = pipe.run(request, table).images
    return noise


def _encode(pipe: Pipeline, request: Request) -> Tensor:
    """The clean latents of the request's images: the means of their posteriors, scaled; float32."""
    vae, means = pipe.components.vae, []
    with pipe.turn(), pipe.within_memory(request):
        for picture in torch.from_numpy(request.image).permute(0, 3, 1, 2):
            pixels = to_device(picture[None] * 2 - 1, pipe.device).to(pipe.dtype)
            means.append(vae.encode(pixels).mean.float())
    means = means if len(means) == request.count else means * request.count
    return (torch.cat(means) - vae.config.shift_factor) * vae.config.scaling_factor
