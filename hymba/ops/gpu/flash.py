"""Attention of many queries with gradients, for training in 16 bits (FlashAttention-2, Dao, arXiv 2307.08691).

Forward: a program has a block of queries of one head and walks over blocks of keys with a running softmax; it leaves the
logarithm of the sum (base 2). Backward, without atomics: first the queries' gradients in the same walk, which also
leaves delta = sum(dO O) of every query; then those of keys and values, where a program has a block of keys and walks
over the blocks of queries of all heads that read them. There scores are taken transposed, keys by queries, so that
probabilities go from registers into the next product.

Which blocks are touched, and which of them need no mask, is listed once for all layers that share a mask (`blocks`).

float32: scores, softmax, accumulators. Factors of products are in the type of the inputs.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.gpu.blocks import EVERYBODY, Places, chosen_first, places, touched
from hymba.ops.gpu.common import INTERPRET, LOG2E, rows_contiguous

NOBODY = tl.constexpr(2147483647)  # `visibility.EMPTY`
ALL = tl.constexpr(EVERYBODY)


class Tiles(NamedTuple):
    queries: int
    keys: int
    options: dict[str, int]


# on an H100 with heads of 64 and 128
FORWARD = Tiles(128, 64, {"num_warps": 4, "num_stages": 3})
QUERIES = Tiles(128, 128, {"num_warps": 8, "num_stages": 3})
KEYS = Tiles(64, 128, {"num_warps": 8, "num_stages": 3})
if INTERPRET:
    FORWARD = QUERIES = KEYS = Tiles(32, 16, {})


@triton.jit
def _see(q_at, k_at, q_doc, k_doc, reach, DOCUMENTS: tl.constexpr):
    """`visibility.visible` for positions that broadcast to a tile; reach: as from `_reach`. As unsigned numbers, distances
    to later keys are larger than any reach."""
    see = (q_at - k_at).to(tl.uint32) <= reach.to(tl.uint32)
    if DOCUMENTS:
        see = see & ((q_doc == k_doc) | (k_doc == ALL))
    return see


@triton.jit
def _reach(k_at, window, n_meta):
    """How far behind keys the last query is that sees them."""
    return tl.where(k_at < n_meta, NOBODY, window)


@triton.jit
def _tile(base, at, step, n, D: tl.constexpr, BD: tl.constexpr, WHOLE: tl.constexpr = False):
    """Rows `at` of a matrix, (len(at), BD). What stands in rows behind the last one does not matter, if it is finite:
    positions hide it."""
    j = tl.arange(0, BD)
    if not WHOLE:
        at = tl.minimum(at, n - 1)
    where = base + at[:, None] * step + j[None, :]
    if D == BD:
        return tl.load(where)
    return tl.load(where, mask=(j < D)[None, :], other=0.0)


@triton.jit
def _store(base, at, step, n, tile, D: tl.constexpr, BD: tl.constexpr):
    j = tl.arange(0, BD)
    mask = (at < n)[:, None] & (j < D)[None, :]
    tl.store(base + at[:, None] * step + j[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _where(at, x, n, other: tl.constexpr):
    return tl.load(x + at, mask=at < n, other=other)


@triton.jit
def _softmax(
    score, top, total, block, q_here, q_owner, k_at, k_doc, S, window, n_meta, scale,
    BN: tl.constexpr, DOCUMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """-> probabilities up to a factor, what earlier ones are to be multiplied with, new maximum and sum"""
    if MASKED:
        s = block * BN + tl.arange(0, BN)
        k_here = _where(s, k_at, S, NOBODY)
        k_owner = _where(s, k_doc, S, 0) if DOCUMENTS else k_here
        see = _see(
            q_here[:, None], k_here[None, :], q_owner[:, None], k_owner[None, :],
            _reach(k_here, window, n_meta)[None, :], DOCUMENTS,
        )  # fmt: skip
        score = tl.where(see, score, float("-inf"))
    new = tl.maximum(top, tl.max(score, axis=1) * scale)
    base = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
    p = tl.exp2(score * scale - base[:, None])
    shrink = tl.exp2(top - base)
    return p, shrink, new, total * shrink + tl.sum(p, axis=1)


@triton.jit
def _forward_walk(
    acc, top, total, p, before, first, q_tile, q_here, q_owner, k, v, k_at, k_doc, listed, count,
    S, window, n_meta, k_step, v_step, scale,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    DOCUMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """p: probabilities of the block `before`, which meet their values while those of the next block are computed"""
    bits: tl.constexpr = p.dtype
    block = tl.load(listed + first)
    for i in range(first, count):
        following = tl.load(listed + i + 1)
        n = tl.arange(0, BN)
        k_tile = _tile(k, block * BN + n, k_step, S, DK, BK, not MASKED)
        v_tile = _tile(v, before * BN + n, v_step, S, DV, BV)
        score = tl.dot(q_tile, tl.trans(k_tile))
        acc = tl.dot(p.to(v_tile.dtype, bitcast=True), v_tile, acc)
        p_next, shrink, top, total = _softmax(
            score, top, total, block, q_here, q_owner, k_at, k_doc, S, window, n_meta, scale, BN, DOCUMENTS, MASKED
        )
        acc *= shrink[:, None]
        p = p_next.to(v_tile.dtype).to(bits, bitcast=True)
        before = tl.load(listed + i)  # `block`; but a loop that hands a value on twice is not pipelined
        block = following
    return acc, top, total, p, before


@triton.jit(do_not_specialize=["window", "n_meta"])
def _forward_kernel(
    q, k, v, q_at, k_at, q_doc, k_doc, order, some_n, some, full_n, full, y, lse,
    T, S, H, window, n_meta, scale,
    q_row, q_head, q_step, k_row, k_head, k_step, v_row, v_head, v_step, mask_row,
    R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    head, row, rank = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    blocks, most = tl.num_programs(2), tl.cdiv(S, BN) + 1
    mine = row * mask_row * blocks + rank
    m = tl.load(order + mine)
    mine += m - rank
    at = m * BM + tl.arange(0, BM)
    q_tile = _tile(q + row * q_row + head * q_head, at, q_step, T, DK, BK)
    k += row * k_row + head // R * k_head
    v += row * v_row + head // R * v_head
    q_here = _where(at, q_at + row * mask_row * T, T, -1)
    q_owner = _where(at, q_doc + row * mask_row * T, T, 0) if DOCUMENTS else q_here
    k_at += row * mask_row * S
    k_doc += row * mask_row * S
    scale *= LOG2E
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    # the first block; where none needs a mask, one behind the keys, of which nothing is seen
    masked = tl.load(some_n + mine)
    before = tl.where(masked > 0, tl.load(some + mine * most), most)
    n = tl.arange(0, BN)
    score = tl.dot(q_tile, tl.trans(_tile(k, before * BN + n, k_step, S, DK, BK)))
    p, _, top, total = _softmax(
        score, top, total, before, q_here, q_owner, k_at, k_doc, S, window, n_meta, scale, BN, DOCUMENTS, True
    )
    # carried as integers, so that the compiler leaves it in registers
    bits: tl.constexpr = tl.int16 if v.dtype.element_ty.primitive_bitwidth == 16 else tl.int32
    p = p.to(v.dtype.element_ty).to(bits, bitcast=True)
    acc = tl.zeros((BM, BV), tl.float32)
    acc, top, total, p, before = _forward_walk(
        acc, top, total, p, before, 1, q_tile, q_here, q_owner, k, v, k_at, k_doc, some + mine * most, masked,
        S, window, n_meta, k_step, v_step, scale, DK, DV, BK, BV, BN, DOCUMENTS, True,
    )  # fmt: skip
    acc, top, total, p, before = _forward_walk(
        acc, top, total, p, before, 0, q_tile, q_here, q_owner, k, v, k_at, k_doc, full + mine * most,
        tl.load(full_n + mine),
        S, window, n_meta, k_step, v_step, scale, DK, DV, BK, BV, BN, DOCUMENTS, False,
    )  # fmt: skip
    acc = tl.dot(p.to(v.dtype.element_ty, bitcast=True), _tile(v, before * BN + n, v_step, S, DV, BV), acc)
    seen = total > 0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    _store(y + (row * T * H + head) * DV, at, H * DV, T, acc, DV, BV)
    # infinite for a query that sees nothing: its probabilities will be 0
    tl.store(lse + (row * H + head) * T + at, tl.where(seen, top + tl.log2(total), float("inf")), mask=at < T)


@triton.jit
def _queries_walk(
    acc, q_tile, dy_tile, lse_here, delta_here, q_here, q_owner, k, v, k_at, k_doc, listed, count, S, window, n_meta,
    k_step, v_step, scale,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    DOCUMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    block = tl.load(listed)
    for i in range(0, count):
        following = tl.load(listed + i + 1)
        s = block * BN + tl.arange(0, BN)
        k_tile = _tile(k, s, k_step, S, DK, BK, not MASKED)
        v_tile = _tile(v, s, v_step, S, DV, BV, not MASKED)
        score = tl.dot(q_tile, tl.trans(k_tile))
        dp = tl.dot(dy_tile, tl.trans(v_tile))
        p = tl.exp2(score * scale - lse_here[:, None])
        if MASKED:
            k_here = _where(s, k_at, S, NOBODY)
            k_owner = _where(s, k_doc, S, 0) if DOCUMENTS else k_here
            see = _see(
                q_here[:, None],
                k_here[None, :],
                q_owner[:, None],
                k_owner[None, :],
                _reach(k_here, window, n_meta)[None, :],
                DOCUMENTS,
            )
            p = tl.where(see, p, 0.0)
        ds = p * (dp - delta_here[:, None])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc)
        block = following
    return acc


@triton.jit(do_not_specialize=["window", "n_meta"])
def _queries_kernel(
    q, k, v, y, dy, q_at, k_at, q_doc, k_doc, order, some_n, some, full_n, full, lse, delta, dq,
    T, S, H, window, n_meta, scale,
    q_row, q_head, q_step, k_row, k_head, k_step, v_row, v_head, v_step, dy_row, dy_step, mask_row,
    R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    head, row, rank = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    blocks, most = tl.num_programs(2), tl.cdiv(S, BN) + 1
    mine = row * mask_row * blocks + rank
    m = tl.load(order + mine)
    mine += m - rank
    at = m * BM + tl.arange(0, BM)
    dy_tile = _tile(dy + row * dy_row + head * DV, at, dy_step, T, DV, BV)
    y_tile = _tile(y + (row * T * H + head) * DV, at, H * DV, T, DV, BV)
    delta_here = tl.sum(dy_tile.to(tl.float32) * y_tile.to(tl.float32), axis=1)
    line = (row * H + head) * T + at
    tl.store(delta + line, delta_here, mask=at < T)
    lse_here = tl.load(lse + line, mask=at < T, other=float("inf"))
    q_tile = _tile(q + row * q_row + head * q_head, at, q_step, T, DK, BK)
    k += row * k_row + head // R * k_head
    v += row * v_row + head // R * v_head
    q_here = _where(at, q_at + row * mask_row * T, T, -1)
    q_owner = _where(at, q_doc + row * mask_row * T, T, 0) if DOCUMENTS else q_here
    k_at += row * mask_row * S
    k_doc += row * mask_row * S
    acc = tl.zeros((BM, BK), tl.float32)
    acc = _queries_walk(
        acc, q_tile, dy_tile, lse_here, delta_here, q_here, q_owner, k, v, k_at, k_doc, some + mine * most,
        tl.load(some_n + mine), S, window, n_meta, k_step, v_step, scale * LOG2E,
        DK, DV, BK, BV, BN, DOCUMENTS, True,
    )  # fmt: skip
    acc = _queries_walk(
        acc, q_tile, dy_tile, lse_here, delta_here, q_here, q_owner, k, v, k_at, k_doc, full + mine * most,
        tl.load(full_n + mine), S, window, n_meta, k_step, v_step, scale * LOG2E,
        DK, DV, BK, BV, BN, DOCUMENTS, False,
    )  # fmt: skip
    _store(dq + (row * T * H + head) * DK, at, H * DK, T, acc * scale, DK, BK)


@triton.jit
def _keys_walk(
    acc_k, acc_v, k_tile, v_tile, k_here, k_owner, q, dy, q_at, q_doc, lse, delta, listed, count, T, window, n_meta,
    q_head, q_step, dy_step, scale,
    R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
    DOCUMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    block = tl.load(listed)
    for i in range(0, count * R):
        following = tl.load(listed + (i + 1) // R)
        head = i % R
        t = block * BM + tl.arange(0, BM)
        q_tile = _tile(q + head * q_head, t, q_step, T, DK, BK, not MASKED)
        dy_tile = _tile(dy + head * DV, t, dy_step, T, DV, BV, not MASKED)
        lse_here = _where(t, lse + head * T, T, float("inf")) if MASKED else tl.load(lse + head * T + t)
        delta_here = _where(t, delta + head * T, T, 0.0) if MASKED else tl.load(delta + head * T + t)
        score = tl.dot(k_tile, tl.trans(q_tile))
        dp = tl.dot(v_tile, tl.trans(dy_tile))
        p = tl.exp2(score * scale - lse_here[None, :])
        if MASKED:
            q_here = _where(t, q_at, T, -1)
            q_owner = _where(t, q_doc, T, 0) if DOCUMENTS else q_here
            see = _see(
                q_here[None, :],
                k_here[:, None],
                q_owner[None, :],
                k_owner[:, None],
                _reach(k_here, window, n_meta)[:, None],
                DOCUMENTS,
            )
            p = tl.where(see, p, 0.0)
        acc_v = tl.dot(p.to(dy_tile.dtype), dy_tile, acc_v)
        ds = p * (dp - delta_here[None, :])
        acc_k = tl.dot(ds.to(q_tile.dtype), q_tile, acc_k)
        block = following
    return acc_k, acc_v


@triton.jit(do_not_specialize=["window", "n_meta"])
def _keys_kernel(
    q, k, v, dy, q_at, k_at, q_doc, k_doc, order, some_n, some, full_n, full, lse, delta, dk, dv,
    T, S, H, window, n_meta, scale,
    q_row, q_head, q_step, k_row, k_head, k_step, v_row, v_head, v_step, dy_row, dy_step, mask_row,
    R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    group, row, rank = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    G, blocks, most = tl.num_programs(0), tl.num_programs(2), tl.cdiv(T, BM) + 1
    mine = row * mask_row * blocks + rank
    n = tl.load(order + mine)
    mine += n - rank
    s = n * BN + tl.arange(0, BN)
    k_tile = _tile(k + row * k_row + group * k_head, s, k_step, S, DK, BK)
    v_tile = _tile(v + row * v_row + group * v_head, s, v_step, S, DV, BV)
    k_here = _where(s, k_at + row * mask_row * S, S, NOBODY)
    k_owner = _where(s, k_doc + row * mask_row * S, S, 0) if DOCUMENTS else k_here
    q += row * q_row + group * R * q_head
    dy += row * dy_row + group * R * DV
    q_at += row * mask_row * T
    q_doc += row * mask_row * T
    lse += (row * H + group * R) * T
    delta += (row * H + group * R) * T
    acc_k = tl.zeros((BN, BK), tl.float32)
    acc_v = tl.zeros((BN, BV), tl.float32)
    acc_k, acc_v = _keys_walk(
        acc_k, acc_v, k_tile, v_tile, k_here, k_owner, q, dy, q_at, q_doc, lse, delta, some + mine * most,
        tl.load(some_n + mine), T, window, n_meta, q_head, q_step, dy_step, scale * LOG2E,
        R, DK, DV, BK, BV, BM, DOCUMENTS, True,
    )  # fmt: skip
    acc_k, acc_v = _keys_walk(
        acc_k, acc_v, k_tile, v_tile, k_here, k_owner, q, dy, q_at, q_doc, lse, delta, full + mine * most,
        tl.load(full_n + mine), T, window, n_meta, q_head, q_step, dy_step, scale * LOG2E,
        R, DK, DV, BK, BV, BM, DOCUMENTS, False,
    )  # fmt: skip
    _store(dk + (row * G + group) * S * DK, s, DK, S, acc_k * scale, DK, BK)
    _store(dv + (row * G + group) * S * DV, s, DV, S, acc_v, DV, BV)


class Lists(NamedTuple):
    """For blocks of one side, which of the other side they must touch; rows, blocks of either side a and b; int32."""

    order: Tensor  # (rows, a): those with most work first
    some_n: Tensor  # (rows, a): how many need a mask
    some: Tensor  # (rows, a, b + 1): which
    full_n: Tensor  # and those that are visible whole
    full: Tensor


class Mask(NamedTuple):
    at: Places
    window: int
    n_meta: int
    forward: Lists
    queries: Lists
    keys: Lists


@lru_cache(maxsize=8)  # tensors are keys by identity; nobody writes to a call's positions
def mask(
    positions: Tensor, where: tuple[Tensor, ...], documents: Tensor | None, owners: tuple[Tensor | None, ...] | None,
    window: int, n_meta: int,
) -> Mask:  # fmt: skip
    """As `flex.block_mask`: the same for all layers with this window."""
    at = places(positions, where, documents, owners)

    def lists(tiles: Tiles, transposed: bool = False) -> Lists:
        some, full = touched(at, window, n_meta, tiles.queries, tiles.keys)
        return _lists(*(x.transpose(1, 2) if transposed else x for x in (some, full)))

    return Mask(at, window, n_meta, lists(FORWARD), lists(QUERIES), lists(KEYS, transposed=True))


def _lists(some: Tensor, full: Tensor) -> Lists:
    order = torch.argsort(some.sum(-1), dim=-1, descending=True, stable=True).to(torch.int32)
    parts = []
    for chosen in (some & ~full, full):
        count, index = chosen_first(chosen)
        parts += [count, torch.nn.functional.pad(index, (0, 1))]  # the kernels read one further
    return Lists(order, *parts)


class Attention(torch.autograd.Function):
    """q: (B, H, T, dk), k: (B, G, S, dk), v: (B, G, S, dv) -> (B, T, H dv)"""

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        q, k, v = (rows_contiguous(x) for x in (q, k, v))
        y, lse = forward(q, k, v, mask, scale)
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.mask, ctx.scale = mask, scale
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return *backward(*ctx.saved_tensors, rows_contiguous(dy), ctx.mask, ctx.scale), None, None


def _arguments(q: Tensor, k: Tensor, v: Tensor, mask: Mask, lists: Lists, tiles: Tiles) -> tuple[list, list, dict]:
    """-> what all kernels take behind their first tensors, strides, constants"""
    H, DK = q.shape[1], q.shape[3]
    G, DV = v.shape[1], v.shape[3]
    q_at, k_at, q_doc, k_doc = mask.at
    at = [q_at, k_at, q_at if q_doc is None else q_doc, k_at if k_doc is None else k_doc]
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    constants = {
        "R": H // G, "DK": DK, "DV": DV, "BK": triton.next_power_of_2(DK), "BV": triton.next_power_of_2(DV),
        "BM": tiles.queries, "BN": tiles.keys, "DOCUMENTS": q_doc is not None, **tiles.options,
    }  # fmt: skip
    return [*at, *lists], strides, constants


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """-> y (B, T, H dv), logarithm of the sums (B, H, T)"""
    (B, H, T, _), (_, _, S, DV) = q.shape, v.shape
    y = torch.empty(B, T, H * DV, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    inputs, strides, constants = _arguments(q, k, v, mask, mask.forward, FORWARD)
    _forward_kernel[(H, B, mask.forward.order.shape[1])](
        q, k, v, *inputs, y, lse, T, S, H, mask.window, mask.n_meta, scale, *strides, int(mask.at.q_at.shape[0] > 1),
        **constants,
    )  # fmt: skip
    return y, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, dy: Tensor, mask: Mask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of q, k, v"""
    (B, H, T, DK), (_, G, S, DV) = q.shape, v.shape
    dq = torch.empty(B, T, H, DK, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    delta = torch.empty_like(lse)
    numbers = T, S, H, mask.window, mask.n_meta, scale
    last = *dy.stride()[:2], int(mask.at.q_at.shape[0] > 1)
    inputs, strides, constants = _arguments(q, k, v, mask, mask.queries, QUERIES)
    _queries_kernel[(H, B, mask.queries.order.shape[1])](
        q, k, v, y, dy, *inputs, lse, delta, dq, *numbers, *strides, *last, **constants
    )
    inputs, strides, constants = _arguments(q, k, v, mask, mask.keys, KEYS)
    _keys_kernel[(G, B, mask.keys.order.shape[1])](
        q, k, v, dy, *inputs, lse, delta, dk, dv, *numbers, *strides, *last, **constants
    )
    return dq.transpose(1, 2), dk, dv
