"""Scaled dot-product attention, for self- and cross-attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.ops.registry import op


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
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None)
