"""group_norm_silu where autograd records it: the kernel of inference, and one for all its gradients.

x and the moments of its channels are kept, and nothing else of x's size: PyTorch keeps x + row_bias and the
norm before SiLU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastldm.ops.cpp import extension
from fastldm.ops.cpp.extension import _C, TAGS, TYPES, library, unwritten

Gradients = tuple[Tensor, Tensor, Tensor]

library.define(
    "cpp_group_norm_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor moments,"
    " int groups, float eps=1e-5, bool silu=True, Tensor? row_bias=None) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)


@torch.library.impl(library, "cpp_group_norm_silu_backward", "CPU")
def _run(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    moments: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    row_bias: Tensor | None = None,
) -> Gradients:
    """The gradients of x, [bias, weight] and row_bias, for x and grad alike in dense channels-last memory."""
    grad_x, grad_affine, grad_row_bias = _shape(grad, x)
    unwritten(grad_x)
    rows, channels, height, width = x.shape
    weight, bias = weight.float(), bias.float()
    if row_bias is not None:
        row_bias = row_bias.float().contiguous()
    _C.group_norm_silu_backward(
        extension.ISA,
        grad_x.data_ptr(),
        grad_affine.data_ptr(),
        grad_row_bias.data_ptr(),
        grad.data_ptr(),
        x.data_ptr(),
        TYPES[x.dtype],
        rows,
        height * width,
        channels,
        moments.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        0 if row_bias is None else row_bias.data_ptr(),
        groups,
        eps,
        silu,
        torch.get_num_threads(),
    )
    return grad_x, grad_affine, grad_row_bias


@torch.library.impl(library, "cpp_group_norm_silu_backward", "Meta")
def _shape(grad: Tensor, x: Tensor, *_: object) -> Gradients:
    rows, channels = x.shape[:2]
    affine, row_bias = ([size, channels] for size in (2, rows))
    return (
        torch.empty_like(x),
        torch.empty(affine, dtype=torch.float32, device=x.device),
        torch.empty(row_bias, dtype=torch.float32, device=x.device),
    )


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        silu: bool,
        row_bias: Tensor | None,
    ) -> Tensor:
        moments = torch.ops.fastldm.cpp_channel_moments.default(x)
        ctx.save_for_backward(x, weight, bias, row_bias, moments)
        ctx.call = groups, eps, silu
        kernel = torch.ops.fastldm.cpp_group_norm_silu.default
        return kernel(x, weight, bias, groups, eps, silu, row_bias, moments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, row_bias, moments = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        kernel = torch.ops.fastldm.cpp_group_norm_silu_backward.default
        grad_x, affine, rows = kernel(grad, x, weight, bias, moments, *ctx.call, row_bias)
        grad_bias, grad_weight = affine.to(weight.dtype)
        grad_row_bias = None if row_bias is None else rows.to(row_bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, grad_row_bias


def recorded(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, row_bias: Tensor | None
) -> Tensor:
    """As ops.group_norm_silu, with a gradient that cannot be differentiated again."""
    return _Recorded.apply(x, weight, bias, groups, eps, silu, row_bias)
