"""Attention of many queries in 16 bits, in training and for prompts (FlashAttention-2, Dao, arXiv 2307.08691).

Forward: a program has a block of queries of one head and walks over blocks of keys with a running softmax; it leaves
the logarithm of the sum (base 2). Backward, without atomics: first the queries' gradients in the same walk, which also
leaves delta = sum(dO O) of every query; then those of keys and values, where a program has a block of keys and walks
over the blocks of queries of all heads that read them. There scores are taken transposed, keys by queries, so that
probabilities go from registers into the next product.

On Hopper cards `hopper` has other kernels for large work of common shape.

As in `flex`, the mask is evaluated on positions, and keys from several places are joined first. Which blocks are
touched, and which of them need no mask, is listed once for all layers that share a mask, by one kernel for each walk.

float32: scores, softmax, accumulators. Factors of products are in the type of the inputs.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.gpu.blocks import EVERYBODY, NO_WINDOW, Places, places
from hymba.ops.gpu.common import INTERPRET, LOG2E, needs_grad, rows_contiguous
from hymba.ops.gpu.join import joined
from hymba.visibility import EMPTY, KeyValue

try:
    from hymba.ops.gpu import hopper
except ImportError:  # an older Triton
    hopper = None

NOBODY = tl.constexpr(EMPTY)
ALL = tl.constexpr(EVERYBODY)
LARGEST = 64, 128  # sizes of a key and a value up to which the gradients of a block of them fit registers


class Tiles(NamedTuple):
    queries: int
    keys: int
    options: dict[str, int]


class Plan(NamedTuple):
    """Tiles of the three kernels."""

    forward: Tiles
    queries: Tiles
    keys: Tiles


@lru_cache
def plan(device: torch.device, on_hopper: bool = False) -> Plan:
    """Small tiles of four warps, so that a multiprocessor has two or three programs: one computes exponentials while
    another multiplies. on_hopper: those of `hopper`"""
    if on_hopper:
        large = Tiles(hopper.BLOCK, hopper.BLOCK, {})
        return Plan(large, large, Tiles(hopper.QUERIES, hopper.BLOCK, {}))
    if INTERPRET:
        return Plan(Tiles(32, 16, {}), Tiles(16, 16, {}), Tiles(16, 32, {}))
    small = Tiles(64, 64, {"num_warps": 4, "num_stages": 2})  # fits the shared memory of all cards from Ampere on
    if torch.cuda.get_device_capability(device)[0] != 9:
        return Plan(small, small, small)
    three = {"num_warps": 4, "num_stages": 3}
    return Plan(Tiles(128, 64, three), small, Tiles(64, 64, three))


def supports(q: Tensor, sources: Sequence[KeyValue]) -> bool:
    sizes = q.shape[3], sources[0].v.shape[3]
    values = [source.v for source in sources]
    # 32 bits count the numbers of a row: outputs, and what projections left
    far = max(q.shape[1] * q.shape[2] * sizes[1], *(x.shape[2] * x.stride(2) for x in (q, *values)))
    able = INTERPRET or torch.cuda.get_device_capability(q.device) >= (8, 0)
    return (
        able
        and q.dtype.itemsize == 2
        and far < 2**31
        and all(size <= most for size, most in zip(sizes, LARGEST, strict=True))
    )


def attention(
    q: Tensor,
    positions: Tensor,
    documents: Tensor | None,
    sources: Sequence[KeyValue],
    window: int | None,
    n_meta: int,
    scale: float,
) -> Tensor:
    k, v = joined(sources, q.shape[0], q.dtype)
    where = tuple(source.positions for source in sources)
    owners = None if documents is None else tuple(source.documents for source in sources)
    window = NO_WINDOW if window is None else window
    on_hopper = hopper is not None and hopper.supports(q, k, v, documents)
    mask = make_mask(positions, where, documents, owners, window, n_meta, needs_grad(q, k, v), on_hopper)
    return Attention.apply(q, k, v, mask, scale)


@triton.jit
def _see(q_at, k_at, q_doc, k_doc, reach, DOCUMENTS: tl.constexpr):
    """`visibility.visible` for positions that broadcast to a tile; reach: as from `_reach`. As unsigned numbers,
    distances to later keys are larger than any reach."""
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
def _bounds(x, block, n, SIZE: tl.constexpr):
    """Least and greatest number of each block, where x has n of them; and whether the blocks are filled"""
    at = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    numbers = tl.load(x + tl.minimum(at, n - 1))
    return tl.min(numbers, axis=1), tl.max(numbers, axis=1), (block + 1) * SIZE <= n


@triton.jit(do_not_specialize=["T", "S", "window", "n_meta"])
def _list_kernel(
    q_at, k_at, q_doc, k_doc, lists, T, S, window, n_meta,
    BM: tl.constexpr, BN: tl.constexpr, MANY: tl.constexpr, OF_KEYS: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """`blocks.touched`, listed for one block of queries (or keys) in each program, MANY of the others at a time"""
    mine, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    others = tl.cdiv(T, BM) if OF_KEYS else tl.cdiv(S, BN)
    masked = lists + (row * tl.num_programs(0) + mine) * 2 * (others + 2)
    whole = masked + others + 2
    q_at += row * T
    k_at += row * S
    q_doc += row * T
    k_doc += row * S
    n_masked, n_whole = 0, 0
    for first in range(0, others, MANY):
        other = first + tl.arange(0, MANY)
        q_block, k_block = (other, tl.full((1,), mine, tl.int32)) if OF_KEYS else (tl.full((1,), mine, tl.int32), other)
        q_min, q_max, q_filled = _bounds(q_at, q_block, T, BM)
        k_min, k_max, k_filled = _bounds(k_at, k_block, S, BN)
        some = (k_min <= q_max) & (k_min != NOBODY) & ((q_min - k_max <= window) | (k_min < n_meta))
        full = (k_max <= q_min) & ((q_max - k_min <= window) | (k_max < n_meta)) & q_filled & k_filled
        if DOCUMENTS:
            q_min, q_max, q_filled = _bounds(q_doc, q_block, T, BM)
            k_min, k_max, k_filled = _bounds(k_doc, k_block, S, BN)
            some = some & ((k_min == ALL) | ((k_min <= q_max) & (q_min <= k_max)))
            full = full & ((k_max == ALL) | ((k_min == k_max) & (k_min == q_min) & (k_min == q_max)))
        some = some & (other < others)
        full = (full & some).to(tl.int32)
        some = some.to(tl.int32) - full
        tl.store(masked + n_masked + tl.cumsum(some, 0), other, mask=some > 0)
        tl.store(whole + n_whole + tl.cumsum(full, 0), other, mask=full > 0)
        n_masked += tl.sum(some, 0)
        n_whole += tl.sum(full, 0)
    tl.store(masked, n_masked)
    tl.store(whole, n_whole)


@triton.jit
def _forward_walk(
    acc, top, total, q_tile, q_here, q_owner, k, v, k_at, k_doc, listed, S, window, n_meta, k_step, v_step, scale,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    DOCUMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    count = tl.load(listed)
    block = tl.load(listed + 1)
    for i in range(0, count):
        following = tl.load(listed + i + 2)
        s = block * BN + tl.arange(0, BN)
        k_tile = _tile(k, s, k_step, S, DK, BK, not MASKED)
        v_tile = _tile(v, s, v_step, S, DV, BV, not MASKED)
        score = tl.dot(q_tile, tl.trans(k_tile))
        if MASKED:
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
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None])
        top = new
        block = following
    return acc, top, total


@triton.jit(do_not_specialize=["T", "S", "window", "n_meta"])
def _forward_kernel(
    q, k, v, q_at, k_at, q_doc, k_doc, lists, y, lse, T, S, H, window, n_meta, scale,
    q_row, q_head, q_step, k_row, k_head, k_step, v_row, v_head, v_step, mask_row,
    R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    m = tl.num_programs(2) - 1 - tl.program_id(2)  # the last queries see most: they begin
    at = m * BM + tl.arange(0, BM)
    q_tile = _tile(q + row * q_row + head * q_head, at, q_step, T, DK, BK)
    k += row * k_row + head // R * k_head
    v += row * v_row + head // R * v_head
    masks = row * mask_row
    q_here = _where(at, q_at + masks * T, T, -1)
    q_owner = _where(at, q_doc + masks * T, T, 0) if DOCUMENTS else q_here
    k_at += masks * S
    k_doc += masks * S
    length = tl.cdiv(S, BN) + 2
    lists += (masks * tl.num_programs(2) + m) * 2 * length
    acc = tl.zeros((BM, BV), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc, top, total = _forward_walk(
        acc, top, total, q_tile, q_here, q_owner, k, v, k_at, k_doc, lists, S, window, n_meta, k_step, v_step,
        scale * LOG2E, DK, DV, BK, BV, BN, DOCUMENTS, True,
    )  # fmt: skip
    acc, top, total = _forward_walk(
        acc, top, total, q_tile, q_here, q_owner, k, v, k_at, k_doc, lists + length, S, window, n_meta, k_step, v_step,
        scale * LOG2E, DK, DV, BK, BV, BN, DOCUMENTS, False,
    )  # fmt: skip
    seen = total > 0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    _store(y + (row * T * H + head) * DV, at, H * DV, T, acc, DV, BV)
    # infinite for a query that sees nothing: its probabilities will be 0
    lse_here = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("inf"))
    tl.store(lse + (row * H + head) * T + at, lse_here, mask=at < T)


@triton.jit
def _queries_walk(
    acc, q_tile, dy_tile, lse_here, delta_here, q_here, q_owner, k, v, k_at, k_doc, listed, S, window, n_meta,
    k_step, v_step, scale,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    DOCUMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    count = tl.load(listed)
    block = tl.load(listed + 1)
    for i in range(0, count):
        following = tl.load(listed + i + 2)
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
                q_here[:, None], k_here[None, :], q_owner[:, None], k_owner[None, :],
                _reach(k_here, window, n_meta)[None, :], DOCUMENTS,
            )  # fmt: skip
            p = tl.where(see, p, 0.0)
        ds = p * (dp - delta_here[:, None])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc)
        block = following
    return acc


@triton.jit(do_not_specialize=["window", "n_meta"])
def _queries_kernel(
    q, k, v, q_at, k_at, q_doc, k_doc, lists, y, dy, lse, delta, dq, T, S, H, window, n_meta, scale,
    q_row, q_head, q_step, k_row, k_head, k_step, v_row, v_head, v_step, dy_row, dy_step, mask_row,
    R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    m = tl.num_programs(2) - 1 - tl.program_id(2)
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
    masks = row * mask_row
    q_here = _where(at, q_at + masks * T, T, -1)
    q_owner = _where(at, q_doc + masks * T, T, 0) if DOCUMENTS else q_here
    k_at += masks * S
    k_doc += masks * S
    length = tl.cdiv(S, BN) + 2
    lists += (masks * tl.num_programs(2) + m) * 2 * length
    acc = tl.zeros((BM, BK), tl.float32)
    acc = _queries_walk(
        acc, q_tile, dy_tile, lse_here, delta_here, q_here, q_owner, k, v, k_at, k_doc, lists, S, window, n_meta,
        k_step, v_step, scale * LOG2E, DK, DV, BK, BV, BN, DOCUMENTS, True,
    )  # fmt: skip
    acc = _queries_walk(
        acc, q_tile, dy_tile, lse_here, delta_here, q_here, q_owner, k, v, k_at, k_doc, lists + length, S, window,
        n_meta, k_step, v_step, scale * LOG2E, DK, DV, BK, BV, BN, DOCUMENTS, False,
    )  # fmt: skip
    _store(dq + (row * T * H + head) * DK, at, H * DK, T, acc * scale, DK, BK)


@triton.jit
def _keys_walk(
    acc_k, acc_v, k_tile, v_tile, k_here, k_owner, q, dy, q_at, q_doc, lse, delta, listed, T, window, n_meta,
    q_head, q_step, dy_step, scale,
    R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
    DOCUMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    count = tl.load(listed)
    block = tl.load(listed + 1)
    for i in range(0, count * R):
        following = tl.load(listed + (i + 1) // R + 1)
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
                q_here[None, :], k_here[:, None], q_owner[None, :], k_owner[:, None],
                _reach(k_here, window, n_meta)[:, None], DOCUMENTS,
            )  # fmt: skip
            p = tl.where(see, p, 0.0)
        acc_v = tl.dot(p.to(dy_tile.dtype), dy_tile, acc_v)
        ds = p * (dp - delta_here[None, :])
        acc_k = tl.dot(ds.to(q_tile.dtype), q_tile, acc_k)
        block = following
    return acc_k, acc_v


@triton.jit(do_not_specialize=["window", "n_meta"])
def _keys_kernel(
    q, k, v, q_at, k_at, q_doc, k_doc, lists, dy, lse, delta, dk, dv, T, S, H, window, n_meta, scale,
    q_row, q_head, q_step, k_row, k_head, k_step, v_row, v_head, v_step, dy_row, dy_step, mask_row,
    R: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    group, row, n = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    G = tl.num_programs(0)
    s = n * BN + tl.arange(0, BN)
    k_tile = _tile(k + row * k_row + group * k_head, s, k_step, S, DK, BK)
    v_tile = _tile(v + row * v_row + group * v_head, s, v_step, S, DV, BV)
    masks = row * mask_row
    k_here = _where(s, k_at + masks * S, S, NOBODY)
    k_owner = _where(s, k_doc + masks * S, S, 0) if DOCUMENTS else k_here
    q += row * q_row + group * R * q_head
    dy += row * dy_row + group * R * DV
    q_at += masks * T
    q_doc += masks * T
    lse += (row * H + group * R) * T
    delta += (row * H + group * R) * T
    length = tl.cdiv(T, BM) + 2
    lists += (masks * tl.num_programs(2) + n) * 2 * length
    acc_k = tl.zeros((BN, BK), tl.float32)
    acc_v = tl.zeros((BN, BV), tl.float32)
    acc_k, acc_v = _keys_walk(
        acc_k, acc_v, k_tile, v_tile, k_here, k_owner, q, dy, q_at, q_doc, lse, delta, lists, T, window, n_meta,
        q_head, q_step, dy_step, scale * LOG2E, R, DK, DV, BK, BV, BM, DOCUMENTS, True,
    )  # fmt: skip
    acc_k, acc_v = _keys_walk(
        acc_k, acc_v, k_tile, v_tile, k_here, k_owner, q, dy, q_at, q_doc, lse, delta, lists + length, T, window,
        n_meta, q_head, q_step, dy_step, scale * LOG2E, R, DK, DV, BK, BV, BM, DOCUMENTS, False,
    )  # fmt: skip
    _store(dk + (row * S * G + group) * DK, s, G * DK, S, acc_k * scale, DK, BK)
    _store(dv + (row * S * G + group) * DV, s, G * DV, S, acc_v, DV, BV)


class Mask(NamedTuple):
    """Positions, and for each kernel, for the blocks of its side, which of the other side they touch: (rows, blocks, 2,
    blocks of the other side + 2) int32. Of the two lists the first is of blocks that need a mask, the second of those
    that are visible whole; a list begins with its length. What stands behind it is read, but not used."""

    at: Places
    window: int
    n_meta: int
    on_hopper: bool
    forward: Tensor
    queries: Tensor | None  # where gradients are wanted
    keys: Tensor | None


@lru_cache(maxsize=8)  # tensors are keys by identity; nobody writes to a call's positions
def make_mask(
    positions: Tensor, where: tuple[Tensor, ...], documents: Tensor | None, owners: tuple[Tensor | None, ...] | None,
    window: int, n_meta: int, learns: bool, on_hopper: bool = False,
) -> Mask:  # fmt: skip
    """As `flex.block_mask`: the same for all layers with this window. learns: the backward kernels' lists, too"""
    at = places(positions, where, documents, owners)
    forward, queries, keys = plan(positions.device, on_hopper)
    of_backward = (_lists(at, window, n_meta, *x) if learns else None for x in ((queries, False), (keys, True)))
    return Mask(at, window, n_meta, on_hopper, _lists(at, window, n_meta, forward, False), *of_backward)


def _lists(at: Places, window: int, n_meta: int, tiles: Tiles, of_keys: bool) -> Tensor:
    (rows, T), S = at.q_at.shape, at.k_at.shape[1]
    mine, others = triton.cdiv(T, tiles.queries), triton.cdiv(S, tiles.keys)
    if of_keys:
        mine, others = others, mine
    lists = torch.empty(rows, mine, 2, others + 2, dtype=torch.int32, device=at.q_at.device)
    _list_kernel[(mine, rows)](
        *_places(at), lists, T, S, window, n_meta,
        BM=tiles.queries, BN=tiles.keys, MANY=32, OF_KEYS=of_keys, DOCUMENTS=at.q_doc is not None,
    )  # fmt: skip
    return lists


def _places(at: Places) -> list[Tensor]:
    return [at.q_at, at.k_at, at.q_at if at.q_doc is None else at.q_doc, at.k_at if at.k_doc is None else at.k_doc]


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


def _arguments(q: Tensor, k: Tensor, v: Tensor, mask: Mask, tiles: Tiles) -> tuple[tuple, list[int], dict]:
    """-> numbers, strides and constants that all kernels take"""
    (_, H, T, DK), (_, G, S, DV) = q.shape, v.shape
    numbers = T, S, H, mask.window, mask.n_meta
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    constants = {
        "R": H // G, "DK": DK, "DV": DV, "BK": max(16, triton.next_power_of_2(DK)),
        "BV": max(16, triton.next_power_of_2(DV)), "BM": tiles.queries, "BN": tiles.keys,
        "DOCUMENTS": mask.at.q_doc is not None, **tiles.options,
    }  # fmt: skip
    return numbers, strides, constants


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """-> y (B, T, H dv), logarithm of the sums (B, H, T)"""
    if mask.on_hopper:
        return hopper.forward(q, k, v, mask, scale)
    B, H, T, _ = q.shape
    y = torch.empty(B, T, H * v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    tiles = plan(q.device).forward
    numbers, strides, constants = _arguments(q, k, v, mask, tiles)
    _forward_kernel[(H, B, triton.cdiv(T, tiles.queries))](
        q, k, v, *_places(mask.at), mask.forward, y, lse, *numbers, scale, *strides, int(mask.at.q_at.shape[0] > 1),
        **constants,
    )  # fmt: skip
    return y, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, dy: Tensor, mask: Mask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of q, k, v"""
    if mask.on_hopper:
        return hopper.backward(q, k, v, y, lse, dy, mask, scale)
    (B, H, T, DK), (_, G, S, _) = q.shape, v.shape
    # heads lie side by side, as those of a projection do
    dq = torch.empty(B, T, H, DK, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(B, S, G, x.shape[3], dtype=x.dtype, device=x.device) for x in (k, v))
    delta = torch.empty_like(lse)
    inputs, last = (q, k, v, *_places(mask.at)), (*dy.stride()[:2], int(mask.at.q_at.shape[0] > 1))
    _, of_queries, of_keys = plan(q.device)
    numbers, strides, constants = _arguments(q, k, v, mask, of_queries)
    _queries_kernel[(H, B, triton.cdiv(T, of_queries.queries))](
        *inputs, mask.queries, y, dy, lse, delta, dq, *numbers, scale, *strides, *last, **constants
    )
    numbers, strides, constants = _arguments(q, k, v, mask, of_keys)
    _keys_kernel[(G, B, triton.cdiv(S, of_keys.keys))](
        *inputs, mask.keys, dy, lse, delta, dk, dv, *numbers, scale, *strides, *last, **constants
    )
    return tuple(x.transpose(1, 2) for x in (dq, dk, dv))
