"""Normalisation: group norm with SiLU and per-row bias, the moments it is made of, layer norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.ops.registry import op


@op
def channel_moments(x: Tensor) -> Tensor:
    """Mean and variance of each channel over the pixels: x [N, C, H, W] → [N, 2, C], at least float32."""
    pixels = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
    mean = pixels.mean(2, keepdim=True)
    variance = (pixels - mean).square_().mean(2)  # a sixth of the time of torch.var_mean
    return torch.stack((mean.squeeze(2), variance), 1)


@op
def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    row_bias: Tensor | None = None,
    moments: Tensor | None = None,
) -> Tensor:
    """silu(group_norm(x + row_bias)): one pass where a ResBlock has a time bias, a norm and an activation.

    x [N, C, H, W]; weight, bias [C]; row_bias [N, C] is added before the statistics are taken. They are x's
    own, or come from `moments` [N, 2, C], the `channel_moments` of a map of which x may be a part. Output has
    x's dtype and layout. (Wu & He 2018, arXiv:1803.08494; Elfwing et al. 2017, arXiv:1702.03118)
    """
    if moments is not None:
        return _normalised(x, weight, bias, groups, eps, silu, row_bias, moments)
    if row_bias is not None:
        x = x + row_bias[:, :, None, None]
    x = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(x) if silu else x


def _normalised(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    row_bias: Tensor | None,
    moments: Tensor,
) -> Tensor:
    """A group's variance is the mean of its channels' own and of the squared distances of their means from
    the group's. (Chan, Golub & LeVeque 1979, STAN-CS-79-773)
    """
    means, variances = moments.unflatten(2, (groups, -1)).unbind(1)  # [N, groups, C / groups]
    added = torch.zeros_like(means) if row_bias is None else row_bias.to(means.dtype).view_as(means)
    mean = (means + added).mean(2, keepdim=True)
    variance = (variances + (means + added - mean).square()).mean(2, keepdim=True)
    scale = weight.view(groups, -1) * (variance + eps).rsqrt()
    shift = bias.view(groups, -1) + (added - mean) * scale
    scale, shift = (each.flatten(1)[:, :, None, None] for each in (scale, shift))
    result = torch.addcmul(shift, x, scale)
    return (F.silu(result, inplace=True) if silu else result).to(x.dtype)


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


__all__ = ["channel_moments", "group_norm_silu", "layer_norm"]
