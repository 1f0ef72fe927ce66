"""attention on the CPU: flash attention on views of tokens, keys and values packed once a head."""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.ops.attention import attention
from fastldm.ops.cpp import extension
from fastldm.ops.cpp.extension import _C, TAGS, TYPES, direct, library
from fastldm.ops.raw import records

# Sets whose bfloat16 products come in pairs. The other kernels can imitate them, for the tests.
PAIRS = ("avx512_bf16",)

library.define(
    "cpp_attention(Tensor q, Tensor k, Tensor v, Tensor? key_lengths=None, bool causal=False) -> Tensor",
    tags=TAGS,
)


def _empty_result(q: Tensor) -> Tensor:
    """[rows, heads, L, d] as a view of tokens, so that merging the heads copies nothing."""
    rows, heads, queries, head_dim = q.shape
    return q.new_empty(rows, queries, heads, head_dim).transpose(1, 2)


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    row, head, token, _ = x.stride()
    return x.data_ptr(), row, head, token


@torch.library.impl(library, "cpp_attention", "CPU")
def _run_attention(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None = None, causal: bool = False
) -> Tensor:
    result = _empty_result(q)
    rows, heads, queries, head_dim = q.shape
    _C.attention(
        extension.ISA,
        _strides(result),
        _strides(q),
        _strides(k),
        _strides(v),
        TYPES[q.dtype],
        rows,
        heads,
        queries,
        k.shape[2],
        head_dim,
        0 if key_lengths is None else key_lengths.data_ptr(),
        causal,
        extension.ISA in PAIRS,
        torch.get_num_threads(),
    )
    return result


@torch.library.impl(library, "cpp_attention", "Meta")
def _shape_attention(q: Tensor, *_: object) -> Tensor:
    return _empty_result(q)


def _refuses_attention(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None = None, causal: bool = False
) -> str | None:
    if not (q.is_cpu and k.is_cpu and v.is_cpu):
        return "q, k or v is not on the CPU"
    if q.dtype not in TYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return "q, k and v are not all float32 or all bfloat16"
    if q.dim() != 4 or k.dim() != 4 or q.numel() == 0 or k.numel() == 0:
        return "q, k and v are not [rows, heads, tokens, head dim] with numbers in them"
    rows, heads, _, head_dim = q.shape
    if k.shape != v.shape or k.shape[:2] != (rows, heads) or k.shape[3] != head_dim:
        return "q, k and v differ in rows, heads or head dim, or k and v in tokens"
    if head_dim % 8 or head_dim > 512:
        return f"head dim {head_dim} is not a multiple of 8 up to 512"
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        return "the numbers of a head are not neighbours in memory"
    if key_lengths is not None and (
        not key_lengths.is_cpu
        or key_lengths.dtype != torch.int64
        or key_lengths.shape != (rows,)
        or not key_lengths.is_contiguous()
    ):
        return "key_lengths are not contiguous int64 [rows] on the CPU"
    if records(q, k, v):
        return "autograd records the call"
    return None


attention.register("cpp", _refuses_attention)(direct(_run_attention, torch.ops.fastldm.cpp_attention.default))
