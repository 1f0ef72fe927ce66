"""The sampling loop: static buffers, one step function, nothing read back from the device."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastldm import ops

Predict = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Slots:
    """What B images carry from step to step. Rows of the model's batch: B, or 2B when guided, unconditional
    half first.
    """

    latents: Tensor  # float32 [B, C, H, W], variance-preserving
    x0: Tensor  # float32 [B, C, H, W]: what the last step took the clean latents to be
    model_input: Tensor  # [rows, C, H, W] in the model's dtype
    table: Tensor  # float32 [1, steps + 1, columns]
    step: Tensor  # int64 [B], an index into the table

    @classmethod
    def of(cls, latents: Tensor, table: Tensor, guided: bool, dtype: torch.dtype) -> Slots:
        """Slots that start from these latents at the first row of this table [steps + 1, columns]."""
        latents = latents.float().contiguous(memory_format=torch.channels_last).clone()
        model_input = latents.repeat(2 if guided else 1, 1, 1, 1).to(dtype, memory_format=torch.channels_last)
        step = torch.zeros(len(latents), dtype=torch.long, device=latents.device)
        return cls(latents, torch.zeros_like(latents), model_input, table[None], step)


def advance(slots: Slots, predict: Predict, noise: Tensor | None) -> None:
    """One step of every slot: model, guidance, update, next input."""
    rows = slots.step.repeat(slots.model_input.shape[0] // slots.step.shape[0])
    out = predict(slots.model_input, rows)
    ops.guided_step(slots.latents, slots.x0, slots.model_input, out, noise, slots.table, slots.step)
    slots.step += 1


def denoise(
    slots: Slots, predict: Predict, draws: tuple[bool, ...], noise: Callable[[], Tensor]
) -> Generator[Tensor, None, None]:
    """Run the steps, yielding x₀ [B, C, H, W] (overwritten by the next step) after each; `noise()` where a
    step draws.

    predict(model_input, step [rows]) is the model with its condition bound. Closing the generator stops
    between two steps.
    """
    for draw in draws:
        advance(slots, predict, noise() if draw else None)
        yield slots.x0
