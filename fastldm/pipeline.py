"""Prompt to image: arguments → text → noise → table → condition → denoise → decode, each a public method.

A pipeline changes by `load_lora` and `unload_lora` alone; calls from several threads are served one after the
other. `stages` is the way of one request; `generate` drives it through a bucket of slots of its own, and
`fastldm.runtime.Batcher` through slots that several requests share.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastldm import footprint, ops
from fastldm.arguments import Limits, Request, check_generate
from fastldm.checkpoint import Components
from fastldm.diffusion import SamplerTable, build_table
from fastldm.errors import InvalidArgument, NonFiniteOutput
from fastldm.lora import MergedLoras
from fastldm.models.layers import channels_last
from fastldm.models.text import TextConditioner, TextEmbeddings
from fastldm.models.unet import UNetCondition
from fastldm.models.vae_strips import decode
from fastldm.origin import Origin
from fastldm.result import Clock, Result
from fastldm.runtime.graphs import CudaRecorder, Graphs
from fastldm.runtime.memory import TensorCache, available_bytes, out_of_memory, owned, to_device, visiting
from fastldm.runtime.segments import segments
from fastldm.runtime.slots import CachingSlots, Group, Kept, Outcome, Slots, Watch, smallest, split, watcher
from fastldm.runtime.turns import Turns
from fastldm.runtime.weights import Weights
from fastldm.tasks.beside import beside_of
from fastldm.tasks.contexts import textless_context
from fastldm.tasks.pictures import Pictures

EMBEDDED, CONDITIONED = 16 << 20, 128 << 20  # bytes kept of embedded text, and of its keys and values


class Pipeline:
    """A loaded model that makes images from prompts; `fastldm.load` makes one. Threads may share it: what it
    remembers, text and captured graphs, is used within a `turn`.
    """

    def __init__(
        self,
        components: Components,
        device: torch.device,
        dtype: torch.dtype,
        backends: tuple[str, ...] | None,
        offload_text_encoder: bool = False,
    ) -> None:
        shape, rescaler = components.unet.config, components.rescaler
        beside = beside_of(components.family, shape.in_channels, shape.latent_channels, rescaler)
        self.pictures = Pictures(components.vae, beside, device)
        self.origin = Origin(components.path, components.files)
        self.components, self.device, self.dtype, self.backends = components, device, dtype, backends
        networks, reads = components.networks, components.tokenizer is not None
        visits = reads and offload_text_encoder
        for name, network in networks.items():
            stays = visits and name == "text_encoder"
            channels_last(network.to(torch.device("cpu") if stays else device, dtype))
        self.text = TextConditioner(*components.text) if reads else None
        self._visiting = visiting(networks["text_encoder"], device) if visits else None
        self.loras = MergedLoras(**{n: networks[n] for n in ("unet", "text_encoder") if n in networks})
        self.turns = Turns()
        recorder = CudaRecorder(device) if device.type == "cuda" else None
        self.graphs = Graphs(recorder, available_bytes(device) // 4)
        self._embedded, self._conditioned = TensorCache(EMBEDDED), TensorCache(CONDITIONED)
        self._weights = Weights(networks.values())

    def __repr__(self) -> str:
        return f"Pipeline({self.components.path}, {self.components.family}, {self.device}, {self.dtype})"

    @property
    def limits(self) -> Limits:
        """What `generate` accepts of this model, on this machine, now."""
        model = self.components
        unet, vae, scheduler = model.unet.config, model.vae.config, model.scheduler
        side = unet.sample_size * vae.factor
        return Limits(
            max_steps=scheduler.num_train_timesteps,
            samplers=tuple(scheduler.samplers),
            default_sampler=scheduler.sampler,
            factor=vae.factor,
            latent_channels=unet.latent_channels,
            default_width=side,
            default_height=side,
            context_dim=unet.cross_attention_dim or 0,
            memory_bytes=available_bytes(self.device),
            bytes_per_pixel=3 * (2 * self.dtype.itemsize + 12),  # of a finished image and its conversion
            context_length=model.context_length,
            abilities=model.abilities,
        )

    def generate(self, prompt: str | list[str] | None = None, **arguments: Any) -> Result:
        """Make images; keywords as in `fastldm.generate`.

        Up to 8 images run side by side. On a GPU they take the smallest of 1, 2, 4 or 8 slots that holds
        them; on a CPU, where an empty slot costs time, they go in groups that fill theirs (11 = 8 + 2 + 1).
        Raises InvalidArgument before any work, TypeError for an unknown keyword, OutOfMemory,
        NonFiniteOutput.
        """
        request = self.check(prompt, **arguments)
        return self.run(request)

    def run(self, request: Request, table: SamplerTable | None = None) -> Result:
        """Make the images of a checked request by its own table, or by another, as that of its inversion."""
        stages = self.stages(request, self.groups(request), table)
        with self.turn():
            outcome = None
            while True:
                try:
                    group = stages.send(outcome)
                except StopIteration as finished:
                    return finished.value
                count = smallest(len(group.latents))
                outcome = self.slots(group, count, group.guided, request.cuda_graph).complete(group)

    def load_lora(self, path: str | os.PathLike[str], weight: float = 1.0) -> None:
        """Merge a LoRA into the UNet and the text encoder, on top of those that are there.

        path: a .safetensors file with the names of peft, diffusers or kohya, or a folder of peft or diffusers
        with one. Raises InvalidArgument, and CheckpointError that names a key which no module has or that
        does not fit; then nothing has changed.
        """
        lora = self.loras.read(path, weight)
        with self.turn():
            self.loras.add(lora)

    def unload_lora(self) -> None:
        """Take all LoRAs out again: every weight has the bits that it was loaded with."""
        with self.turn():
            self.loras.clear()

    def check(self, prompt: str | list[str] | None = None, **arguments: Any) -> Request:
        """The request that these keywords of `generate` describe, or the error for the first wrong one."""
        request = check_generate(self.limits, prompt=prompt, **arguments)
        if request.cuda_graph and self.graphs.recorder is None:
            raise InvalidArgument("cuda_graph", True, "None or False: this pipeline runs on the CPU")
        return request

    def groups(self, request: Request) -> list[range]:
        """Which of its images `generate` makes together, the largest group first."""
        return split(request.count, padded=self.device.type == "cuda")

    def footprint(self, request: Request, slots: int | None = None) -> footprint.Footprint:
        """How much memory a request will need, to a tenth; with `slots`, in so many that requests share."""
        together = slots or smallest(len(self.groups(request)[0]))
        guided, visits = request.guided or slots is not None, self._visiting is not None
        with ops.use_backends(self.backends):
            return footprint.of(request, self.components, self.dtype, together, guided, visits)

    @contextlib.contextmanager
    def within_memory(self, request: Request, slots: int | None = None) -> Iterator[None]:
        """For the work on a request, within a `turn`: OutOfMemory before the block where it will not fit, and
        if memory runs out in the block.
        """
        asked = f"{request.count} images of {request.width}x{request.height}"
        model, free = (self.components, self.dtype), available_bytes(self.device)
        if not footprint.surely_fits(request, *model, slots or 1, self._weights.nbytes, free):
            self.footprint(request, slots).check(asked, free)
        with out_of_memory(asked):
            yield

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """The pipeline for one caller: nobody else runs it or changes its weights within the block."""
        with self.turns, ops.use_backends(self.backends), torch.inference_mode():
            moved, changed = self._weights.since_last()
            if moved:
                self.graphs.clear()
            if moved or changed:  # remembered text is that of other weights
                self._embedded.clear()
                self._conditioned.clear()
            yield

    def stages(
        self,
        request: Request,
        groups: list[range],
        table: SamplerTable | None = None,
        slots: int | None = None,
    ) -> Generator[Group, Outcome | None, Result]:
        """The way of one request: yields each group of its images when it is ready to be denoised, is sent
        the outcome, and returns the result. To be driven within a `turn`; InvalidArgument comes at once.
        `slots`: how many there are, if requests share them.
        """
        return self._stages(request, groups, table or self.table(request), slots)

    def _stages(
        self, request: Request, groups: list[range], table: SamplerTable, slots: int | None
    ) -> Generator[Group, Outcome | None, Result]:
        clock = Clock()
        finished: list[Tensor] = []
        stopped = False
        with self.within_memory(request, slots):
            text = self.encode(request)
            clock.lap("text")
            for number, images in enumerate(groups):
                generators = [torch.Generator("cpu").manual_seed(request.seeds[i]) for i in images]
                latents, kept = self.start(request, table, images, generators)
                watch = watcher(request.progress, request.callback, number, len(groups), len(table.draws))
                group = self.condition(request, table, text, images, latents, kept, generators, watch)
                clock.lap("condition")
                outcome = yield from segments(group, request.shortcuts.guided(len(table.draws)))
                if not (outcome.stopped or torch.isfinite(outcome.latents).all()):
                    latents_of = f"the latents of {request.count} images"
                    raise NonFiniteOutput(f"{latents_of} are not finite; dtype is {self.dtype}")
                finished.append(outcome.latents)
                clock.lap("denoise")
                if stopped := outcome.stopped:
                    break
            latents = torch.cat(finished)
            output = (
                owned(latents)
                if request.output_type == "latent"
                else self.decode(latents, request.output_type, request.cuda_graph, request)
            )
            clock.lap("decode")
        eager = () if request.cuda_graph is False else dict.fromkeys(self.graphs.failures.values())
        return Result(
            images=output,
            seeds=request.seeds[: len(latents)],
            timings=clock.seconds(),
            warnings=(*self.components.warnings, *request.warnings, *text.warnings, *eager),
            stopped=stopped,
            shortcuts=request.shortcuts,
            describe=partial(self.origin.describe, request, self.loras.describe()),
        )

    def table(self, request: Request) -> SamplerTable:
        """The request's sampler table."""
        table = build_table(
            self.components.scheduler,
            request.steps,
            sampler=request.sampler,
            eta=request.eta,
            guidance_scale=request.guidance_scale,
            strength=request.strength,
        )
        if table.log_variances is not None and not self.components.unet.config.learned_variance:
            raise InvalidArgument("sampler", request.sampler, "another: the UNet learnt no variance")
        return table

    def encode(self, request: Request) -> TextEmbeddings:
        """What cross-attention reads for all images: [2n or n, L, D], the unconditional half first."""
        if self.text is None:
            model = self.components
            return TextEmbeddings(textless_context(model.class_embedder, model.text_encoder, request))
        if request.prompt_embeds is None:
            assert request.prompts is not None
            return self._embed(request, request.prompts, request.negatives if request.guided else None)
        each = request.num_images
        conditional = (
            torch.as_tensor(request.prompt_embeds).to(self.device, self.dtype).repeat_interleave(each, dim=0)
        )
        if not request.guided:
            return TextEmbeddings(conditional)
        if request.negative_prompt_embeds is None:
            negative = self._embed(request, request.negatives)
            if negative.context.shape[1] != conditional.shape[1]:
                allowed = f"at most {self.components.context_length} tokens beside prompt_embeds="
                raise InvalidArgument("negative_prompt", request.negatives[0], allowed)
            return TextEmbeddings(torch.cat((negative.context, conditional)), negative.warnings)
        negative_embeds = torch.as_tensor(request.negative_prompt_embeds).to(self.device, self.dtype)
        return TextEmbeddings(torch.cat((negative_embeds.repeat_interleave(each, dim=0), conditional)))

    def _embed(
        self, request: Request, prompts: list[str], negatives: list[str] | None = None
    ) -> TextEmbeddings:
        assert self.text is not None
        run = self._visiting or partial(
            self.graphs.call, "the text encoder", self.text.text_encoder, wanted=request.cuda_graph
        )
        return self.text.encode(prompts, negatives, self._embedded.get, run)

    def start(
        self, request: Request, table: SamplerTable, images: range, generators: list[torch.Generator]
    ) -> tuple[Tensor, Kept | None]:
        """The latents that the first step sees: scaled noise, or the noised latents of the input image;
        float32. And what of them every step is to keep.
        """
        factor = self.components.vae.config.factor
        channels = self.components.unet.config.latent_channels
        shape = (channels, request.height // factor, request.width // factor)
        keeps, x0 = self.pictures.keeps(request), None
        if request.starts_from_image or keeps:
            draws = [partial(self._noise, generators=[generator]) for generator in generators]
            x0 = self.pictures.clean(request, images, draws)
        if request.latents is None:
            noise = self._noise(shape, generators)
        else:
            given = torch.as_tensor(request.latents)[images.start : images.stop]
            noise = given.to(self.device, torch.float32)
        latents = noise * table.initial_scale
        if x0 is not None and request.starts_from_image:
            latents = table.start_alpha * x0 + table.start_sigma * noise
        if x0 is None or not keeps:
            return latents, None
        levels = to_device(table.levels_after.float(), self.device)
        return latents, Kept(self.pictures.kept_mask(request, images), x0, noise, levels)

    def _noise(self, shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
        """Unit noise float32 of a shape, each image's from its own CPU generator, so that it depends on
        nothing but the seed.
        """
        drawn = [torch.randn((1, *shape), generator=g, dtype=torch.float32, device="cpu") for g in generators]
        return to_device(torch.cat(drawn), self.device)

    def condition(
        self,
        request: Request,
        table: SamplerTable,
        text: TextEmbeddings,
        images: range,
        latents: Tensor,
        kept: Kept | None,
        generators: list[torch.Generator],
        watch: Watch | None = None,
    ) -> Group:
        """These images, ready to be denoised: with what their steps share, computed once."""
        rows = [half + i for half in range(0, len(text.context), request.count) for i in images]
        draws = [partial(self._noise, generators=[generator]) for generator in generators]
        beside, unet = self.pictures.beside(request, images, draws), self.components.unet
        times = to_device(table.timesteps.float(), self.device)
        return Group(
            latents=latents,
            table=table.rows,
            draws=table.draws,
            generators=generators,
            context=[self._keys_values(text, row) for row in rows],
            lengths=None if text.lengths is None else text.lengths[rows].tolist(),
            time_bias=unet.time_bias(times, self.dtype),
            concat_bias=None if beside is None else unet.concat_bias(beside.to(self.dtype)),
            kept=kept,
            log_variances=None if (bounds := table.log_variances) is None else to_device(bounds, self.device),
            watch=watch,
            whole_every=request.shortcuts.whole_every,
        )

    def _keys_values(self, text: TextEmbeddings, row: int) -> Tensor:
        """The keys and values [K] of one row of text, as the UNet packs them. Each row is computed alone, so
        that it is the same whatever stands beside it and whether it is remembered or not.
        """

        def compute() -> Tensor:
            return self.components.unet.keys_values(text.context[row : row + 1].to(self.dtype))[0]

        return compute() if text.chunks is None else self._conditioned.get(text.chunks[row], compute)

    def slots(self, group: Group, count: int, guided: bool, cuda_graph: bool | None = None) -> Slots:
        """`count` slots for groups like this one, by a graph where there is one; with no group in them."""
        unet = self.components.unet

        def predict(network: Callable[..., Tensor], latents: Tensor, *rest: Any, **deep: Tensor) -> Tensor:
            context, lengths, concat_bias, time_bias, step = rest
            return network(latents, UNetCondition(context, time_bias, lengths, concat_bias), step, **deep)

        name, whole = "the step", partial(predict, unet)
        build: Callable[..., Slots] = partial(Slots, whole)
        if group.whole_every > 1:
            deep = (count * (1 + guided), unet.config.block_out_channels[0], *group.latents.shape[2:])
            name = "the step and a cached one"
            build = partial(CachingSlots, whole, partial(predict, unet.shallow), deep)
        with out_of_memory(f"{count} images side by side, latents {tuple(group.latents.shape[1:])}"):
            return self.graphs.get(
                (name, count, guided, *group.shape),
                lambda: build(group, count, guided, self.dtype),
                cuda_graph,
            )

    def decode(
        self,
        latents: Tensor,
        output_type: str = "pil",
        cuda_graph: bool | None = False,
        request: Request | None = None,
    ) -> Any:
        """Latents [n, C, h, w] → images as `Result.images` has them, one at a time; large ones in strips.

        cuda_graph: as in `generate`, within a `turn`. request: whose picture stays outside its mask.
        """
        vae = self.components.vae
        latents = (latents / vae.config.scaling_factor + vae.config.shift_factor).to(self.dtype)
        run = partial(self.graphs.call, "the decoder", vae.decode, wanted=cuda_graph)
        decoded = decode(vae, latents, run).float()
        finite = torch.isfinite(decoded).all()
        made = self.pictures.finished(decoded, output_type, request)
        if not finite:
            raise NonFiniteOutput(f"the decoded image is not finite; dtype is {self.dtype}")
        return made
