"""A run of which only some steps are guided: segments, one after the other, each a group of its own."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from fastldm.runtime.slots import Group, Outcome


def segments(group: Group, guided: range) -> Generator[Group, Outcome | None, Outcome]:
    """The group, of whose steps only those in `guided` have an unconditional half: yields it segment by
    segment, is sent each one's outcome, and returns that of the whole run.

    A segment starts from the latents and the x0 at which the one before it ended.
    """
    steps = len(group.draws)
    inner = {guided.start, guided.stop} if group.guided and guided else set()
    bounds = sorted({0, steps} | inner)
    outcome = None
    for start, stop in pairwise(bounds):
        part = group if (start, stop) == (0, steps) else _part(group, start, stop)
        if group.guided and start not in guided:
            part = _unguided(part)
        ended: list[Tensor] = []
        if stop < steps:
            part = replace(part, watch=_keep(part, stop - start, ended))
        outcome = yield part
        assert outcome is not None
        if outcome.stopped:
            break
        if stop < steps:
            group = replace(group, latents=outcome.latents, x0=ended[0])
    assert outcome is not None
    return outcome


def _part(group: Group, start: int, stop: int) -> Group:
    """The group's steps from `start` to before `stop`."""
    watch, kept, bounds = group.watch, group.kept, group.log_variances
    return replace(
        group,
        table=torch.cat((group.table[start:stop], group.table[-1:])),
        draws=group.draws[start:stop],
        time_bias=group.time_bias[start:stop],
        kept=None if kept is None else replace(kept, levels=kept.levels[start:stop]),
        log_variances=None if bounds is None else bounds[start:stop],
        watch=None if watch is None else lambda step, x0: watch(start + step, x0),
    )


def _unguided(group: Group) -> Group:
    """The group without its unconditional half."""
    count, lengths = len(group.latents), group.lengths
    return replace(group, context=group.context[count:], lengths=None if lengths is None else lengths[count:])


def _keep(group: Group, steps: int, ended: list[Tensor]) -> Callable[[int, Callable[[], Tensor]], bool]:
    """The group's watch, which also puts the last step's x0 into `ended`."""

    def watch(step: int, x0: Callable[[], Tensor]) -> bool:
        if step == steps - 1:
            ended.append(x0())
        return group.watch is not None and group.watch(step, x0)

    return watch
