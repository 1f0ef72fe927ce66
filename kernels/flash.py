"""The parts that the attention kernels are made of."""

from __future__ import annotations

import triton
import triton.language as tl

ALIGNED = 8  # elements: 16 bytes of the half types
UNIT = tl.constexpr(ALIGNED)  # strides are passed in such units, so that Triton knows of it


@triton.jit
def tile(base, stride, row, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows `row` of a matrix, columns FIRST … FIRST + WIDTH; 0 for what is not there."""
    column = FIRST + tl.arange(0, WIDTH)
    known = inside[:, None] & (column < HEAD_DIM)[None, :]
    return tl.load(base + row[:, None] * stride + column[None, :], mask=known, other=0.0)


@triton.jit
def put(base, stride, row, inside, value, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store where `tile` reads."""
    column = FIRST + tl.arange(0, WIDTH)
    known = inside[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(base + row[:, None] * stride + column[None, :], value.to(base.dtype.element_ty), mask=known)


@triton.jit
def dot(a, b, c):
    """c + a b; float32 in full precision."""
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def start_of(pointer, row, head, row_units, head_units):
    """Where a head of a row begins."""
    return pointer + (row.to(tl.int64) * row_units + head.to(tl.int64) * head_units) * UNIT


@triton.jit
def visible_keys(lengths, row, keys, HAS_LENGTHS: tl.constexpr):
    """How many keys this row has."""
    if HAS_LENGTHS:
        keys = tl.maximum(tl.minimum(tl.load(lengths + row), keys), 0).to(tl.int32)
    return keys


@triton.jit
def softmax_step(scores, scale, most, total):
    """Scores of one tile → weights, what older sums are worth, the new maximum, the new total.

    A query that saw no key yet has the maximum −inf: 0 in its place makes zeros of it, and no NaN.
    """
    following = tl.maximum(most, tl.max(scores, axis=1) * scale)
    base = tl.where(following == float("-inf"), 0.0, following)
    weights = tl.exp2(scores * scale - base[:, None])
    fade = tl.exp2(most - base)
    return weights, fade, following, total * fade + tl.sum(weights, axis=1)


@triton.jit
def reciprocal(total):
    """1 / total; 1 where there was no key, as the sums are zero there, and so the output, as in PyTorch."""
    return (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]


@triton.jit
def scores_of(
    q,
    q2,
    k,
    k_stride,
    query,
    key,
    offset,
    limit,
    HEAD_DIM: tl.constexpr,
    PIECE: tl.constexpr,
    PIECE2: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """q kᵀ for one tile of keys; MASKED: some of them lie after `limit`, or CAUSAL after a query."""
    seen = key < limit
    scores = tl.zeros((query.shape[0], key.shape[0]), tl.float32)
    scores = dot(q, tl.trans(tile(k, k_stride, offset, seen, 0, PIECE, HEAD_DIM)), scores)
    if PIECE2 > 0:
        scores = dot(q2, tl.trans(tile(k, k_stride, offset, seen, PIECE, PIECE2, HEAD_DIM)), scores)
    if MASKED:
        visible = seen[None, :]
        if CAUSAL:
            visible = visible & (key[None, :] <= query[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def walk(
    sums,
    sums2,
    most,
    total,
    q,
    q2,
    k,
    v,
    k_stride,
    v_stride,
    query,
    begin,
    end,
    limit,
    scale,
    HEAD_DIM: tl.constexpr,
    PIECE: tl.constexpr,
    PIECE2: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Go on with the keys begin … end."""
    offset = tl.arange(0, KEYS)
    for start in range(begin, end, KEYS):
        key, wide = start + offset, tl.cast(start, tl.int64)
        k_tile, v_tile = k + wide * k_stride, v + wide * v_stride
        scores = scores_of(
            q, q2, k_tile, k_stride, query, key, offset, limit, HEAD_DIM, PIECE, PIECE2, MASKED, CAUSAL
        )
        weights, fade, most, total = softmax_step(scores, scale, most, total)
        weights, seen = weights.to(q.dtype), key < limit
        value = tile(v_tile, v_stride, offset, seen, 0, PIECE, HEAD_DIM)
        sums = dot(weights, value, sums * fade[:, None])
        if PIECE2 > 0:
            value = tile(v_tile, v_stride, offset, seen, PIECE, PIECE2, HEAD_DIM)
            sums2 = dot(weights, value, sums2 * fade[:, None])
    return sums, sums2, most, total
