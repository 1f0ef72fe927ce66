"""Scaled dot-product attention, for self- and cross-attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.ops.raw import records
from fastldm.ops.registry import op

FEW_KEYS = 256


def _trains_on_few_keys(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether autograd records a bfloat16 call on a CPU with so few keys that keeping the scores is
    faster than PyTorch's backward of SDPA, which makes them anew.
    """
    return records(q, k, v) and q.is_cpu and q.dtype == torch.bfloat16 and k.shape[2] <= FEW_KEYS


@op
def attention(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None = None, causal: bool = False
) -> Tensor:
    """softmax(q kᵀ / √d) v, row by row and head by head. (Vaswani et al. 2017, arXiv:1706.03762)

    q [rows, heads, L, d]; k, v [rows, heads, S, d]; key_lengths int [rows]: keys at and after it are not
    seen; causal: query i sees keys up to i. Returns [rows, heads, L, d].
    """
    mask = None
    if key_lengths is not None:
        mask = torch.arange(k.shape[2], device=k.device) < key_lengths[:, None, None, None]
        if causal:
            mask = mask & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=k.device).tril()
    elif not causal and _trains_on_few_keys(q, k, v):
        with torch.autocast("cpu", enabled=False):
            weights = (q.float() * q.shape[-1] ** -0.5 @ k.float().transpose(2, 3)).softmax(dim=-1)
            return weights.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None)
