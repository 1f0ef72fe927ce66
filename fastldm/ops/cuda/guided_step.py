"""guided_step on the GPU: guidance, update and the next input in one launch, with no synchronisation."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastldm.ops.cuda.extension import TAGS, TYPES, _cuda, library, stream
from fastldm.ops.raw import planes, refuses_guided_step
from fastldm.ops.sampling import guided_step

library.define(
    "cuda_guided_step(Tensor(a!) latents, Tensor(b!) x0, Tensor(c!) model_input, Tensor out, Tensor? noise,"
    " Tensor table, Tensor step) -> ()",
    tags=TAGS,
)


@torch.library.impl(library, "cuda_guided_step", "CUDA")
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
    with torch.cuda.device(latents.device):
        _cuda.guided_step(
            stream(latents),
            *described,
            TYPES[out.dtype],
            slots,
            channels,
            pixels,
            model_input.shape[0] != slots,
            out.shape[0] != slots,
            table.data_ptr(),
            table.stride(0) if table.shape[0] > 1 else 0,
            table.shape[1],
            table.shape[2],
            step.data_ptr(),
        )


@torch.library.impl(library, "cuda_guided_step", "Meta")
def _shape(*_: object) -> None:
    return None


guided_step.register("cuda", partial(refuses_guided_step, "cuda", TYPES))(
    torch.ops.fastldm.cuda_guided_step.default
)
