"""guided_step on the CPU: guidance, update and the next input in one pass over memory."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastldm.ops.cpp import extension
from fastldm.ops.cpp.extension import _C, TAGS, TYPES, library
from fastldm.ops.raw import planes, refuses_guided_step
from fastldm.ops.sampling import guided_step

library.define(
    "cpp_guided_step(Tensor(a!) latents, Tensor(b!) x0, Tensor(c!) model_input, Tensor out, Tensor? noise,"
    " Tensor table, Tensor step) -> ()",
    tags=TAGS,
)


@torch.library.impl(library, "cpp_guided_step", "CPU")
def _run(
    latents: Tensor,
    x0: Tensor,
    model_input: Tensor,
    out: Tensor,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
) -> None:
    slots = latents.shape[0]
    channels, pixels, described = planes(latents, x0, model_input, out, noise)
    _C.guided_step(
        extension.ISA,
        *described,
        TYPES[out.dtype],
        slots,
        channels,
        pixels,
        model_input.shape[0] // slots,
        out.shape[0] != slots,
        table.data_ptr(),
        table.stride(0) if table.shape[0] > 1 else 0,
        table.shape[1],
        table.shape[2],
        step.data_ptr(),
        torch.get_num_threads(),
    )


@torch.library.impl(library, "cpp_guided_step", "Meta")
def _shape(*_: object) -> None:
    return None


guided_step.register("cpp", partial(refuses_guided_step, "cpu", TYPES))(
    torch.ops.fastldm.cpp_guided_step.default
)
