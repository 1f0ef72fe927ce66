"""What stand-ins on raw pointers share: which calls they take, and how they see the tensors of a call."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from fastldm.ops.sampling import CLAMP

DEVICES = {"cpu": "the CPU", "cuda": "a CUDA device"}
Plane = tuple[int, int, int, int]  # address, then elements between slots, channels and pixels


def named(types: Collection[torch.dtype]) -> str:
    """ "float32 or bfloat16"."""
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in types)


def on_cpu(*tensors: Tensor | None) -> bool:
    """Whether all of a call's tensors are there, whose addresses a kernel is given."""
    return all(tensor is None or tensor.is_cpu for tensor in tensors)


def records(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call with these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def refuses_group_norm_silu(
    device: str,
    types: Collection[torch.dtype],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    row_bias: Tensor | None,
    moments: Tensor | None = None,
) -> str | None:
    """Why a kernel on dense channels-last memory cannot take the call, or None."""
    if x.device.type != device:
        return f"x is not on {DEVICES[device]}"
    if x.dtype not in types:
        return f"x is {x.dtype}, not {named(types)}"
    if x.dim() != 4 or x.numel() == 0 or not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not [N, C, H, W] in channels-last memory"
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        return f"{channels} channels do not form {groups} groups"
    for tensor in (weight, bias) if row_bias is None else (weight, bias, row_bias):
        if tensor.device != x.device:
            return "weight, bias or row_bias is not where x is"
    if weight.dtype not in (x.dtype, torch.float32) or bias.dtype != weight.dtype:
        return "weight and bias have neither x's dtype nor float32"
    if (
        weight.shape != (channels,)
        or bias.shape != (channels,)
        or weight.stride(0) != 1
        or bias.stride(0) != 1
    ):
        return "weight or bias is not contiguous"
    if row_bias is not None:
        if row_bias.dtype not in (x.dtype, torch.float32):
            return "row_bias has neither x's dtype nor float32"
        if row_bias.shape != x.shape[:2] or row_bias.stride(1) != 1:
            return "row_bias is not [N, C] with neighbouring channels"
    if moments is not None and (
        moments.device != x.device
        or moments.dtype != torch.float32
        or moments.shape != (x.shape[0], 2, channels)
        or not moments.is_contiguous()
    ):
        return "moments is not a contiguous float32 [N, 2, C] where x is"
    return None


def refuses_guided_step(
    device: str,
    types: Collection[torch.dtype],
    latents: Tensor,
    x0: Tensor,
    model_input: Tensor,
    out: Tensor,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
) -> str | None:
    """Why a kernel on float32 latents and dense memory cannot take the call, or None."""
    tensors = (latents, x0, model_input, out) if noise is None else (latents, x0, model_input, out, noise)
    if latents.device.type != device or any(t.device != latents.device for t in (*tensors, table, step)):
        return f"a tensor is not on {DEVICES[device]}"
    if (
        latents.dtype != torch.float32
        or x0.dtype != torch.float32
        or (noise is not None and noise.dtype != torch.float32)
    ):
        return "latents, x0 and noise are not float32"
    if out.dtype not in types or model_input.dtype != out.dtype:
        return f"model_input and out are not alike in {named(types)}"
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
    if records(*tensors):
        return "autograd records the call"
    return None


def planes(
    latents: Tensor, x0: Tensor, model_input: Tensor, out: Tensor, noise: Tensor | None
) -> tuple[int, int, tuple[Plane, Plane, Plane, Plane, Plane | None]]:
    """Channels, pixels and the planes of a guided step; tensors alike in memory count as one channel."""
    tensors = (latents, x0, model_input, out) if noise is None else (latents, x0, model_input, out, noise)
    channels, height, width = latents.shape[1:]
    pixels, size = height * width, channels * height * width
    alike = len({tensor.is_contiguous() for tensor in tensors}) == 1

    def plane(tensor: Tensor) -> Plane:
        apart = (pixels, 1) if alike or tensor.is_contiguous() else (1, channels)
        return tensor.data_ptr(), size, *apart

    described = plane(latents), plane(x0), plane(model_input), plane(out)
    shape = (1, size) if alike else (channels, pixels)
    return *shape, (*described, None if noise is None else plane(noise))
