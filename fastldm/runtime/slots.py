"""Slots: static buffers in which images are made side by side, one step of all of them at a time.

Everything that differs from image to image is a row of a tensor: latents, sampler table, place in it,
guidance scale, noise, keys and values of the prompt, time biases. So one step, launched on a CPU and captured
once on a GPU, serves any mix of requests, which join and leave between steps: whoever joins writes its rows.
An empty or finished slot rests on the identity row of its table.

Tables are as long as a request has steps, buffers are not: a slot holds a window of WINDOW steps, refilled
when it is used up. The host counts steps as the device does, so it knows when without asking.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fastldm import ops
from fastldm.runtime.graphs import Work
from fastldm.runtime.memory import out_of_memory, owned, to_device

SIZES = (1, 2, 4, 8)
WINDOW = 32

# latents [B, C, H, W], context [R, K], its lengths [R] or None, the share of the channels beside the latents
# [B, width, H, W] or None, time biases [B, steps, M], step [B] → prediction [R, C, H, W], or of 2C channels:
# the place of the log variance beside it
Predict = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor], Tensor]
# (step, its clean latents as estimated [n, C, H, W], if asked for) → whether to stop
Watch = Callable[[int, Callable[[], Tensor]], bool]


def watcher(
    progress: Callable[[int, int], object] | None,
    callback: Callable[[int, Tensor], object] | None,
    number: int,
    groups: int,
    steps: int,
) -> Watch | None:
    """What reports the steps of group `number` to the caller, who may ask to stop; None if nobody listens."""
    if progress is None and callback is None:
        return None

    def watch(step: int, x0: Callable[[], Tensor]) -> bool:
        at, clean = number * steps + step, None if callback is None else owned(x0())
        with torch.inference_mode(False):  # for the tensors that are made there are the caller's, too
            if progress is not None:
                progress(at + 1, groups * steps)
            return callback is not None and clean is not None and callback(at, clean) is False

    return watch


@dataclass(frozen=True)
class Kept:
    """The part of n images' latents that is given, where the model has no channels to be told of it: after
    every step it is put back, noised as much as the rest. (Lugmayr et al. 2022, arXiv:2201.09865, eq. 8)
    """

    mask: Tensor  # float32 [n, 1, H, W]: 1 where it is given
    clean: Tensor  # float32 [n, C, H, W]
    noise: Tensor  # float32 [n, C, H, W]
    levels: Tensor  # float32 [steps, 2]: alpha and sigma after each step


@dataclass(frozen=True)
class Group:
    """Images of one request that are made together: what they bring to their slots."""

    latents: Tensor  # float32 [n, C, H, W], variance-preserving: what the first step sees
    table: Tensor  # float32 [steps + 1, columns], the identity row last
    draws: Sequence[bool]  # [steps]: which steps read noise
    generators: Sequence[torch.Generator]  # [n], on the CPU
    context: Sequence[Tensor]  # n or, guided, 2n rows [K], the unconditional half first
    lengths: Sequence[int] | None  # tokens of each row that count; None: all
    time_bias: Tensor  # [steps, M]
    concat_bias: Tensor | None = None  # [n, width, H, W]: conv_in's share of channels beside the latents
    kept: Kept | None = None
    log_variances: Tensor | None = None  # float [steps, 2]: bounds, where the noise is as large as learned
    watch: Watch | None = None
    x0: Tensor | None = None  # [n, C, H, W] of a step before the first; None: there was none
    whole_every: int = 1  # as in Shortcuts; more than 1 is for CachingSlots

    @property
    def shape(self) -> tuple[Hashable, ...]:
        """What slots must have been made for to take this group."""
        beside = None if self.concat_bias is None else self.concat_bias.shape[1:]
        given = self.lengths is not None, beside, self.kept is not None, self.log_variances is not None
        return *self.latents.shape[1:], self.context[0].shape, *given

    @property
    def guided(self) -> bool:
        """Whether it brings an unconditional half."""
        return len(self.context) > len(self.latents)


@dataclass(frozen=True)
class Outcome:
    """The latents [n, C, H, W] float32 of a group at its end; if stopped, the clean latents as estimated."""

    latents: Tensor
    stopped: bool


@dataclass(eq=False)
class Run:
    """A group in its slots, `done` steps on."""

    group: Group
    places: tuple[int, ...]
    table: Tensor  # on the device, identity rows up to a whole window
    done: int = field(default=0)


def smallest(count: int) -> int:
    """The smallest number of slots that holds so many images."""
    return next(size for size in SIZES if size >= count)


def split(count: int, most: int = SIZES[-1], padded: bool = True) -> list[range]:
    """Images 0 … count − 1 in groups of at most `most`; not padded, each fills its slots (11 = 8 + 2 + 1)."""
    groups: list[range] = []
    while (start := groups[-1].stop if groups else 0) < count:
        left = min(count - start, most)
        groups.append(range(start, start + (left if padded else 1 << left.bit_length() - 1)))
    return groups


class Slots(Work):
    """`count` slots for groups like the one given, with or without guidance.

    An unguided group may run in guided slots: its halves are equal then, and its table's guidance is 1.
    """

    def __init__(self, predict: Predict, like: Group, count: int, guided: bool, dtype: torch.dtype) -> None:
        self.predict, self.count, self.halves, self.shape = predict, count, 1 + guided, like.shape
        self.runs: list[Run] = []
        device, rows = like.latents.device, count * self.halves
        shape = (count, *like.latents.shape[1:])

        def images(dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device).to(memory_format=torch.channels_last)

        self.latents, self.x0, self.noise = images(), images(), images()
        self.model_input = images(dtype)
        identity = like.table[-1].to(device)
        self.table = identity.repeat(count, WINDOW + 1, 1)
        self.step = torch.full((count,), WINDOW, device=device)
        self.context = torch.zeros(rows, *like.context[0].shape, dtype=dtype, device=device)
        self.lengths = None if like.lengths is None else torch.ones(rows, dtype=torch.long, device=device)
        self.concat_bias: Tensor | None = None
        if like.concat_bias is not None:
            beside = torch.zeros((count, *like.concat_bias.shape[1:]), dtype=dtype, device=device)
            self.concat_bias = beside.to(memory_format=torch.channels_last)
        self.kept: Kept | None = None
        if like.kept is not None:
            levels = torch.zeros(count, WINDOW + 1, 2, dtype=torch.float32, device=device)
            self.kept = Kept(images()[:, :1].contiguous(), images(), images(), levels)
        self.log_variances: Tensor | None = None
        if like.log_variances is not None:
            self.log_variances = torch.zeros(count, WINDOW + 1, 2, dtype=torch.float32, device=device)
        self.time_bias = torch.zeros(count, WINDOW + 1, like.time_bias.shape[1], dtype=dtype, device=device)
        self._last_step: torch.cuda.Event | None = None

    def buffers(self) -> Iterable[Tensor]:
        own = [*vars(self).values(), *(vars(self.kept).values() if self.kept is not None else ())]
        return (tensor for tensor in own if isinstance(tensor, Tensor))

    def launch(self) -> None:
        """One step of every slot: model, guidance, update, next input."""
        conditions = self.context, self.lengths, self.concat_bias, self.time_bias, self.step
        out, noise = self._split(self.predict(self.model_input, *conditions))
        ops.guided_step(self.latents, self.x0, self.model_input, out, noise, self.table, self.step)
        if self.kept is not None:
            self._put_back(self.kept)
        self.step.add_(1).clamp_(max=WINDOW)

    def _split(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """What the model predicts, and the noise of the step, as large as it says where it learnt that."""
        if out.shape[1] == self.latents.shape[1]:
            return out, self.noise
        out, place = out.chunk(2, dim=1)
        noise = self.noise
        if self.log_variances is not None:  # guidance does not mix it
            noise = ops.learned_noise(noise, place[-self.count :], self.log_variances, self.step)
        return out.contiguous(memory_format=torch.channels_last), noise

    def _put_back(self, kept: Kept) -> None:
        """The given part of the latents, at the level that each slot has come to."""
        slots = torch.arange(self.count, device=self.step.device)
        level = kept.levels[slots, self.step, :, None, None, None]
        given = level[:, 0] * kept.clean + level[:, 1] * kept.noise
        self.latents.lerp_(given, kept.mask.expand_as(given))
        self.model_input.copy_(self.latents)

    @property
    def free(self) -> list[int]:
        """The slots that no group holds."""
        taken = {place for run in self.runs for place in run.places}
        return [place for place in range(self.count) if place not in taken]

    def admit(self, group: Group) -> Run:
        """Give the group the first free slots; its first step is the next one."""
        places, device = tuple(self.free[: len(group.latents)]), self.latents.device
        assert len(places) == len(group.latents) and 1 + group.guided <= self.halves
        steps = len(group.draws)
        padding = group.table[-1].expand(-steps % WINDOW, -1)
        run = Run(group, places, to_device(torch.cat((group.table[:steps], padding)), device))
        for i, place in enumerate(places):
            self.latents[place] = group.latents[i]
            self.model_input[place] = group.latents[i]
            if group.x0 is None:
                self.x0[place].zero_()
            else:
                self.x0[place] = group.x0[i]
            if self.concat_bias is not None and group.concat_bias is not None:
                self.concat_bias[place] = group.concat_bias[i]
            if self.kept is not None and group.kept is not None:
                self.kept.mask[place] = group.kept.mask[i]
                self.kept.clean[place] = group.kept.clean[i]
                self.kept.noise[place] = group.kept.noise[i]
            for half in range(self.halves):
                row = (i + half * len(places)) % len(group.context)
                self.context[place + half * self.count] = group.context[row]
                if self.lengths is not None and group.lengths is not None:
                    self.lengths[place + half * self.count].fill_(group.lengths[row])
        self.runs.append(run)
        return run

    def advance(self, paced: bool = False) -> None:
        """One step of all groups. Paced, or where one is watched, the host stays a step ahead of a GPU."""
        for run in self.runs:
            if run.done % WINDOW == 0:
                self._refill(run)
            if run.group.draws[run.done]:
                self._draw(run)
        with out_of_memory(f"a step of {self.count} images, latents {tuple(self.latents.shape[1:])}"):
            self.run()
        for run in self.runs:
            run.done += 1
        if self.latents.is_cuda and (paced or any(run.group.watch for run in self.runs)):
            if self._last_step is not None:
                self._last_step.synchronize()
            self._last_step = torch.cuda.Event()
            self._last_step.record(torch.cuda.current_stream(self.latents.device))

    def report(self, run: Run) -> Outcome | None:
        """Tell the group's watcher of the step; what came of the group if that was its end."""
        watch = run.group.watch
        if watch is not None and watch(run.done - 1, lambda: self._rows(self.x0, run)):
            return Outcome(self._rows(self.x0, run), True)
        return Outcome(self._rows(self.latents, run), False) if run.done == len(run.group.draws) else None

    def release(self, run: Run) -> None:
        """Free the group's slots, at its end or in the midst of it."""
        self.runs.remove(run)
        for place in run.places:
            self.step[place].fill_(WINDOW)

    def complete(self, group: Group) -> Outcome:
        """Run a group from its first step to its last."""
        run = self.admit(group)
        try:
            while True:
                self.advance()
                if (outcome := self.report(run)) is not None:
                    return outcome
        finally:
            self.release(run)

    def _refill(self, run: Run) -> None:
        """The tables of the next WINDOW steps."""
        biases = run.group.time_bias[run.done : run.done + WINDOW]
        kept = run.group.kept
        for place in run.places:
            if self.kept is not None and kept is not None:
                levels = kept.levels[run.done : run.done + WINDOW]
                self.kept.levels[place, : len(levels)] = levels
            if self.log_variances is not None and run.group.log_variances is not None:
                bounds = run.group.log_variances[run.done : run.done + WINDOW]
                self.log_variances[place, : len(bounds)] = bounds
            self.table[place, :WINDOW] = run.table[run.done : run.done + WINDOW]
            self.time_bias[place, : len(biases)] = biases
            self.step[place].zero_()

    def _draw(self, run: Run) -> None:
        """Unit noise of this step, each image's from its own generator."""
        shape, pinned = (1, *self.latents.shape[1:]), self.latents.is_cuda
        for place, generator in zip(run.places, run.group.generators, strict=True):
            # Pinned memory comes from a cache that knows when its copy is over.
            drawn = torch.randn(
                shape, generator=generator, dtype=torch.float32, device="cpu", pin_memory=pinned
            )
            self.noise[place].copy_(drawn[0], non_blocking=True)

    def _rows(self, tensor: Tensor, run: Run) -> Tensor:
        """The run's rows of a buffer, copied."""
        return torch.stack([tensor[place] for place in run.places])


class CachingSlots(Slots):
    """Slots of one group at a time, which runs the whole model at its first step and at every
    `whole_every`-th after it; at the others, `cached` on the deep features that the last whole one left.

    predict and cached take `deep`, of the shape given, as a keyword: one writes it, the other reads it.
    """

    def __init__(
        self,
        predict: Callable[..., Tensor],
        cached: Callable[..., Tensor],
        deep: tuple[int, ...],
        like: Group,
        count: int,
        guided: bool,
        dtype: torch.dtype,
    ) -> None:
        self.deep = torch.zeros(deep, dtype=dtype, device=like.latents.device)
        self.deep = self.deep.to(memory_format=torch.channels_last)
        super().__init__(partial(predict, deep=self.deep), like, count, guided, dtype)
        self.cached = copy.copy(self)  # the same buffers
        self.cached.predict = partial(cached, deep=self.deep)
        self.also = (self.cached,)

    def run(self) -> None:
        [run] = self.runs
        Work.run(self.cached if run.done % run.group.whole_every else self)
