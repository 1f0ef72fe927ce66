"""Interpolation: pictures on the way from one prompt and seed to the next."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastldm.arguments import Request
from fastldm.checks import integer, refuse
from fastldm.pipeline import Pipeline
from fastldm.result import Result

MAX_FRAMES = 4096
MADE = ("latents", "prompt_embeds", "negative_prompt_embeds", "num_images")


def interpolate(
    pipe: Pipeline,
    prompts: str | list[str] | None,
    seeds: int | list[int] | None,
    frames: int,
    **arguments: Any,
) -> Result:
    """`frames` pictures, evenly from the first prompt and seed to the last: a `Result` with all of them.

    Between two seeds the noise turns along a great circle (slerp), between two prompts their embeddings mix.
    A frame that falls on a prompt and seed is their own picture, with a sampler that draws no noise on the
    way and prompts of one number of chunks. Other samplers draw by the first seed, the same for every frame.

    prompts    one or several; None for a model that takes none
    seeds      one or several, as many as prompts where there are several of both; None: one is drawn
    arguments  as in `generate`; negative_prompt is one, or one a prompt

    Raises what `generate` does. (White 2016, arXiv:1609.04468, section 2.1)
    """
    for name in MADE:
        if arguments.get(name) is not None:
            refuse(name, arguments[name], "None: interpolate makes it")
    count = integer("frames", frames, 2, MAX_FRAMES)
    seeds = secrets.randbits(32) if seeds is None else seeds
    given = {"prompts": _listed(prompts), "seeds": _listed(seeds)}
    keys = max(map(len, given.values()))
    if keys < 2:
        refuse("seeds", seeds, "several, or several prompts")
    for name, values in given.items():
        if len(values) not in (1, keys):
            refuse(name, values, f"one, or {keys}")
        given[name] = values * (keys // len(values))
    told = {"num_images": keys} if prompts is None else {"prompt": given["prompts"]}
    request = pipe.check(seed=given["seeds"], **told, **arguments)
    if request.starts_from_image:
        refuse("image", arguments["image"], "None, or one to be filled: pictures start from noise here")
    made: dict[str, Any] = {
        "seed": request.seeds[:1] * count,
        "latents": _along([_noise(pipe, seed, request) for seed in request.seeds], count, _slerp),
    }
    if len({*zip(request.prompts or (), request.negatives, strict=False)}) < 2:
        once = {}
        if prompts is not None:
            once = {"prompt": given["prompts"][0], "negative_prompt": request.negatives[0]}
        return pipe.generate(**{**arguments, **once, **made, "num_images": count})
    with pipe.turn(), pipe.within_memory(replace(request, seeds=made["seed"])):
        text = pipe.encode(request)
    *negative, positive = text.context.float().split(keys)
    made["prompt_embeds"] = _along(list(positive), count, _lerp)
    if negative:
        made["negative_prompt_embeds"] = _along(list(negative[0]), count, _lerp)
    result = pipe.generate(**{**arguments, "negative_prompt": None, **made})
    return replace(result, warnings=(*text.warnings, *result.warnings))


def _listed(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list | tuple) else [values]


def _noise(pipe: Pipeline, seed: int, request: Request) -> Tensor:
    """The noise from which `generate` starts an image of this seed: [C, h, w]."""
    limits, draw = pipe.limits, torch.Generator("cpu").manual_seed(seed)
    cells = (request.height // limits.factor, request.width // limits.factor)
    shape = (1, limits.latent_channels, *cells)
    return torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu")[0]


def _along(keys: Sequence[Tensor], count: int, between: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
    """`count` tensors, evenly from the first key over all others to the last: [count, ...]."""
    legs, steps, found = len(keys) - 1, count - 1, []
    for step in range(count):
        leg = min(step * legs // steps, legs - 1)
        found.append(between(keys[leg], keys[leg + 1], (step * legs - leg * steps) / steps))
    return torch.stack(found)


def _lerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    return (1 - share) * start + share * end


def _slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """On the great circle through both, so that noise between them is as large as they are."""
    a, b = start.double(), end.double()
    angle = math.acos(max(-1.0, min(1.0, float((a * b).sum() / (a.norm() * b.norm())))))
    if math.sin(angle) < 1e-6:  # one direction, or opposite ones, between which no circle is the shortest
        return _lerp(start, end, share)
    mixed = math.sin((1 - share) * angle) * a + math.sin(share * angle) * b
    return (mixed / math.sin(angle)).to(start.dtype)
