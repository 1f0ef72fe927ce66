"""The backend `cpp`: the CPU kernels of csrc/cpu, float32 and bfloat16, on the widest instruction set here.

Importing this registers them, or raises BackendUnavailable where fastldm._C is missing. FASTLDM_CPU_ISA caps
the choice: plain, avx2, avx512 or avx512_bf16. The kernels have no backward, so the reference serves any call
that autograd records.
"""

from __future__ import annotations

import os

import torch  # before _C, which then shares torch's OpenMP runtime
from torch import Tensor

from fastldm.errors import BackendUnavailable, InvalidArgument
from fastldm.ops.norm import group_norm_silu
from fastldm.ops.sampling import CLAMP, guided_step

try:
    from fastldm import _C
except ImportError as error:
    raise BackendUnavailable(
        f"the compiled extension is missing ({error}); with a C++ compiler installed, "
        "`FASTLDM_BUILD=1 pip install` fastldm again, or read there why it does not build"
    ) from error

INSTRUCTION_SETS = ("plain", "avx2", "avx512", "avx512_bf16")
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def choose_isa(cap: str | None) -> str:
    """The widest instruction set that runs here, at most `cap`; InvalidArgument for an unknown cap."""
    if cap is None:
        return _C.isas()[-1]
    if cap not in INSTRUCTION_SETS:
        raise InvalidArgument("FASTLDM_CPU_ISA", cap, ", ".join(INSTRUCTION_SETS))
    allowed = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(cap) + 1]
    return [isa for isa in _C.isas() if isa in allowed][-1]


ISA = choose_isa(os.environ.get("FASTLDM_CPU_ISA") or None)

_library = torch.library.Library("fastldm", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def _need_gradients(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


_library.define(
    "cpp_group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps=1e-5, bool silu=True,"
    " Tensor? row_bias=None) -> Tensor",
    tags=_TAGS,
)


@torch.library.impl(_library, "cpp_group_norm_silu", "CPU")
def _run_group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    row_bias: Tensor | None = None,
) -> Tensor:
    result = torch.empty_like(x)
    rows, channels, height, width = x.shape
    _C.group_norm_silu(
        ISA,
        result.data_ptr(),
        x.data_ptr(),
        TYPES[x.dtype],
        rows,
        height * width,
        channels,
        weight.data_ptr(),
        bias.data_ptr(),
        TYPES[weight.dtype],
        None if row_bias is None else (row_bias.data_ptr(), TYPES[row_bias.dtype], row_bias.stride(0)),
        groups,
        eps,
        silu,
        torch.get_num_threads(),
    )
    return result


@torch.library.impl(_library, "cpp_group_norm_silu", "Meta")
def _shape_group_norm_silu(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _refuses_group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    row_bias: Tensor | None = None,
) -> str | None:
    if not x.is_cpu:
        return "x is not on the CPU"
    if x.dtype not in TYPES:
        return f"x is {x.dtype}, not float32 or bfloat16"
    if x.dim() != 4 or x.numel() == 0 or not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not [N, C, H, W] in channels-last memory"
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        return f"{channels} channels do not form {groups} groups"
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
    if torch.is_grad_enabled() and _need_gradients(x, weight, bias, row_bias):
        return "autograd records the call"
    return None


group_norm_silu.register("cpp", _refuses_group_norm_silu)(torch.ops.fastldm.cpp_group_norm_silu.default)


_library.define(
    "cpp_guided_step(Tensor(a!) latents, Tensor(b!) x0, Tensor(c!) model_input, Tensor out, Tensor? noise,"
    " Tensor table, Tensor step) -> ()",
    tags=_TAGS,
)


@torch.library.impl(_library, "cpp_guided_step", "CPU")
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


@torch.library.impl(_library, "cpp_guided_step", "Meta")
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
    if torch.is_grad_enabled() and _need_gradients(*tensors):
        return "autograd records the call"
    return None


guided_step.register("cpp", _refuses_guided_step)(torch.ops.fastldm.cpp_guided_step.default)
