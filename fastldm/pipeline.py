"""Prompt to image: arguments → text → noise → table → condition → denoise → decode, each a public method.

A pipeline does not change after loading; calls from several threads are served one after the other.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastldm import __version__, ops
from fastldm.arguments import Limits, Request, check_generate
from fastldm.checkpoint import Components, inspect
from fastldm.diffusion import SamplerTable, build_table
from fastldm.errors import CheckpointError, InvalidArgument, NonFiniteOutput, OutOfMemory
from fastldm.footprint import Footprint, estimate
from fastldm.models.layers import channels_last
from fastldm.models.text import TextConditioner, TextEmbeddings
from fastldm.models.unet import UNetCondition
from fastldm.models.vae_strips import decode, peak_bytes
from fastldm.result import Result
from fastldm.runtime.denoise import Slots, denoise
from fastldm.runtime.memory import available_bytes

BUCKET = 8  # most images that run side by side


class Pipeline:
    """A loaded model that makes images from prompts; `fastldm.load` makes one."""

    def __init__(
        self,
        components: Components,
        device: torch.device,
        dtype: torch.dtype,
        backends: tuple[str, ...] | None,
    ) -> None:
        shape = components.unet.config
        if shape.in_channels != shape.latent_channels:
            why = f"is {shape.in_channels}: generate() cannot feed the channels of an inpainting model yet"
            raise CheckpointError(components.path, "unet in_channels", why)
        self.components, self.device, self.dtype, self.backends = components, device, dtype, backends
        for network in (components.unet, components.vae, components.text_encoder):
            channels_last(network.to(device, dtype))
        self.text = TextConditioner(components.tokenizer, components.text_encoder)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Pipeline({self.components.path}, {self.components.family}, {self.device}, {self.dtype})"

    @property
    def limits(self) -> Limits:
        """What `generate` accepts of this model, on this machine, now."""
        unet, vae, scheduler = (
            self.components.unet.config,
            self.components.vae.config,
            self.components.scheduler,
        )
        side = unet.sample_size * vae.factor
        return Limits(
            max_steps=scheduler.num_train_timesteps,
            samplers=tuple(scheduler.samplers),
            default_sampler=scheduler.sampler,
            factor=vae.factor,
            latent_channels=unet.latent_channels,
            default_width=side,
            default_height=side,
            context_dim=unet.cross_attention_dim,
            memory_bytes=available_bytes(self.device),
            bytes_per_pixel=3 * (2 * self.dtype.itemsize + 12),  # of a finished image and its conversion
            context_length=self.text.length,
        )

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """The pipeline for one caller: nobody else runs it within the block."""
        with self._lock, ops.use_backends(self.backends), torch.inference_mode():
            yield

    @torch.inference_mode()
    def generate(self, prompt: str | list[str] | None = None, **arguments: Any) -> Result:
        """Make images; keywords as in `fastldm.generate`.

        Raises InvalidArgument before any work, TypeError for an unknown keyword, OutOfMemory,
        NonFiniteOutput.
        """
        request = self.check(prompt, **arguments)
        table = self.table(request)
        self._refuse_what_does_not_fit(request)
        with self.turn():
            try:
                return self._run(request, table)
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
                    raise
                asked = f"{request.count} images of {request.width}x{request.height}"
                raise OutOfMemory(f"{asked}: {error}") from None

    def check(self, prompt: str | list[str] | None = None, **arguments: Any) -> Request:
        """The request that these keywords of `generate` describe, or the error for the first wrong one."""
        return check_generate(self.limits, prompt=prompt, **arguments)

    def footprint(self, request: Request) -> Footprint:
        """How much memory a request will need, to a tenth."""
        embeds = request.prompt_embeds
        with ops.use_backends(self.backends):
            return estimate(
                self.components,
                self.dtype,
                width=request.width,
                height=request.height,
                images=request.count,
                side_by_side=BUCKET,
                guided=request.guided,
                steps=request.steps,
                tokens=self.text.length if embeds is None else embeds.shape[1],
                from_image=request.image is not None,
                to_pixels=request.output_type != "latent",
            )

    def _refuse_what_does_not_fit(self, request: Request) -> None:
        free, asked = (
            available_bytes(self.device),
            f"{request.count} images of {request.width}x{request.height}",
        )
        plain = peak_bytes(
            self.components.vae.config, request.height, request.width, self.dtype.itemsize, None
        )
        if 4 * plain * request.count <= free:
            return  # no stage takes more for an image than its decode in one piece, by far
        needed = self.footprint(request).needed
        if needed > free:
            sizes = f"{needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free"
            raise OutOfMemory(f"{asked}: {sizes}")

    def _run(self, request: Request, table: SamplerTable) -> Result:
        clock = Clock()
        text = self.encode(request)
        clock.lap("text")
        finished: list[Tensor] = []
        stopped = False
        for start in range(0, request.count, BUCKET):
            images = range(start, min(start + BUCKET, request.count))
            generators = [torch.Generator("cpu").manual_seed(request.seeds[i]) for i in images]
            latents = self.start(request, table, images, generators)
            condition = self.condition(request, table, text, images)
            clock.lap("condition")
            latents, stopped = self.denoise(request, table, latents, condition, generators, images)
            finished.append(latents)
            clock.lap("denoise")
            if stopped:
                break
        latents = torch.cat(finished)
        as_latents = request.output_type == "latent"
        output: Any = latents.contiguous() if as_latents else self.decode(latents, request.output_type)
        clock.lap("decode")
        return Result(
            images=output,
            seeds=request.seeds[: len(latents)],
            timings=clock.seconds(),
            warnings=(*self.components.warnings, *request.warnings, *text.warnings),
            stopped=stopped,
            describe=partial(self._describe, request),
        )

    def table(self, request: Request) -> SamplerTable:
        """The request's sampler table."""
        return build_table(
            self.components.scheduler,
            request.steps,
            sampler=request.sampler,
            eta=request.eta,
            guidance_scale=request.guidance_scale,
            strength=request.strength,
        )

    def encode(self, request: Request) -> TextEmbeddings:
        """Text embeddings of all images: context [2n or n, L, D], the unconditional half first."""
        if request.prompt_embeds is None:
            assert request.prompts is not None
            return self.text.encode(request.prompts, request.negatives if request.guided else None)
        each = request.num_images
        conditional = (
            torch.as_tensor(request.prompt_embeds).to(self.device, self.dtype).repeat_interleave(each, dim=0)
        )
        if not request.guided:
            return TextEmbeddings(conditional)
        if request.negative_prompt_embeds is None:
            negative = self.text.encode(request.negatives)
            if negative.context.shape[1] != conditional.shape[1]:
                allowed = f"at most {self.text.length} tokens beside prompt_embeds="
                raise InvalidArgument("negative_prompt", request.negatives[0], allowed)
            return TextEmbeddings(torch.cat((negative.context, conditional)), negative.warnings)
        negative_embeds = torch.as_tensor(request.negative_prompt_embeds).to(self.device, self.dtype)
        return TextEmbeddings(torch.cat((negative_embeds.repeat_interleave(each, dim=0), conditional)))

    def start(
        self, request: Request, table: SamplerTable, images: range, generators: list[torch.Generator]
    ) -> Tensor:
        """The latents that the first step sees: scaled noise, or the noised latents of the input image;
        float32.
        """
        factor = self.components.vae.config.factor
        channels = self.components.unet.config.latent_channels
        shape = (channels, request.height // factor, request.width // factor)
        if request.latents is not None:
            given = torch.as_tensor(request.latents)[images.start : images.stop]
            return given.to(self.device, torch.float32) * table.initial_scale
        if request.image is None:
            return self._noise(shape, generators) * table.initial_scale
        config = self.components.vae.config
        pixels = torch.from_numpy(request.image).permute(0, 3, 1, 2)
        pixels = (
            pixels[images.start : images.stop] if len(pixels) > 1 else pixels.expand(len(images), -1, -1, -1)
        )
        clean = []
        for picture, generator in zip(
            pixels, generators, strict=True
        ):  # the posterior is drawn before the noise
            posterior = self.components.vae.encode((picture[None] * 2 - 1).to(self.device, self.dtype))
            clean.append(posterior.sample(self._noise(shape, [generator]).to(self.dtype)).float())
        x0 = (torch.cat(clean) - config.shift_factor) * config.scaling_factor
        return table.start_alpha * x0 + table.start_sigma * self._noise(shape, generators)

    def _noise(self, shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
        """Unit noise float32, each image's from its own CPU generator, so that it depends on nothing but
        the seed.
        """
        drawn = [torch.randn((1, *shape), generator=generator) for generator in generators]
        return torch.cat(drawn).to(self.device)

    def condition(
        self, request: Request, table: SamplerTable, text: TextEmbeddings, images: range
    ) -> UNetCondition:
        """What all steps of these images share."""
        halves = range(0, len(text.context), request.count)
        rows = [half + i for half in halves for i in images]
        lengths = None if text.lengths is None else text.lengths[rows]
        timesteps = table.timesteps.to(self.device, torch.float32)
        return self.components.unet.condition(
            text.context[rows].to(self.dtype), timesteps, context_length=lengths
        )

    def denoise(
        self,
        request: Request,
        table: SamplerTable,
        latents: Tensor,
        condition: UNetCondition,
        generators: list[torch.Generator],
        images: range,
    ) -> tuple[Tensor, bool]:
        """Run the steps; the final latents (of a stopped run, the clean latents as estimated last), and
        whether it stopped.
        """
        slots = Slots.of(latents, table.rows.to(self.device), request.guided, self.dtype)
        unet = self.components.unet
        groups, total = -(-request.count // BUCKET), len(table.draws)
        before = images.start // BUCKET * total
        steps = denoise(
            slots,
            lambda model_input, step: unet(model_input, condition, step),
            table.draws,
            lambda: self._noise(tuple(latents.shape[1:]), generators),
        )
        for i, x0 in enumerate(steps):
            if request.progress is not None:
                request.progress(before + i + 1, groups * total)
            if request.callback is not None and request.callback(before + i, x0.clone()) is False:
                steps.close()
                return x0.clone(), True
        if not torch.isfinite(slots.latents).all():
            raise NonFiniteOutput(
                f"the latents of {request.count} images are not finite; dtype is {self.dtype}"
            )
        return slots.latents, False

    def decode(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Latents [n, C, h, w] → images as `Result.images` has them, one at a time; large ones in strips."""
        config = self.components.vae.config
        latents = (latents / config.scaling_factor + config.shift_factor).to(self.dtype)
        decoded = decode(self.components.vae, latents).float()
        if not torch.isfinite(decoded).all():
            raise NonFiniteOutput(f"the decoded image is not finite; dtype is {self.dtype}")
        if output_type == "pil":
            levels = decoded.mul(127.5).add(127.5).clamp_(0, 255).round_().to(torch.uint8)
            return [
                Image.fromarray(np.ascontiguousarray(image))
                for image in levels.permute(0, 2, 3, 1).cpu().numpy()
            ]
        decoded = decoded.mul(0.5).add(0.5).clamp_(0, 1)
        if output_type == "pt":
            return decoded.contiguous()
        return np.ascontiguousarray(decoded.permute(0, 2, 3, 1).cpu().numpy())

    @cached_property
    def _hash(self) -> str:
        return inspect(self.components.path).hash

    def _describe(self, request: Request, index: int) -> Mapping[str, Any]:
        """What a PNG of image `index` says of its making."""
        shipped = self.components.path.name == "default" and "assets" in self.components.path.parts
        return {
            "version": __version__,
            "model": "default" if shipped else str(self.components.path),
            "model_hash": self._hash,
            "arguments": request.arguments(index),
        }


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory; its CPU allocator has no type of error for it, only words."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)


class Clock:
    """Seconds spent in named stages, and in all."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self._spent: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """Book the time since the last lap on `stage`."""
        now = time.perf_counter()
        self._spent[stage] = self._spent.get(stage, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """The stages and the total."""
        return {**self._spent, "total": self._last - self._began}
