"""Matrix products and convolutions with what follows them folded in."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastldm.ops.registry import op


@op
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias + residual; x [..., C], weight [K, C], bias [K], residual [..., K]."""
    x = F.linear(x, weight, bias)
    if residual is None:
        return x
    # Into the product: no third map. It is a view, though, and where autograd records, adding to one costs
    # copies of its gradient.
    return x + residual if x.requires_grad else x.add_(residual)


@op
def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """h · gelu(g) where [h, g] = x Wᵀ + bias, with the exact (erf) GELU. (Shazeer 2020, arXiv:2002.05202)

    x [..., C], weight [2K, C], bias [2K]; returns [..., K].
    """
    hidden, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return hidden * F.gelu(gate)


@op
def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolution + bias + residual; x [N, C, H, W], weight [K, C, h, w], residual [N, K, H', W']."""
    x = F.conv2d(x, weight, bias, stride, padding)
    return x if residual is None else x.add_(residual)
