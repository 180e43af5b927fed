"""Attention of many queries: window, meta tokens and packed documents, grouped queries, forward and backward.

FlashAttention-2 (Dao, arXiv 2307.08691) over keys that say themselves where they stand: `visibility.visible` is
evaluated on positions, so a ring, a span and new tokens need no kernels of their own. Keys from several places are
joined first: a copy of what a call reads anyway, less than a hundredth of its time.

Math, over the keys that a query sees, and backwards with d = sum(do o):

    p = exp(scale q k - lse)     o = p v     dv = p^T do     ds = p (do v^T - d)     dq = scale ds k     dk = scale ds^T
    q

Tiling: the forward pass and dq take BM queries of one head against blocks of BN keys, dk and dv the other way round,
looping over the query heads of a group. `_ranges_kernel` finds first, from the smallest and largest position and
document of every block, which blocks a program must touch: the blocks of meta tokens, then one range, of which a middle
part is seen by all queries and goes without a mask. What lies outside of it is never read.

float32: scores, softmax, accumulators, log-sum-exp, and d. Products of matrices are in the type of the inputs; for
float32 inputs without TF32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.gpu.common import INTERPRET, library_op, rows_contiguous
from hymba.visibility import EMPTY

LOG2E = tl.constexpr(1.4426950408889634)
NOWHERE = tl.constexpr(EMPTY)
# the document of keys that every document sees
SHARED = tl.constexpr(-1)
SHARED_BY_ALL = -1
NO_WINDOW = 2**30
BLOCK = 16 if INTERPRET else 64  # queries and keys in a block of the ranges


@triton.jit
def _bounds_kernel(positions, documents, bounds, S, p_row, d_row, blocks, BLOCK: tl.constexpr, DOCUMENTS: tl.constexpr):
    """bounds: (rows, blocks, 4) least and greatest position, least and greatest document; a part of a block: EMPTY"""
    row, block = tl.program_id(1), tl.program_id(0)
    s = block * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(positions + row * p_row + s, mask=s < S, other=NOWHERE)
    at = bounds + (row * blocks + block) * 4
    tl.store(at, tl.min(p, axis=0))
    tl.store(at + 1, tl.max(p, axis=0))
    if DOCUMENTS:
        last = tl.load(documents + row * d_row + tl.minimum(s, S - 1))
        tl.store(at + 2, tl.min(last, axis=0))
        tl.store(at + 3, tl.max(last, axis=0))


@triton.jit
def _ranges_kernel(
    mine, theirs, ranges, n_mine, n_theirs, split, window, n_meta, mine_row, theirs_row,
    PADDED: tl.constexpr, KEYS: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """For a block of queries (of keys, if KEYS): which blocks of the other kind see it.

    ranges: (rows, n_mine, 5): how many of the first `split` blocks, and of the others the first, the first full one,
    the end of those, the end
    """
    block, row = tl.program_id(0), tl.program_id(1)
    at = mine + (row * mine_row + block) * 4
    j = tl.arange(0, PADDED)
    others = theirs + (row * theirs_row + tl.minimum(j, n_theirs - 1)) * 4
    if KEYS:
        k_min, k_max, q_min, q_max = tl.load(at), tl.load(at + 1), tl.load(others), tl.load(others + 1)
    else:
        q_min, q_max, k_min, k_max = tl.load(at), tl.load(at + 1), tl.load(others), tl.load(others + 1)
    # a query beyond the end has position EMPTY: a block's real queries lie below, and it cannot count as full
    some = (k_min <= q_max) & (k_min != NOWHERE) & ((q_min - k_max <= window) | (k_min < n_meta))
    full = (k_max <= q_min) & (q_max != NOWHERE) & ((q_max - k_min <= window) | (k_max < n_meta))
    if DOCUMENTS:
        if KEYS:
            kd_min, kd_max, qd_min, qd_max = tl.load(at + 2), tl.load(at + 3), tl.load(others + 2), tl.load(others + 3)
        else:
            qd_min, qd_max, kd_min, kd_max = tl.load(at + 2), tl.load(at + 3), tl.load(others + 2), tl.load(others + 3)
        some = some & ((kd_min == SHARED) | ((kd_min <= qd_max) & (qd_min <= kd_max)))
        full = full & ((kd_max == SHARED) | ((kd_min == kd_max) & (kd_min == qd_min) & (kd_min == qd_max)))
    real = j < n_theirs
    some, full = some & real, full & real
    out = ranges + (row * n_mine + block) * 5
    tl.store(out, tl.max(tl.where(some & (j < split), j + 1, 0), axis=0))
    some, full = some & (j >= split), full & (j >= split)
    last = tl.max(tl.where(some, j + 1, 0), axis=0)
    first = tl.minimum(tl.min(tl.where(some, j, PADDED), axis=0), last)
    first_full = tl.minimum(tl.min(tl.where(full, j, PADDED), axis=0), last)
    after_full = tl.min(tl.where((j >= first_full) & (full == 0), j, last), axis=0)
    tl.store(out + 1, first)
    tl.store(out + 2, first_full)
    tl.store(out + 3, tl.maximum(tl.minimum(after_full, last), first_full))
    tl.store(out + 4, last)


@triton.jit
def _sees(q_at, k_at, q_doc, k_doc, window, n_meta, DOCUMENTS: tl.constexpr):
    """`visibility.visible` and `same_document`; the arguments broadcast against each other."""
    see = (k_at <= q_at) & ((q_at - k_at <= window) | (k_at < n_meta)) & (k_at != NOWHERE)
    if DOCUMENTS:
        see = see & ((q_doc == k_doc) | (k_doc == SHARED))
    return see


@triton.jit
def _forward_blocks(
    acc, m, l, q, q_at, q_doc, k, v, positions, documents, first, last, S, window, n_meta, scale, k_step, v_step,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    DOCUMENTS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries against key blocks first .. last - 1; acc, m, l: the running output, maximum and sum."""
    i, j = tl.arange(0, BK), tl.arange(0, BV)
    for block in range(first, last):
        s = block * BN + tl.arange(0, BN)
        if MASK:
            k_tile = tl.load(k + i[:, None] + s[None, :] * k_step, mask=(i < DK)[:, None] & (s < S)[None, :], other=0.0)
            v_tile = tl.load(v + s[:, None] * v_step + j[None, :], mask=(s < S)[:, None] & (j < DV)[None, :], other=0.0)
        else:
            k_tile = tl.load(k + i[:, None] + s[None, :] * k_step, mask=(i < DK)[:, None], other=0.0)
            v_tile = tl.load(v + s[:, None] * v_step + j[None, :], mask=(j < DV)[None, :], other=0.0)
        score = tl.dot(q, k_tile, input_precision=PRECISION) * scale
        if MASK:
            k_at = tl.load(positions + s, mask=s < S, other=NOWHERE)
            k_doc = tl.load(documents + s, mask=s < S, other=0) if DOCUMENTS else k_at
            see = _sees(q_at[:, None], k_at[None, :], q_doc[:, None], k_doc[None, :], window, n_meta, DOCUMENTS)
            score = tl.where(see, score, float("-inf"))
        new = tl.maximum(m, tl.max(score, axis=1))
        if MASK:
            base = tl.where(new == float("-inf"), 0.0, new)  # a query that has seen nothing so far
        else:
            base = new
        p = tl.exp2(score - base[:, None])
        shrink = tl.exp2(m - base)
        l = l * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        m = new
    return acc, m, l


@triton.jit
def _forward_kernel(
    q, k, v, q_positions, k_positions, q_documents, k_documents, ranges, out, lse,
    T, S, H, window, n_meta, scale,
    q_row, q_head, q_step, k_row, k_head, k_step, v_row, v_head, v_step, qp_row, kp_row, qd_row, kd_row, ranges_row,
    R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # the last queries of a causal text have the most keys: they go first
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    t = block * BM + tl.arange(0, BM)
    i, j = tl.arange(0, BK), tl.arange(0, BV)
    q_tile = tl.load(
        q + row * q_row + head * q_head + t[:, None] * q_step + i[None, :],
        mask=(t < T)[:, None] & (i < DK)[None, :], other=0.0,
    )  # fmt: skip
    q_at = tl.load(q_positions + row * qp_row + t, mask=t < T, other=-1)
    q_doc = tl.load(q_documents + row * qd_row + t, mask=t < T, other=-2) if DOCUMENTS else q_at
    k += row * k_row + (head // R) * k_head
    v += row * v_row + (head // R) * v_head
    k_positions += row * kp_row
    if DOCUMENTS:
        k_documents += row * kd_row
    at = ranges + (row * ranges_row + block) * 5
    meta = tl.load(at)
    first, first_full, after_full, last = tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    scale *= LOG2E
    acc = tl.zeros((BM, BV), tl.float32)
    m = tl.full((BM,), float("-inf"), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc, m, l = _forward_blocks(
        acc, m, l, q_tile, q_at, q_doc, k, v, k_positions, k_documents, 0, meta, S, window, n_meta, scale, k_step,
        v_step,
        DK, DV, BK, BV, BN, DOCUMENTS, True, PRECISION)  # fmt: skip
    acc, m, l = _forward_blocks(
        acc, m, l, q_tile, q_at, q_doc, k, v, k_positions, k_documents, first, first_full, S, window, n_meta, scale,
        k_step, v_step, DK, DV, BK, BV, BN, DOCUMENTS, True, PRECISION)  # fmt: skip
    acc, m, l = _forward_blocks(
        acc, m, l, q_tile, q_at, q_doc, k, v, k_positions, k_documents, first_full, after_full, S, window, n_meta,
        scale,
        k_step, v_step, DK, DV, BK, BV, BN, DOCUMENTS, False, PRECISION)  # fmt: skip
    acc, m, l = _forward_blocks(
        acc, m, l, q_tile, q_at, q_doc, k, v, k_positions, k_documents, after_full, last, S, window, n_meta, scale,
        k_step, v_step, DK, DV, BK, BV, BN, DOCUMENTS, True, PRECISION)  # fmt: skip
    seen = l > 0
    acc = acc / tl.where(seen, l, 1.0)[:, None]
    at = (row * T + t[:, None]) * H * DV + head * DV + j[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(t < T)[:, None] & (j < DV)[None, :])
    # base 2; infinite where nothing was seen, so that its weights are 0 in the backward pass
    tl.store(lse + (row * H + head) * T + t, tl.where(seen, m + tl.log2(l), float("inf")), mask=t < T)


@triton.jit
def _dot_kernel(out, dout, d, T, H, do_row, do_step, DV: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr):
    """d: (B, H, T) = sum over a head of out * dout"""
    t, j = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BV)
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    mask = (t < T)[:, None] & (j < DV)[None, :]
    o = tl.load(out + (row * T + t[:, None]) * H * DV + head * DV + j[None, :], mask=mask, other=0.0).to(tl.float32)
    at = row * do_row + t[:, None].to(tl.int64) * do_step + head * DV + j[None, :]
    do = tl.load(dout + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(d + (row * H + head) * T + t, tl.sum(o * do, axis=1), mask=t < T)


@triton.jit
def _dq_blocks(
    dq, q, do, lse, d, q_at, q_doc, k, v, positions, documents, first, last, S, window, n_meta, scale, k_step, v_step,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    DOCUMENTS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, j = tl.arange(0, BK), tl.arange(0, BV)
    for block in range(first, last):
        s = block * BN + tl.arange(0, BN)
        real = s < S
        k_tile = tl.load(k + s[:, None] * k_step + i[None, :], mask=real[:, None] & (i < DK)[None, :], other=0.0)
        v_tile = tl.load(v + j[:, None] + s[None, :] * v_step, mask=real[None, :] & (j < DV)[:, None], other=0.0)
        p = tl.exp2(tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale - lse[:, None])
        if MASK:
            k_at = tl.load(positions + s, mask=real, other=NOWHERE)
            k_doc = tl.load(documents + s, mask=real, other=0) if DOCUMENTS else k_at
            see = _sees(q_at[:, None], k_at[None, :], q_doc[:, None], k_doc[None, :], window, n_meta, DOCUMENTS)
            p = tl.where(see, p, 0.0)
        ds = p * (tl.dot(do, v_tile, input_precision=PRECISION) - d[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _dq_kernel(
    q, k, v, q_positions, k_positions, q_documents, k_documents, ranges, dout, lse, d, dq,
    T, S, H, window, n_meta, scale,
    q_row, q_head, q_step, k_row, k_head, k_step, v_row, v_head, v_step, qp_row, kp_row, qd_row, kd_row, ranges_row,
    do_row, do_step,
    R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    t = block * BM + tl.arange(0, BM)
    i, j = tl.arange(0, BK), tl.arange(0, BV)
    real = t < T
    q_mask, v_mask = real[:, None] & (i < DK)[None, :], real[:, None] & (j < DV)[None, :]
    q_tile = tl.load(q + row * q_row + head * q_head + t[:, None] * q_step + i[None, :], mask=q_mask, other=0.0)
    do = tl.load(
        dout + row * do_row + t[:, None].to(tl.int64) * do_step + head * DV + j[None, :], mask=v_mask, other=0.0
    )
    lse_tile = tl.load(lse + (row * H + head) * T + t, mask=real, other=float("inf"))
    d_tile = tl.load(d + (row * H + head) * T + t, mask=real, other=0.0)
    q_at = tl.load(q_positions + row * qp_row + t, mask=real, other=-1)
    q_doc = tl.load(q_documents + row * qd_row + t, mask=real, other=-2) if DOCUMENTS else q_at
    k += row * k_row + (head // R) * k_head
    v += row * v_row + (head // R) * v_head
    k_positions += row * kp_row
    if DOCUMENTS:
        k_documents += row * kd_row
    at = ranges + (row * ranges_row + block) * 5
    meta = tl.load(at)
    first, first_full, after_full, last = tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    total = tl.zeros((BM, BK), tl.float32)
    base2 = scale * LOG2E
    total = _dq_blocks(
        total, q_tile, do, lse_tile, d_tile, q_at, q_doc, k, v, k_positions, k_documents, 0, meta, S, window, n_meta,
        base2, k_step, v_step, DK, DV, BK, BV, BN, DOCUMENTS, True, PRECISION)  # fmt: skip
    total = _dq_blocks(
        total, q_tile, do, lse_tile, d_tile, q_at, q_doc, k, v, k_positions, k_documents, first, first_full, S, window,
        n_meta, base2, k_step, v_step, DK, DV, BK, BV, BN, DOCUMENTS, True, PRECISION)  # fmt: skip
    total = _dq_blocks(
        total, q_tile, do, lse_tile, d_tile, q_at, q_doc, k, v, k_positions, k_documents, first_full, after_full, S,
        window, n_meta, base2, k_step, v_step, DK, DV, BK, BV, BN, DOCUMENTS, False, PRECISION)  # fmt: skip
    total = _dq_blocks(
        total, q_tile, do, lse_tile, d_tile, q_at, q_doc, k, v, k_positions, k_documents, after_full, last, S, window,
        n_meta, base2, k_step, v_step, DK, DV, BK, BV, BN, DOCUMENTS, True, PRECISION)  # fmt: skip
    at = ((row * H + head) * T + t[:, None]) * DK + i[None, :]
    tl.store(dq + at, (total * scale).to(dq.dtype.element_ty), mask=q_mask)


@triton.jit
def _dkv_blocks(
    dk, dv, k_tile, v_tile, k_at, k_doc, q, dout, lse, d, positions, documents, first, last, T, window, n_meta, scale,
    q_step, do_step,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
    DOCUMENTS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, j = tl.arange(0, BK), tl.arange(0, BV)
    for block in range(first, last):
        t = block * BM + tl.arange(0, BM)
        real = t < T
        q_tile = tl.load(q + t[:, None] * q_step + i[None, :], mask=real[:, None] & (i < DK)[None, :], other=0.0)
        do = tl.load(dout + t[:, None] * do_step + j[None, :], mask=real[:, None] & (j < DV)[None, :], other=0.0)
        lse_tile = tl.load(lse + t, mask=real, other=float("inf"))
        d_tile = tl.load(d + t, mask=real, other=0.0)
        # keys by queries
        p = tl.exp2(tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale - lse_tile[None, :])
        if MASK:
            q_at = tl.load(positions + t, mask=real, other=-1)
            q_doc = tl.load(documents + t, mask=real, other=-2) if DOCUMENTS else q_at
            see = _sees(q_at[None, :], k_at[:, None], q_doc[None, :], k_doc[:, None], window, n_meta, DOCUMENTS)
            p = tl.where(see, p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v_tile, tl.trans(do), input_precision=PRECISION) - d_tile[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _dkv_kernel(
    q, k, v, q_positions, k_positions, q_documents, k_documents, ranges, dout, lse, d, dk, dv,
    T, S, H, window, n_meta, scale,
    q_row, q_head, q_step, k_row, k_head, k_step, v_row, v_head, v_step, qp_row, kp_row, qd_row, kd_row, ranges_row,
    do_row, do_step,
    R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, group = tl.program_id(0), tl.program_id(1)  # the first keys are seen by the most queries
    row = tl.program_id(2).to(tl.int64)
    s = block * BN + tl.arange(0, BN)
    i, j = tl.arange(0, BK), tl.arange(0, BV)
    real = s < S
    k_mask, v_mask = real[:, None] & (i < DK)[None, :], real[:, None] & (j < DV)[None, :]
    k_tile = tl.load(k + row * k_row + group * k_head + s[:, None] * k_step + i[None, :], mask=k_mask, other=0.0)
    v_tile = tl.load(v + row * v_row + group * v_head + s[:, None] * v_step + j[None, :], mask=v_mask, other=0.0)
    k_at = tl.load(k_positions + row * kp_row + s, mask=real, other=NOWHERE)
    k_doc = tl.load(k_documents + row * kd_row + s, mask=real, other=0) if DOCUMENTS else k_at
    q_positions += row * qp_row
    if DOCUMENTS:
        q_documents += row * qd_row
    at = ranges + (row * ranges_row + block) * 5
    first, first_full, after_full, last = tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    dk_sum = tl.zeros((BN, BK), tl.float32)
    dv_sum = tl.zeros((BN, BV), tl.float32)
    base2 = scale * LOG2E
    for member in range(R):
        head = group * R + member
        q_head_at = q + row * q_row + head * q_head
        do_head_at = dout + row * do_row + head * DV
        lse_at, d_at = lse + (row * H + head) * T, d + (row * H + head) * T
        dk_sum, dv_sum = _dkv_blocks(
            dk_sum, dv_sum, k_tile, v_tile, k_at, k_doc, q_head_at, do_head_at, lse_at, d_at, q_positions, q_documents,
            first, first_full, T, window, n_meta, base2, q_step, do_step,
            DK, DV, BK, BV, BM, DOCUMENTS, True, PRECISION)  # fmt: skip
        dk_sum, dv_sum = _dkv_blocks(
            dk_sum, dv_sum, k_tile, v_tile, k_at, k_doc, q_head_at, do_head_at, lse_at, d_at, q_positions, q_documents,
            first_full, after_full, T, window, n_meta, base2, q_step, do_step,
            DK, DV, BK, BV, BM, DOCUMENTS, False, PRECISION)  # fmt: skip
        dk_sum, dv_sum = _dkv_blocks(
            dk_sum, dv_sum, k_tile, v_tile, k_at, k_doc, q_head_at, do_head_at, lse_at, d_at, q_positions, q_documents,
            after_full, last, T, window, n_meta, base2, q_step, do_step,
            DK, DV, BK, BV, BM, DOCUMENTS, True, PRECISION)  # fmt: skip
    at = (row * tl.num_programs(1) + group) * S + s[:, None]
    tl.store(dk + at * DK + i[None, :], (dk_sum * scale).to(dk.dtype.element_ty), mask=k_mask)
    tl.store(dv + at * DV + j[None, :], dv_sum.to(dv.dtype.element_ty), mask=v_mask)


def _bounds(positions: Tensor, documents: Tensor | None, rows: int, size: int) -> Tensor:
    S = positions.shape[1]
    blocks = triton.cdiv(S, size)
    bounds = torch.empty(rows, blocks, 4, dtype=torch.int32, device=positions.device)
    _bounds_kernel[(blocks, rows)](
        positions, documents, bounds, S, _row(positions), 0 if documents is None else _row(documents), blocks,
        BLOCK=size, DOCUMENTS=documents is not None, num_warps=1,
    )  # fmt: skip
    return bounds


def _ranges(mine: Tensor, theirs: Tensor, split: int, window: int, n_meta: int, keys: bool, documents: bool) -> Tensor:
    rows, blocks = mine.shape[:2]
    ranges = torch.empty(rows, blocks, 5, dtype=torch.int32, device=mine.device)
    _ranges_kernel[(blocks, rows)](
        mine, theirs, ranges, blocks, theirs.shape[1], split, window, n_meta, blocks, theirs.shape[1],
        PADDED=triton.next_power_of_2(theirs.shape[1]), KEYS=keys, DOCUMENTS=documents, num_warps=1,
    )  # fmt: skip
    return ranges


def _row(x: Tensor) -> int:
    return 0 if x.shape[0] == 1 else x.stride(0)


def _strides(x: Tensor) -> tuple[int, int, int]:
    return _row(x), x.stride(1), x.stride(2)


def _tiles(q: Tensor, exact: dict[str, int], fast: dict[str, int]) -> dict[str, int]:
    if INTERPRET:
        return {"BM": BLOCK, "BN": BLOCK}
    return exact if q.dtype == torch.float32 else fast


class _Call:
    """What the kernels of both directions are told: the same arguments in the same order."""

    def __init__(self, q, k, v, q_positions, k_positions, q_documents, k_documents, split_keys, window, n_meta, scale):
        self.q, self.k, self.v = (rows_contiguous(x) for x in (q, k, v))
        self.q_positions, self.k_positions = q_positions.contiguous(), k_positions.contiguous()
        self.q_documents = None if q_documents is None else q_documents.contiguous()
        self.k_documents = None if k_documents is None else k_documents.contiguous()
        (self.B, self.H, self.T, DK), (_, G, self.S, DV) = q.shape, v.shape
        self.G, self.window, self.n_meta, self.scale, self.split_keys = G, window, n_meta, scale, split_keys
        # positions or documents that differ between rows need ranges for each
        self.rows = 1 if q_documents is None and max(q_positions.shape[0], k_positions.shape[0]) == 1 else self.B
        self.sizes = {
            "R": self.H // G, "DK": DK, "DV": DV,
            "BK": max(16, triton.next_power_of_2(DK)), "BV": max(16, triton.next_power_of_2(DV)),
            "DOCUMENTS": q_documents is not None, "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        }  # fmt: skip

    def ranges(self, BM: int, BN: int, keys: bool) -> Tensor:
        q_bounds = _bounds(self.q_positions, self.q_documents, self.rows, BM)
        k_bounds = _bounds(self.k_positions, self.k_documents, self.rows, BN)
        split = 0 if keys else self.split_keys // BN
        mine, theirs = (k_bounds, q_bounds) if keys else (q_bounds, k_bounds)
        return _ranges(mine, theirs, split, self.window, self.n_meta, keys, self.sizes["DOCUMENTS"])

    def inputs(self, ranges: Tensor) -> tuple:
        return (
            self.q, self.k, self.v, self.q_positions, self.k_positions, self.q_documents, self.k_documents, ranges
        )  # fmt: skip

    def numbers(self, ranges: Tensor) -> tuple:
        documents = (0, 0) if self.q_documents is None else (_row(self.q_documents), _row(self.k_documents))
        return (
            self.T, self.S, self.H, self.window, self.n_meta, self.scale, *_strides(self.q), *_strides(self.k),
            *_strides(self.v), _row(self.q_positions), _row(self.k_positions), *documents,
            0 if self.rows == 1 else ranges.shape[1],
        )  # fmt: skip


@library_op("attention_forward")
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, q_positions: Tensor, k_positions: Tensor,
    q_documents: Tensor | None, k_documents: Tensor | None, split: int, window: int, n_meta: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q: (B, H, T, dk), k: (B or 1, G, S, dk), v: (B or 1, G, S, dv), positions: (B or 1, T) and (B or 1, S) int32,
    documents: int32 as well, keys of document -1 are everybody's; split: so many keys in front have a range of their
    own
    -> (B, T, H dv), log-sum-exp of base 2 (B, H, T)"""
    call = _Call(q, k, v, q_positions, k_positions, q_documents, k_documents, split, window, n_meta, scale)
    tiles = _tiles(q, {"BM": 64, "BN": 32}, {"BM": 128, "BN": 64})
    ranges = call.ranges(**tiles, keys=False)
    out, lse = attention_forward_like(q, k, v, None, None, None, None, split, window, n_meta, scale)
    grid = (triton.cdiv(call.T, tiles["BM"]), call.H, call.B)
    _forward_kernel[grid](
        *call.inputs(ranges), out, lse, *call.numbers(ranges), **call.sizes, **tiles, num_warps=8, num_stages=3
    )
    return out, lse


@attention_forward.register_fake
def attention_forward_like(
    q, k, v, q_positions, k_positions, q_documents, k_documents, split, window, n_meta, scale
):  # fmt: skip
    B, H, T, _ = q.shape
    out = torch.empty(B, T, H * v.shape[3], dtype=q.dtype, device=q.device)
    return out, torch.empty(B, H, T, dtype=torch.float32, device=q.device)


@library_op("attention_backward")
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, q_positions: Tensor, k_positions: Tensor,
    q_documents: Tensor | None, k_documents: Tensor | None, split: int, window: int, n_meta: int, scale: float,
    out: Tensor, lse: Tensor, dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> gradients of q, k, v"""
    call = _Call(q, k, v, q_positions, k_positions, q_documents, k_documents, split, window, n_meta, scale)
    dout = rows_contiguous(dout)
    B, H, T, S, G = call.B, call.H, call.T, call.S, call.G
    sizes, dv_sizes = call.sizes, {name: call.sizes[name] for name in ("DV", "BV")}
    d = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    _dot_kernel[(triton.cdiv(T, BLOCK), H, B)](out, dout, d, T, H, dout.stride(0), dout.stride(1), **dv_sizes, BM=BLOCK)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tiles = _tiles(q, {"BM": 32, "BN": 32}, {"BM": 128, "BN": 64})
    ranges = call.ranges(**tiles, keys=False)
    _dq_kernel[(triton.cdiv(T, tiles["BM"]), H, B)](
        *call.inputs(ranges), dout, lse, d, dq, *call.numbers(ranges), dout.stride(0), dout.stride(1), **sizes, **tiles,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    dk = torch.empty(B, G, S, k.shape[3], dtype=k.dtype, device=k.device)
    dv = torch.empty(B, G, S, v.shape[3], dtype=v.dtype, device=v.device)
    tiles = _tiles(q, {"BM": 32, "BN": 32}, {"BM": 64, "BN": 128})
    ranges = call.ranges(**tiles, keys=True)
    _dkv_kernel[(triton.cdiv(S, tiles["BN"]), G, B)](
        *call.inputs(ranges), dout, lse, d, dk, dv, *call.numbers(ranges), dout.stride(0), dout.stride(1), **sizes,
        **tiles, num_warps=8, num_stages=2,
    )  # fmt: skip
    if k.shape[0] != B:
        dk, dv = dk.sum(0, keepdim=True), dv.sum(0, keepdim=True)
    return dq, dk, dv


@attention_backward.register_fake
def _(q, k, v, q_positions, k_positions, q_documents, k_documents, split, window, n_meta, scale, out, lse, dout):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _setup(ctx, inputs, output):
    *tensors, split, window, n_meta, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.numbers = split, window, n_meta, scale
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, dout, _):
    *tensors, out, lse = ctx.saved_tensors
    gradients = torch.ops.hymba_gpu.attention_backward(*tensors, *ctx.numbers, out, lse, dout)
    return *gradients, *[None] * 8


attention_forward.register_autograd(_backward, setup_context=_setup)
