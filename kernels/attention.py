"""Flash attention: one pass over the keys for each block of queries; up to 128 keys in one tile.

The head dim is cut into power-of-two pieces of 16 columns or more (40 = 32 + 16 with 8 of them masked,
80 = 64 + 16, 160 = 128 + 32), since a padded one would cost up to 1.6 times the work; 112 is one of 128. A
dim of 512 is walked in pieces of 128 for the scores, and a program makes 256 columns of the output.
(Dao et al. 2022, arXiv:2205.14135; Milakov & Gimelshein 2018, arXiv:1805.02867)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastldm.kernels.flash import (
    ALIGNED,
    UNIT,
    dot,
    put,
    reciprocal,
    scores_of,
    softmax_step,
    start_of,
    tile,
    visible_keys,
    walk,
)
from fastldm.kernels.launch import INTERPRETED, TYPES, device_of, implement, kernel, on_device
from fastldm.kernels.overlap import after_the_kernel_in_front
from fastldm.kernels.tuned import beaten, choose
from fastldm.ops.attention import attention
from fastldm.ops.raw import records

# Head dim → (columns of the first piece, of the second, or 0).
PIECES = {
    32: (32, 0),
    40: (32, 16),
    64: (64, 0),
    80: (64, 16),
    96: (64, 32),
    112: (128, 0),
    128: (128, 0),
    160: (128, 32),
}
WIDE, WIDE_PIECE, WIDE_OUTPUT = 512, 128, 256
ONE_TILE = 128  # keys
# Rows, heads and tokens begin at multiples of 16 bytes anyhow, and that is all the code could use.
STRIDES = [f"{each}_{of}" for each in ("out", "q", "k", "v") for of in ("row", "head", "token")]
# No tensor core multiplies float32 in full precision, so it is left to PyTorch; the interpreter checks it.
SERVED = TYPES if INTERPRETED else (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Blocks:
    """Queries of a program, keys of a tile."""

    queries: int
    keys: int
    warps: int
    stages: int
    pdl: bool = False  # kernels/overlap.py


def blocks(head_dim: int, keys: int, causal: bool = False) -> Blocks:
    """By head dim, so that nothing spills on sm_80, sm_90 and sm_100."""
    if head_dim == WIDE:
        return Blocks(64, 32, 8, 1)
    if keys <= ONE_TILE and head_dim <= 128:
        return Blocks(64, max(16, triton.next_power_of_2(keys)), 4, 1)
    if head_dim > 128 and keys <= ONE_TILE:
        return Blocks(64, 32, 8, 1)
    if head_dim > 80:
        return Blocks(128 if head_dim <= 128 else 64, 32, 8, 2)
    return Blocks(128, 64, 8, 3 if head_dim <= 64 and not causal else 2)


def shape_of(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None = None, causal: bool = False
) -> tuple[object, ...]:
    """What a call's line in the table of measurements goes by."""
    kind = (["lengths"] if key_lengths is not None else []) + (["causal"] if causal else [])
    return q.dtype, *q.shape[:3], k.shape[2], q.shape[3], *kind


@kernel("queries", *STRIDES)
def attention_kernel(
    out,
    q,
    k,
    v,
    lengths,
    queries,
    keys,
    out_row,
    out_head,
    out_token,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    scale,
    HEAD_DIM: tl.constexpr,
    PIECE: tl.constexpr,
    PIECE2: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    CAUSAL: tl.constexpr,
    ONE_TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (block of queries, head, row); strides in units of 8 elements."""
    after_the_kernel_in_front(PDL)
    head, row = tl.program_id(1), tl.program_id(2)
    first = tl.program_id(0) * QUERIES
    within = tl.arange(0, QUERIES)
    query = first + within
    inside = query < queries
    limit = visible_keys(lengths, row, keys, HAS_LENGTHS)

    q_stride, k_stride, v_stride, out_stride = (
        q_token * UNIT,
        k_token * UNIT,
        v_token * UNIT,
        out_token * UNIT,
    )
    q = start_of(q, row, head, q_row, q_head) + first.to(tl.int64) * q_stride
    k, v = start_of(k, row, head, k_row, k_head), start_of(v, row, head, v_row, v_head)
    out = start_of(out, row, head, out_row, out_head) + first.to(tl.int64) * out_stride
    q1 = tile(q, q_stride, within, inside, 0, PIECE, HEAD_DIM)
    q2 = q1
    if PIECE2 > 0:
        q2 = tile(q, q_stride, within, inside, PIECE, PIECE2, HEAD_DIM)

    if ONE_TILE:
        key = tl.arange(0, KEYS)
        scores = scores_of(q1, q2, k, k_stride, query, key, key, limit, HEAD_DIM, PIECE, PIECE2, True, CAUSAL)
        most = tl.max(scores, axis=1)
        most = tl.where(most == float("-inf"), 0.0, most)
        weights = tl.exp2((scores - most[:, None]) * scale)
        share = reciprocal(tl.sum(weights, axis=1))
        weights, seen = weights.to(q1.dtype), key < limit
        value = tile(v, v_stride, key, seen, 0, PIECE, HEAD_DIM)
        sums = tl.dot(weights, value, input_precision="ieee")
        put(out, out_stride, within, inside, sums * share, 0, PIECE, HEAD_DIM)
        if PIECE2 > 0:
            value = tile(v, v_stride, key, seen, PIECE, PIECE2, HEAD_DIM)
            sums = tl.dot(weights, value, input_precision="ieee")
            put(out, out_stride, within, inside, sums * share, PIECE, PIECE2, HEAD_DIM)
    else:
        sums = tl.zeros((QUERIES, PIECE), tl.float32)
        sums2 = tl.zeros((QUERIES, PIECE2 if PIECE2 > 0 else 1), tl.float32)
        most = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        end, whole = limit, limit // KEYS * KEYS
        if CAUSAL:
            end = tl.minimum(limit, first + QUERIES)
            whole = tl.minimum(limit, first + 1) // KEYS * KEYS
        sums, sums2, most, total = walk(
            sums, sums2, most, total, q1, q2, k, v, k_stride, v_stride, query, 0, whole, limit, scale,
            HEAD_DIM, PIECE, PIECE2, KEYS, False, CAUSAL,
        )  # fmt: skip
        sums, sums2, most, total = walk(
            sums, sums2, most, total, q1, q2, k, v, k_stride, v_stride, query, whole, end, limit, scale,
            HEAD_DIM, PIECE, PIECE2, KEYS, True, CAUSAL,
        )  # fmt: skip
        share = reciprocal(total)
        put(out, out_stride, within, inside, sums * share, 0, PIECE, HEAD_DIM)
        if PIECE2 > 0:
            put(out, out_stride, within, inside, sums2 * share, PIECE, PIECE2, HEAD_DIM)


@kernel("queries", *STRIDES)
def wide_kernel(
    out,
    q,
    k,
    v,
    lengths,
    queries,
    keys,
    out_row,
    out_head,
    out_token,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    scale,
    HEAD_DIM: tl.constexpr,
    PIECE: tl.constexpr,
    OUTPUT: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (block of queries and part of the output, head, row): all scores, OUTPUT columns."""
    after_the_kernel_in_front(PDL)
    head, row = tl.program_id(1), tl.program_id(2)
    part = tl.program_id(0) % (HEAD_DIM // OUTPUT) * OUTPUT
    first = tl.program_id(0) // (HEAD_DIM // OUTPUT) * QUERIES
    within, offset = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    query = first + within
    inside = query < queries
    limit = visible_keys(lengths, row, keys, HAS_LENGTHS)

    q_stride, k_stride, v_stride, out_stride = (
        q_token * UNIT,
        k_token * UNIT,
        v_token * UNIT,
        out_token * UNIT,
    )
    q = start_of(q, row, head, q_row, q_head) + first.to(tl.int64) * q_stride
    k, v = start_of(k, row, head, k_row, k_head), start_of(v, row, head, v_row, v_head) + part
    out = start_of(out, row, head, out_row, out_head) + first.to(tl.int64) * out_stride + part
    sums = tl.zeros((QUERIES, OUTPUT), tl.float32)
    most = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    end = tl.minimum(limit, first + QUERIES) if CAUSAL else limit
    for start in range(0, end, KEYS):
        key, wide = start + offset, tl.cast(start, tl.int64)
        k_tile, seen = k + wide * k_stride, key < limit
        scores = tl.zeros((QUERIES, KEYS), tl.float32)
        for column in tl.static_range(0, HEAD_DIM, PIECE):
            q_piece = tile(q, q_stride, within, inside, column, PIECE, HEAD_DIM)
            scores = dot(
                q_piece, tl.trans(tile(k_tile, k_stride, offset, seen, column, PIECE, HEAD_DIM)), scores
            )
        visible = seen[None, :]
        if CAUSAL:
            visible = visible & (key[None, :] <= query[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        weights, fade, most, total = softmax_step(scores, scale, most, total)
        value = tile(v + wide * v_stride, v_stride, offset, seen, 0, OUTPUT, OUTPUT)
        sums = dot(weights.to(value.dtype), value, sums * fade[:, None])
    put(out, out_stride, within, inside, sums * reciprocal(total), 0, OUTPUT, OUTPUT)


def _run(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None = None, causal: bool = False) -> Tensor:
    rows, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    shape = shape_of(q, k, v, key_lengths, causal)
    chosen = choose("attention", q.device, shape, blocks(head_dim, keys, causal))
    out = _shape(q)
    grid = triton.cdiv(queries, chosen.queries), heads, rows
    strides = [stride // ALIGNED for each in (out, q, k, v) for stride in each.stride()[:3]]
    # 2^x costs less than e^x.
    scale = math.log2(math.e) / math.sqrt(head_dim)
    arguments = out, q, k, v, q if key_lengths is None else key_lengths, queries, keys, *strides, scale
    options = {
        "HEAD_DIM": head_dim,
        "QUERIES": chosen.queries,
        "KEYS": chosen.keys,
        "HAS_LENGTHS": key_lengths is not None,
        "CAUSAL": causal,
        "PDL": chosen.pdl,
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
    }
    with device_of(q):
        if head_dim == WIDE:
            grid = grid[0] * (WIDE // WIDE_OUTPUT), heads, rows
            wide_kernel[grid](*arguments, PIECE=WIDE_PIECE, OUTPUT=WIDE_OUTPUT, **options)
        else:
            piece, piece2 = PIECES[head_dim]
            one_tile = keys <= chosen.keys and head_dim <= 128
            attention_kernel[grid](*arguments, PIECE=piece, PIECE2=piece2, ONE_TILE=one_tile, **options)
    return out


def _shape(q: Tensor, *_: object) -> Tensor:
    """[rows, heads, L, d] in memory [rows, L, heads, d]: the projection that follows reads whole tokens."""
    rows, heads, queries, head_dim = q.shape
    return q.new_empty(rows, queries, heads, head_dim).transpose(1, 2)


def _refuses(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None = None, causal: bool = False
) -> str | None:
    if why := on_device(q, k, v, key_lengths):
        return why
    if q.dtype not in SERVED or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k and v are not all of one type of {SERVED}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2]:
        return "q, k and v are not [rows, heads, L or S, d]"
    if q.numel() == 0 or k.numel() == 0 or max(q.shape[:2]) > 65535 or max(q.shape[2], k.shape[2]) >= 2**30:
        return "a tensor is empty, or has more than 65535 rows or heads, or 2^30 tokens"
    if k.shape[3] != q.shape[3] or (q.shape[3] not in PIECES and q.shape[3] != WIDE):
        return f"the head dim is none of {', '.join(map(str, [*PIECES, WIDE]))}"
    for tensor in (q, k, v):
        if tensor.stride(3) != 1:
            return "the columns of a head are not neighbours"
        if any(stride % ALIGNED for stride in tensor.stride()[:3]):
            return f"a stride is no multiple of {ALIGNED} elements"
    if key_lengths is not None:
        if key_lengths.dtype not in (torch.int32, torch.int64) or key_lengths.shape != q.shape[:1]:
            return "key_lengths are not int32 or int64 [rows]"
        if not key_lengths.is_contiguous():
            return "key_lengths are not contiguous"
    if records(q, k, v):
        return "autograd records the call"
    return beaten("attention", q.device, shape_of(q, k, v, key_lengths, causal))


attention.register("triton", _refuses)(
    implement(
        "triton_attention(Tensor q, Tensor k, Tensor v, Tensor? key_lengths=None, bool causal=False)"
        " -> Tensor",
        _run,
        _shape,
    )
)
