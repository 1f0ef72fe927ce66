"""guided_step on the CPU: guidance, update and the next input in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.ops.cpp.extension import _C, ISA, TAGS, TYPES, library, need_gradients
from fastldm.ops.sampling import CLAMP, guided_step

library.define(
    "cpp_guided_step(Tensor(a!) latents, Tensor(b!) x0, Tensor(c!) model_input, Tensor out, Tensor? noise,"
    " Tensor table, Tensor step) -> ()",
    tags=TAGS,
)


@torch.library.impl(library, "cpp_guided_step", "CPU")
def _run_guided_step(
    latents: Tensor,
    x0: Tensor,
    model_input: Tensor,
    out: Tensor,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
) -> None:
    slots, channels, height, width = latents.shape
    pixels, size = height * width, channels * height * width
    layouts = {
        tensor.is_contiguous() for tensor in (latents, x0, model_input, out, noise) if tensor is not None
    }
    if len(layouts) == 1:  # alike in memory: what an element means does not matter
        channels, pixels = 1, size

    def plane(tensor: Tensor) -> tuple[int, int, int, int]:
        apart = (pixels, 1) if len(layouts) == 1 or tensor.is_contiguous() else (1, channels)
        return tensor.data_ptr(), size, *apart

    _C.guided_step(
        ISA,
        plane(latents),
        plane(x0),
        plane(model_input),
        plane(out),
        None if noise is None else plane(noise),
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
def _shape_guided_step(*_: object) -> None:
    return None


def _refuses_guided_step(
    latents: Tensor,
    x0: Tensor,
    model_input: Tensor,
    out: Tensor,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
) -> str | None:
    tensors = (latents, x0, model_input, out) if noise is None else (latents, x0, model_input, out, noise)
    if not all(tensor.is_cpu for tensor in (*tensors, table, step)):
        return "a tensor is not on the CPU"
    if (
        latents.dtype != torch.float32
        or x0.dtype != torch.float32
        or (noise is not None and noise.dtype != torch.float32)
    ):
        return "latents, x0 and noise are not float32"
    if out.dtype not in TYPES or model_input.dtype != out.dtype:
        return "model_input and out are not both float32 or both bfloat16"
    if latents.dim() != 4 or latents.numel() == 0:
        return "latents are not [B, C, H, W]"
    slots, shape = latents.shape[0], latents.shape[1:]
    if x0.shape != latents.shape or (noise is not None and noise.shape != latents.shape):
        return "x0 or noise has not the shape of latents"
    for tensor in (model_input, out):
        if tensor.shape[1:] != shape or tensor.shape[0] not in (slots, 2 * slots):
            return "model_input or out is not [B or 2B, C, H, W]"
    for tensor in tensors:
        if not (tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)):
            return "a tensor is in neither contiguous nor channels-last memory"
    if (
        table.dtype != torch.float32
        or table.dim() != 3
        or table.shape[0] not in (1, slots)
        or table.shape[2] <= CLAMP
    ):
        return "table is not float32 [B or 1, rows, 9]"
    if (
        step.dtype != torch.int64
        or step.shape != (slots,)
        or not (table.is_contiguous() and step.is_contiguous())
    ):
        return "step is not int64 [B], or it or table is not contiguous"
    if torch.is_grad_enabled() and need_gradients(*tensors):
        return "autograd records the call"
    return None


guided_step.register("cpp", _refuses_guided_step)(torch.ops.fastldm.cpp_guided_step.default)
