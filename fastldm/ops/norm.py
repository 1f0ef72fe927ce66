"""Normalisation: group norm with SiLU and per-row bias, layer norm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastldm.ops.registry import op


@op
def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    row_bias: Tensor | None = None,
) -> Tensor:
    """silu(group_norm(x + row_bias)): one pass where a ResBlock has a time bias, a norm and an activation.

    x [N, C, H, W]; weight, bias [C]; row_bias [N, C] is added before the statistics are taken. Output has
    x's dtype and layout. (Wu & He 2018, arXiv:1803.08494; Elfwing et al. 2017, arXiv:1702.03118)
    """
    if row_bias is not None:
        x = x + row_bias[:, :, None, None]
    x = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(x) if silu else x


@op
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """layer_norm(x) · (1 + scale) + shift over the last axis; the modulation is that of DiT's adaptive norm.

    x [..., C]; weight, bias [C]; scale, shift [N, C], for which x is [N, L, C].
    (Ba et al. 2016, arXiv:1607.06450; Peebles & Xie 2022, arXiv:2212.09748)
    """
    x = F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    if scale is not None:
        x = x * (1 + scale[:, None])
    return x if shift is None else x + shift[:, None]


__all__ = ["group_norm_silu", "layer_norm"]
