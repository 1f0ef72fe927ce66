"""guided_step in one launch: guidance, update and the next input, each slot by its own row of its table."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fastldm.kernels.launch import TYPES, device_of, implement, kernel, on_device
from fastldm.kernels.overlap import after_the_kernel_in_front
from fastldm.kernels.tuned import beaten, choose
from fastldm.ops.raw import refuses_guided_step
from fastldm.ops.sampling import guided_step

# The columns of a sampler table from x0_x on, as `fastldm.ops.sampling` numbers them.
FIRST_COLUMN = tl.constexpr(1)
MOST_SLOTS = 65535  # what the second axis of a grid can count


@dataclass(frozen=True)
class Blocks:
    """Elements of a program, and its warps."""

    elements: int
    warps: int
    pdl: bool = False  # kernels/overlap.py


BLOCKS = Blocks(elements=512, warps=4)


def shape_of(latents: Tensor, out: Tensor) -> tuple[object, ...]:
    """What a call's line in the table of measurements goes by."""
    return out.dtype, *latents.shape, out.shape[0]


@kernel("rows", "columns", "slot_stride", "channels", "layouts")
def guided_step_kernel(
    latents,
    x0,
    model_input,
    out,
    noise,
    table,
    step,
    rows,
    columns,
    slot_stride,
    size,
    pixels,
    channels,
    layouts,
    GUIDED: tl.constexpr,
    COPIES: tl.constexpr,
    NOISY: tl.constexpr,
    MIXED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (block, slot). Where all tensors lie alike, an element is its place in memory; where MIXED,
    bit i of `layouts` says that the i-th of latents, x0, model_input, out and noise is channels-last.
    """
    after_the_kernel_in_front(PDL)
    slot = tl.program_id(1).to(tl.int64)
    slots = tl.num_programs(1).to(tl.int64)
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    first, turned = element, element
    if MIXED:
        turned = element % pixels * channels + element // pixels

    # A step outside the table reads nothing and gives NaN, as a check on the host would have to wait.
    row = tl.load(step + slot)
    known = (row >= 0) & (row < rows)
    coefficient = table + slot * slot_stride + row * columns + FIRST_COLUMN
    x0_x = tl.load(coefficient, mask=known, other=float("nan"))
    x0_out = tl.load(coefficient + 1, mask=known, other=float("nan"))
    next_x = tl.load(coefficient + 2, mask=known, other=float("nan"))
    next_x0 = tl.load(coefficient + 3, mask=known, other=float("nan"))
    next_prev = tl.load(coefficient + 4, mask=known, other=float("nan"))
    noise_scale = tl.load(coefficient + 5, mask=known, other=float("nan"))
    guidance = tl.load(coefficient + 6, mask=known, other=float("nan"))
    clamp = tl.load(coefficient + 7, mask=known, other=float("inf"))

    base = slot * size
    at_latents = latents + base + tl.where(layouts & 1 != 0, turned, first)
    at_x0 = x0 + base + tl.where(layouts & 2 != 0, turned, first)
    at_input = model_input + base + tl.where(layouts & 4 != 0, turned, first)
    at_out = out + base + tl.where(layouts & 8 != 0, turned, first)

    x = tl.load(at_latents, mask=inside)
    predicted = tl.load(at_out, mask=inside).to(tl.float32)
    if GUIDED:
        conditional = tl.load(at_out + slots * size, mask=inside).to(tl.float32)
        predicted += guidance * (conditional - predicted)
    clean = x0_x * x + x0_out * predicted
    clean = tl.clamp(clean, -clamp, clamp, propagate_nan=tl.PropagateNan.ALL)
    following = next_x * x + next_x0 * clean + next_prev * tl.load(at_x0, mask=inside)
    if NOISY:
        at_noise = noise + base + tl.where(layouts & 16 != 0, turned, first)
        following += noise_scale * tl.load(at_noise, mask=inside)
    tl.store(at_latents, following, mask=inside)
    tl.store(at_x0, clean, mask=inside)
    for copy in tl.static_range(COPIES):
        value = following.to(model_input.dtype.element_ty)
        tl.store(at_input + copy * slots * size, value, mask=inside)


def _run(
    latents: Tensor,
    x0: Tensor,
    model_input: Tensor,
    out: Tensor,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
) -> None:
    slots, channels, height, width = latents.shape
    size = channels * height * width
    images = [tensor for tensor in (latents, x0, model_input, out, noise) if tensor is not None]
    turned = [not tensor.is_contiguous() for tensor in images]
    mixed = len(set(turned)) == 2
    chosen = choose("guided_step", latents.device, shape_of(latents, out), BLOCKS)
    with device_of(latents):
        guided_step_kernel[(triton.cdiv(size, chosen.elements), slots)](
            latents,
            x0,
            model_input,
            out,
            latents if noise is None else noise,
            table,
            step,
            table.shape[1],
            table.shape[2],
            table.stride(0) if table.shape[0] > 1 else 0,
            size,
            height * width,
            channels,
            sum(bit << index for index, bit in enumerate(turned)) if mixed else 0,
            GUIDED=out.shape[0] != slots,
            COPIES=model_input.shape[0] // slots,
            NOISY=noise is not None,
            MIXED=mixed,
            BLOCK=chosen.elements,
            PDL=chosen.pdl,
            num_warps=chosen.warps,
        )


def _shape(*_: object) -> None:
    return None


def _refuses(
    latents: Tensor,
    x0: Tensor,
    model_input: Tensor,
    out: Tensor,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
) -> str | None:
    if why := on_device(latents, x0, model_input, out, noise, table, step):
        return why
    if latents.shape[0] > MOST_SLOTS:
        return f"there are more than {MOST_SLOTS} slots"
    call = latents, x0, model_input, out, noise, table, step
    why = refuses_guided_step(latents.device.type, TYPES, *call)
    return why or beaten("guided_step", latents.device, shape_of(latents, out))


guided_step.register("triton", _refuses)(
    implement(
        "triton_guided_step(Tensor(a!) latents, Tensor(b!) x0, Tensor(c!) model_input, Tensor out,"
        " Tensor? noise, Tensor table, Tensor step) -> ()",
        _run,
        _shape,
    )
)
