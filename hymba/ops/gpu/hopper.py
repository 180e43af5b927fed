"""The three kernels of `flash` for Hopper cards, in Gluon, Triton's lower language (FlashAttention-3, Shah et al.,
arXiv 2407.08608).

A program has a multiprocessor for itself. One warp fetches blocks into rings in shared memory; two groups of four
warps have 64 queries (or keys) each and share what was fetched. Products are asynchronous: those of the block before go
on while exponentials of this one are computed, and one group computes exponentials while the other multiplies. Pieces
of work, a block of queries of one head or of keys of one group of heads, differ: a program takes the next when it has
room for it, from a counter that begins at 0.

    forward    S_j = Q K_j'                          under it: O's sums shrink
               O += P_(j-1) V_(j-1)                  under it: softmax of S_j
    queries    S_j = Q K_j',  dP_j = dO V_j'
               dQ += dS_(j-1) K_(j-1)                under these: P_j of S_j, then dS_j
    keys       S_j' = K Q_j',  dP_j' = V dO_j'       all heads that read them
               dV += P_(j-1)' dO_(j-1),  dK += dS_(j-1)' Q_(j-1)      under these: P_j of S_j, then dS_j

Numbers, what is kept in float32, and lists of blocks are those of `flash`, whose kernels take what these do not: texts
in documents, other sizes, other types, lengths that are no multiple of a block, work too small to fill the card.
"""
# ruff: noqa: RUF059  what partitions share comes in tuples, of which each takes what it needs

from inspect import signature
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hymba.visibility import EMPTY

if "functions_and_args" not in signature(gl.warp_specialize).parameters:
    raise ImportError("an older Triton")  # 3.5 has other arguments

if TYPE_CHECKING:
    from hymba.ops.gpu.flash import Mask

LOG2E = gl.constexpr(1.4426950408889634)
NOBODY = gl.constexpr(EMPTY)
HALF = gl.constexpr(64)  # queries or keys of a group of warps: rows of its products
DK, DV = 64, 128  # sizes of a key and a value: registers and shared memory are counted for these
BLOCK = 128  # queries or keys of a program, and keys of a block
QUERIES = 64  # of a block, for the gradients of keys
RINGS = {"forward": (3, 3), "queries": (3, 2), "keys": 4}  # blocks of keys and of values; of queries


@gluon.jit
def _barriers(N: gl.constexpr, arrivals: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), arrivals)
    return bars


@gluon.jit
def _of(ring, turn):
    return ring.index(turn % ring.shape[0])


@gluon.jit
def _wait(bars, turn):
    """Until what the barrier of this turn stands for has happened `turn // len(bars) + 1` times"""
    mbarrier.wait(_of(bars, turn), turn // bars.shape[0] & 1)


@gluon.jit
def _wait_for_room(empty, turn):
    mbarrier.wait(_of(empty, turn), (turn // empty.shape[0] & 1) ^ 1)


@gluon.jit
def _counts(lists, length):
    """-> how many blocks are masked, how many there are in all; where there are none, one that is masked"""
    masked, whole = gl.load(lists), gl.load(lists + length)
    masked = gl.where(masked + whole == 0, 1, masked)
    return masked, masked + whole


@gluon.jit
def _block(lists, i, masked, length):
    """The i-th block of both lists. What stands behind an empty list may be anything."""
    block = gl.load(lists + 1 + gl.where(i < masked, i, i - masked + length))
    return gl.minimum(gl.maximum(block, 0), length - 3)


@gluon.jit
def _see(q_at, k_at, window, n_meta):
    """As in `flash`"""
    reach = gl.where(k_at < n_meta, NOBODY, window).to(gl.uint32)
    return (q_at - k_at).to(gl.uint32) <= reach


@gluon.jit
def _tell(board, i, number, masked, n):
    """What the i-th piece of work of this program is: its number, how many blocks are masked, how many there are.

    Those who compute read the last two anew for each piece: Triton 3.6 takes a number that a loop hands on from turn to
    turn for constant where it is the bound of a loop inside.
    """
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    board.index(i % 2 * 3).store(gl.full((1,), number, gl.int32, ONE))
    board.index(i % 2 * 3 + 1).store(gl.full((1,), masked, gl.int32, ONE))
    board.index(i % 2 * 3 + 2).store(gl.full((1,), n, gl.int32, ONE))


@gluon.jit
def _told(board, i, what: gl.constexpr):
    return gl.sum(board.index(i % 2 * 3 + what).load(gl.BlockedLayout([1], [32], [4], [0])), axis=0)


@gluon.jit
def _piece(number, blocks, shape):
    """-> head, row, block of queries. The last queries see most: they come first."""
    B, T, S, H, G = shape
    return number % H, number // H % B, blocks - 1 - number // H // B


@gluon.jit
def _fetch_keys(q_desc, k_desc, v_desc, at_desc, dy_desc, y_desc, places, bars, lists, counter, mask_row, shape,
                BACKWARD: gl.constexpr):  # fmt: skip
    q_s, k_s, v_s, at_s, dy_s, board = places
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    B, T, S, H, G = shape
    DK: gl.constexpr = k_s.shape[2]
    DV: gl.constexpr = v_s.shape[2]
    BN: gl.constexpr = k_s.shape[1]
    blocks = T // (2 * HALF)
    length = S // BN + 2
    k_turn, v_turn, i = 0, 0, 0
    number = gl.atomic_add(counter, 1)
    while number < blocks * B * H:
        head, row, m = _piece(number, blocks, shape)
        mine = lists + (row * mask_row * blocks + m) * 2 * length
        masked, n = _counts(mine, length)
        _wait_for_room(q_empty, i)
        _tell(board, i, number, masked, n)
        full = _of(q_full, i)
        mbarrier.expect(full, 2 * HALF * (DK + DV if BACKWARD else DK) * 2)
        for half in gl.static_range(2):
            t = row * T + (2 * m + half) * HALF
            tma.async_copy_global_to_shared(q_desc, [t, head * DK], full, q_s.index(i % 2 * 2 + half))
            if BACKWARD:
                tma.async_copy_global_to_shared(dy_desc, [t, head * DV], full, dy_s.index(i % 2 * 2 + half))
        if BACKWARD:  # the outputs come as if they were values
            _wait_for_room(v_empty, v_turn)
            full = _of(v_full, v_turn)
            mbarrier.expect(full, 2 * HALF * DV * 2)
            tma.async_copy_global_to_shared(y_desc, [row * T + m * 2 * HALF, head * DV], full, _of(v_s, v_turn))
            v_turn += 1
        s = (row * G + head // (H // G)) * S
        for j in range(0, n):
            block = _block(mine, j, masked, length)
            _wait_for_room(k_empty, k_turn)
            full = _of(k_full, k_turn)
            mbarrier.expect(full, BN * DK * 2 + BN * 4)
            tma.async_copy_global_to_shared(k_desc, [s + block * BN, 0], full, _of(k_s, k_turn))
            tma.async_copy_global_to_shared(at_desc, [row * mask_row * S + block * BN], full, _of(at_s, k_turn))
            k_turn += 1
            _wait_for_room(v_empty, v_turn)
            full = _of(v_full, v_turn)
            mbarrier.expect(full, BN * DV * 2)
            tma.async_copy_global_to_shared(v_desc, [s + block * BN, 0], full, _of(v_s, v_turn))
            v_turn += 1
        i += 1
        number = gl.atomic_add(counter, 1)
    _wait_for_room(q_empty, i)
    _tell(board, i, number, 0, 0)
    mbarrier.arrive(_of(q_full, i))


@gluon.jit
def _softmax(s, top, total, scale, q_here, at, window, n_meta, MASKED: gl.constexpr, S_L: gl.constexpr):
    if MASKED:
        k_here = at.load(gl.SliceLayout(0, S_L))
        see = _see(gl.expand_dims(q_here, 1), gl.expand_dims(k_here, 0), window, n_meta)
        s = gl.where(see, s, float("-inf"))
    new = gl.maximum(top, gl.max(s, axis=1) * scale)
    base = gl.where(new == float("-inf"), 0.0, new) if MASKED else new
    p = gl.exp2(s * scale - gl.expand_dims(base, 1))
    shrink = gl.exp2(top - base)
    return p, new, total * shrink + gl.sum(p, axis=1), shrink


@gluon.jit
def _weighted(acc, p, shrink, v, O_L: gl.constexpr):
    """acc shrink + p v, begun"""
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, O_L)), 1)
    return warpgroup_mma(gl.convert_layout(p.to(v.dtype), gl.DotOperandLayout(0, O_L, 2)), v, acc, is_async=True)


@gluon.jit
def _forward_walk(first, last, turn, sums, q, q_here, places, bars, scale, window, n_meta, MASKED: gl.constexpr,
                  S_L: gl.constexpr, O_L: gl.constexpr):  # fmt: skip
    q_s, k_s, v_s, at_s, y_s, board = places
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    acc, p, top, total, shrink = sums
    BN: gl.constexpr = k_s.shape[1]
    for _ in range(first, last):
        _wait(k_full, turn)
        _wait(v_full, turn - 1)
        none = gl.zeros((HALF, BN), gl.float32, S_L)
        s = warpgroup_mma(q, _of(k_s, turn).permute((1, 0)), none, use_acc=False, is_async=True)
        acc = _weighted(acc, p, shrink, _of(v_s, turn - 1), O_L)
        s = warpgroup_mma_wait(1, deps=(s,))
        p, top, total, shrink = _softmax(s, top, total, scale, q_here, _of(at_s, turn), window, n_meta, MASKED, S_L)
        mbarrier.arrive(_of(k_empty, turn))
        # it has come long ago: this branch keeps ptxas from moving the exponentials behind the next line
        _wait(v_full, turn - 1)
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        mbarrier.arrive(_of(v_empty, turn - 1))
        turn += 1
    return turn, (acc, p, top, total, shrink)


@gluon.jit
def _forward_half(half: gl.constexpr, y_desc, places, bars, inputs):
    q_at, lse, window, n_meta, mask_row, scale, shape = inputs
    q_s, k_s, v_s, at_s, y_s, board = places
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    B, T, S, H, G = shape
    BN: gl.constexpr = k_s.shape[1]
    DV: gl.constexpr = v_s.shape[2]
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, S_L)
    blocks = T // (2 * HALF)
    here = half * HALF + gl.arange(0, HALF, ROWS)
    turn, i = 0, 0
    _wait(q_full, i)
    number = _told(board, i, 0)
    while number < blocks * B * H:
        head, row, m = _piece(number, blocks, shape)
        q_here = gl.load(q_at + row * mask_row * T + m * 2 * HALF + here)
        masked, n = _told(board, i, 1), _told(board, i, 2)
        q = q_s.index(i % 2 * 2 + half)
        # the first block is masked, whether it needs to be or not
        _wait(k_full, turn)
        none = gl.zeros((HALF, BN), gl.float32, S_L)
        s = warpgroup_mma(q, _of(k_s, turn).permute((1, 0)), none, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        top = gl.full((HALF,), float("-inf"), gl.float32, ROWS)
        total = gl.zeros((HALF,), gl.float32, ROWS)
        p, top, total, shrink = _softmax(s, top, total, scale, q_here, _of(at_s, turn), window, n_meta, True, S_L)
        mbarrier.arrive(_of(k_empty, turn))
        turn += 1
        sums = gl.zeros((HALF, DV), gl.float32, O_L), p, top, total, shrink
        middle = gl.maximum(masked, 1)
        turn, sums = _forward_walk(
            1, middle, turn, sums, q, q_here, places, bars, scale, window, n_meta, True, S_L, O_L
        )
        turn, sums = _forward_walk(
            middle, n, turn, sums, q, q_here, places, bars, scale, window, n_meta, False, S_L, O_L
        )
        mbarrier.arrive(_of(q_empty, i))
        acc, p, top, total, shrink = sums
        _wait(v_full, turn - 1)
        acc = _weighted(acc, p, shrink, _of(v_s, turn - 1), O_L)
        seen = total > 0
        # infinite for a query that sees nothing: its probabilities will be 0
        lse_here = gl.where(seen, top + gl.log2(gl.where(seen, total, 1.0)), float("inf"))
        gl.store(lse + (row * H + head) * T + m * 2 * HALF + here, lse_here)
        share = gl.convert_layout(1.0 / gl.where(seen, total, 1.0), gl.SliceLayout(1, O_L))
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(_of(v_empty, turn - 1))
        tma.store_wait(0)
        y_s.index(half).store((acc * gl.expand_dims(share, 1)).to(y_s.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [row * T + (2 * m + half) * HALF, head * DV], y_s.index(half))
        i += 1
        _wait(q_full, i)
        number = _told(board, i, 0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["B", "H", "G", "window", "n_meta"])
def _forward_kernel(q_desc, k_desc, v_desc, at_desc, y_desc, q_at, lists, counter, lse, B, T, S, H, G, window, n_meta,
                    mask_row, scale, KS: gl.constexpr, VS: gl.constexpr):  # fmt: skip
    shape = B, T, S, H, G
    q_s = gl.allocate_shared_memory(q_desc.dtype, [4] + q_desc.block_type.shape, q_desc.layout)
    k_s = gl.allocate_shared_memory(q_desc.dtype, [KS] + k_desc.block_type.shape, k_desc.layout)
    v_s = gl.allocate_shared_memory(q_desc.dtype, [VS] + v_desc.block_type.shape, v_desc.layout)
    at_s = gl.allocate_shared_memory(gl.int32, [KS] + at_desc.block_type.shape, at_desc.layout)
    y_s = gl.allocate_shared_memory(q_desc.dtype, [2] + y_desc.block_type.shape, y_desc.layout)
    bars = (_barriers(2, 1), _barriers(2, 2), _barriers(KS, 1), _barriers(KS, 2), _barriers(VS, 1), _barriers(VS, 2))
    board = gl.allocate_shared_memory(gl.int32, [6, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    places = q_s, k_s, v_s, at_s, y_s, board
    inputs = q_at, lse, window, n_meta, mask_row, scale * LOG2E, shape
    gl.warp_specialize(
        [
            (_forward_half, (0, y_desc, places, bars, inputs)),
            (_forward_half, (1, y_desc, places, bars, inputs)),
            (_fetch_keys, (q_desc, k_desc, v_desc, at_desc, q_desc, q_desc, (q_s, k_s, v_s, at_s, q_s, board), bars,
                           lists, counter, mask_row, shape, False)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _queries_walk(first, last, k_turn, v_turn, acc, ds, q, dy, lse_here, delta_here, q_here, places, bars, scale,
                  window, n_meta, MASKED: gl.constexpr, S_L: gl.constexpr, Q_L: gl.constexpr):  # fmt: skip
    q_s, k_s, v_s, at_s, dy_s, dq_s, board = places
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    BN: gl.constexpr = k_s.shape[1]
    for j in range(first, last):
        # in the first turn ds is 0, and this block, which has come, stands for the one before
        before = k_turn - (j > 0).to(gl.int32)
        _wait(k_full, k_turn)
        _wait(v_full, v_turn)
        none = gl.zeros((HALF, BN), gl.float32, S_L)
        s = warpgroup_mma(q, _of(k_s, k_turn).permute((1, 0)), none, use_acc=False, is_async=True)
        dp = warpgroup_mma(dy, _of(v_s, v_turn).permute((1, 0)), none, use_acc=False, is_async=True)
        acc = warpgroup_mma(ds, _of(k_s, before), acc, is_async=True)
        s = warpgroup_mma_wait(2, deps=(s,))
        p = gl.exp2(s * scale - gl.expand_dims(lse_here, 1))
        if MASKED:
            k_here = _of(at_s, k_turn).load(gl.SliceLayout(0, S_L))
            see = _see(gl.expand_dims(q_here, 1), gl.expand_dims(k_here, 0), window, n_meta)
            p = gl.where(see, p, 0.0)
        _wait(k_full, k_turn)  # as in `_forward_walk`
        dp, p = warpgroup_mma_wait(1, deps=(dp, p))
        mbarrier.arrive(_of(v_empty, v_turn))
        x = p * (dp - gl.expand_dims(delta_here, 1))
        acc, x = warpgroup_mma_wait(0, deps=(acc, x))
        mbarrier.arrive(_of(k_empty, before), pred=j > 0)
        ds = gl.convert_layout(x.to(k_s.dtype), Q_L)
        k_turn += 1
        v_turn += 1
    return k_turn, v_turn, acc, ds


@gluon.jit
def _queries_half(half: gl.constexpr, dq_desc, places, bars, inputs):
    q_at, lse, delta, window, n_meta, mask_row, scale, shape = inputs
    q_s, k_s, v_s, at_s, dy_s, dq_s, board = places
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    B, T, S, H, G = shape
    BN: gl.constexpr = k_s.shape[1]
    DK: gl.constexpr = k_s.shape[2]
    DV: gl.constexpr = v_s.shape[2]
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    A_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK, 16])
    V_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    Q_L: gl.constexpr = gl.DotOperandLayout(0, A_L, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, S_L)
    blocks = T // (2 * HALF)
    here = half * HALF + gl.arange(0, HALF, ROWS)
    k_turn, v_turn, i = 0, 0, 0
    _wait(q_full, i)
    number = _told(board, i, 0)
    while number < blocks * B * H:
        head, row, m = _piece(number, blocks, shape)
        q_here = gl.load(q_at + row * mask_row * T + m * 2 * HALF + here)
        lse_here = gl.load(lse + (row * H + head) * T + m * 2 * HALF + here)
        masked, n = _told(board, i, 1), _told(board, i, 2)
        q = q_s.index(i % 2 * 2 + half)
        dy = dy_s.index(i % 2 * 2 + half)
        _wait(v_full, v_turn)
        y = _of(v_s, v_turn).slice(half * HALF, HALF)
        product = dy.load(V_L).to(gl.float32) * y.load(V_L).to(gl.float32)
        mbarrier.arrive(_of(v_empty, v_turn))
        v_turn += 1
        delta_here = gl.convert_layout(gl.sum(product, axis=1), ROWS)
        gl.store(delta + (row * H + head) * T + m * 2 * HALF + here, delta_here)
        acc = gl.zeros((HALF, DK), gl.float32, A_L)
        ds = gl.zeros((HALF, BN), k_s.dtype, Q_L)
        k_turn, v_turn, acc, ds = _queries_walk(
            0, masked, k_turn, v_turn, acc, ds, q, dy, lse_here, delta_here, q_here, places, bars, scale * LOG2E,
            window, n_meta, True, S_L, Q_L,
        )  # fmt: skip
        k_turn, v_turn, acc, ds = _queries_walk(
            masked, n, k_turn, v_turn, acc, ds, q, dy, lse_here, delta_here, q_here, places, bars, scale * LOG2E,
            window, n_meta, False, S_L, Q_L,
        )  # fmt: skip
        acc = warpgroup_mma(ds, _of(k_s, k_turn - 1), acc, is_async=True)
        mbarrier.arrive(_of(q_empty, i))
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(_of(k_empty, k_turn - 1))
        tma.store_wait(0)
        dq_s.index(half).store((acc * scale).to(dq_s.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(dq_desc, [row * T + (2 * m + half) * HALF, head * DK], dq_s.index(half))
        i += 1
        _wait(q_full, i)
        number = _told(board, i, 0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["B", "H", "G", "window", "n_meta"])
def _queries_kernel(q_desc, k_desc, v_desc, at_desc, y_desc, dy_desc, dq_desc, q_at, lists, counter, lse, delta, B, T,
                    S, H, G, window, n_meta, mask_row, scale, KS: gl.constexpr, VS: gl.constexpr):  # fmt: skip
    shape = B, T, S, H, G
    q_s = gl.allocate_shared_memory(q_desc.dtype, [4] + q_desc.block_type.shape, q_desc.layout)
    dy_s = gl.allocate_shared_memory(q_desc.dtype, [4] + dy_desc.block_type.shape, dy_desc.layout)
    dq_s = gl.allocate_shared_memory(q_desc.dtype, [2] + dq_desc.block_type.shape, dq_desc.layout)
    k_s = gl.allocate_shared_memory(q_desc.dtype, [KS] + k_desc.block_type.shape, k_desc.layout)
    v_s = gl.allocate_shared_memory(q_desc.dtype, [VS] + v_desc.block_type.shape, v_desc.layout)
    at_s = gl.allocate_shared_memory(gl.int32, [KS] + at_desc.block_type.shape, at_desc.layout)
    bars = (_barriers(2, 1), _barriers(2, 2), _barriers(KS, 1), _barriers(KS, 2), _barriers(VS, 1), _barriers(VS, 2))
    board = gl.allocate_shared_memory(gl.int32, [6, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    places = q_s, k_s, v_s, at_s, dy_s, dq_s, board
    inputs = q_at, lse, delta, window, n_meta, mask_row, scale, shape
    gl.warp_specialize(
        [
            (_queries_half, (0, dq_desc, places, bars, inputs)),
            (_queries_half, (1, dq_desc, places, bars, inputs)),
            (_fetch_keys, (q_desc, k_desc, v_desc, at_desc, dy_desc, y_desc, (q_s, k_s, v_s, at_s, dy_s, board), bars,
                           lists, counter, mask_row, shape, True)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _fetch_queries(q_desc, dy_desc, at_desc, lse_desc, delta_desc, k_desc, v_desc, places, bars, lists, counter,
                   mask_row, shape):  # fmt: skip
    q_s, dy_s, at_s, lse_s, delta_s, k_s, v_s, board = places
    k_full, k_empty, full, empty = bars
    B, T, S, H, G = shape
    BM: gl.constexpr = q_s.shape[1]
    DK: gl.constexpr = k_s.shape[2]
    DV: gl.constexpr = v_s.shape[2]
    R = H // G
    blocks = S // (2 * HALF)
    length = T // BM + 2
    turn, i = 0, 0
    number = gl.atomic_add(counter, 1)
    while number < blocks * B * G:
        group, row, n = number % G, number // G % B, number // G // B
        mine = lists + (row * mask_row * blocks + n) * 2 * length
        masked, count = _counts(mine, length)
        _wait_for_room(k_empty, i)
        _tell(board, i, number, masked, count)
        bar = k_full.index(0)
        mbarrier.expect(bar, 2 * HALF * (DK + DV) * 2)
        for half in gl.static_range(2):
            s = (row * G + group) * S + (2 * n + half) * HALF
            tma.async_copy_global_to_shared(k_desc, [s, 0], bar, k_s.index(half))
            tma.async_copy_global_to_shared(v_desc, [s, 0], bar, v_s.index(half))
        i += 1
        for j in range(0, count * R):
            t = _block(mine, j // R, masked, length) * BM
            head = group * R + j % R
            line = (row * H + head) * T + t
            _wait_for_room(empty, turn)
            bar = _of(full, turn)
            mbarrier.expect(bar, BM * (DK + DV) * 2 + 3 * BM * 4)
            tma.async_copy_global_to_shared(q_desc, [row * T + t, head * DK], bar, _of(q_s, turn))
            tma.async_copy_global_to_shared(lse_desc, [line], bar, _of(lse_s, turn))
            tma.async_copy_global_to_shared(at_desc, [row * mask_row * T + t], bar, _of(at_s, turn))
            tma.async_copy_global_to_shared(dy_desc, [row * T + t, head * DV], bar, _of(dy_s, turn))
            tma.async_copy_global_to_shared(delta_desc, [line], bar, _of(delta_s, turn))
            turn += 1
        number = gl.atomic_add(counter, 1)
    _wait_for_room(k_empty, i)
    _tell(board, i, number, 0, 0)
    mbarrier.arrive(k_full.index(0))


@gluon.jit
def _keys_walk(first, last, turn, sums, k, v, k_here, places, bars, scale, window, n_meta, MASKED: gl.constexpr,
               S_L: gl.constexpr, K_L: gl.constexpr, V_L: gl.constexpr):  # fmt: skip
    q_s, dy_s, at_s, lse_s, delta_s, k_s, v_s, board = places
    k_full, k_empty, full, empty = bars
    acc_k, acc_v, p, ds = sums
    BM: gl.constexpr = q_s.shape[1]
    COLUMNS: gl.constexpr = gl.SliceLayout(0, S_L)
    for j in range(first, last):
        # in the first turn p and ds are 0, and this block, which has come, stands for the one before
        before = turn - (j > 0).to(gl.int32)
        _wait(full, turn)
        none = gl.zeros((HALF, BM), gl.float32, S_L)
        s = warpgroup_mma(k, _of(q_s, turn).permute((1, 0)), none, use_acc=False, is_async=True)
        dp = warpgroup_mma(v, _of(dy_s, turn).permute((1, 0)), none, use_acc=False, is_async=True)
        acc_v = warpgroup_mma(p, _of(dy_s, before), acc_v, is_async=True)
        acc_k = warpgroup_mma(ds, _of(q_s, before), acc_k, is_async=True)
        s = warpgroup_mma_wait(3, deps=(s,))
        x = gl.exp2(s * scale - gl.expand_dims(_of(lse_s, turn).load(COLUMNS), 0))
        if MASKED:
            q_here = _of(at_s, turn).load(COLUMNS)
            see = _see(gl.expand_dims(q_here, 0), gl.expand_dims(k_here, 1), window, n_meta)
            x = gl.where(see, x, 0.0)
        _wait(full, turn)  # as in `_forward_walk`
        dp, x = warpgroup_mma_wait(2, deps=(dp, x))
        y = x * (dp - gl.expand_dims(_of(delta_s, turn).load(COLUMNS), 0))
        acc_v, acc_k, x, y = warpgroup_mma_wait(0, deps=(acc_v, acc_k, x, y))
        mbarrier.arrive(_of(empty, before), pred=j > 0)
        p = gl.convert_layout(x.to(q_s.dtype), V_L)
        ds = gl.convert_layout(y.to(q_s.dtype), K_L)
        turn += 1
    return turn, (acc_k, acc_v, p, ds)


@gluon.jit
def _keys_half(half: gl.constexpr, dk_desc, dv_desc, places, bars, inputs):
    k_at, window, n_meta, mask_row, scale, shape = inputs
    q_s, dy_s, at_s, lse_s, delta_s, k_s, v_s, board = places
    k_full, k_empty, full, empty = bars
    B, T, S, H, G = shape
    BM: gl.constexpr = q_s.shape[1]
    DK: gl.constexpr = k_s.shape[2]
    DV: gl.constexpr = v_s.shape[2]
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    AK_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK, 16])
    AV_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    K_L: gl.constexpr = gl.DotOperandLayout(0, AK_L, 2)
    V_L: gl.constexpr = gl.DotOperandLayout(0, AV_L, 2)
    R = H // G
    blocks = S // (2 * HALF)
    here = half * HALF + gl.arange(0, HALF, gl.SliceLayout(1, S_L))
    turn, i = 0, 0
    _wait(k_full, i)
    number = _told(board, i, 0)
    while number < blocks * B * G:
        group, row, n = number % G, number // G % B, number // G // B
        k_here = gl.load(k_at + row * mask_row * S + n * 2 * HALF + here)
        masked, count = _told(board, i, 1), _told(board, i, 2)
        k = k_s.index(half).load(gl.DotOperandLayout(0, S_L, 2))  # shared memory is busy enough with v
        v = v_s.index(half)
        acc_k = gl.zeros((HALF, DK), gl.float32, AK_L)
        acc_v = gl.zeros((HALF, DV), gl.float32, AV_L)
        sums = acc_k, acc_v, gl.zeros((HALF, BM), q_s.dtype, V_L), gl.zeros((HALF, BM), q_s.dtype, K_L)
        turn, sums = _keys_walk(
            0, masked * R, turn, sums, k, v, k_here, places, bars, scale * LOG2E, window, n_meta, True, S_L, K_L, V_L
        )
        turn, sums = _keys_walk(
            masked * R, count * R, turn, sums, k, v, k_here, places, bars, scale * LOG2E, window, n_meta, False,
            S_L, K_L, V_L,
        )  # fmt: skip
        acc_k, acc_v, p, ds = sums
        acc_v = warpgroup_mma(p, _of(dy_s, turn - 1), acc_v, is_async=True)
        acc_k = warpgroup_mma(ds, _of(q_s, turn - 1), acc_k, is_async=True)
        acc_k, acc_v = warpgroup_mma_wait(0, deps=(acc_k, acc_v))
        mbarrier.arrive(_of(empty, turn - 1))
        # gradients leave from the places of what they are the gradients of
        k_s.index(half).store((acc_k * scale).to(k_s.dtype))
        v_s.index(half).store(acc_v.to(v_s.dtype))
        fence_async_shared()
        s = row * S + (2 * n + half) * HALF
        tma.async_copy_shared_to_global(dk_desc, [s, group * DK], k_s.index(half))
        tma.async_copy_shared_to_global(dv_desc, [s, group * DV], v_s.index(half))
        tma.store_wait(0)
        mbarrier.arrive(k_empty.index(0))
        i += 1
        _wait(k_full, i)
        number = _told(board, i, 0)


@gluon.jit(do_not_specialize=["B", "H", "G", "window", "n_meta"])
def _keys_kernel(q_desc, dy_desc, at_desc, lse_desc, delta_desc, k_desc, v_desc, dk_desc, dv_desc, k_at, lists, counter,
                 B, T, S, H, G, window, n_meta, mask_row, scale, QS: gl.constexpr):  # fmt: skip
    shape = B, T, S, H, G
    q_s = gl.allocate_shared_memory(q_desc.dtype, [QS] + q_desc.block_type.shape, q_desc.layout)
    dy_s = gl.allocate_shared_memory(q_desc.dtype, [QS] + dy_desc.block_type.shape, dy_desc.layout)
    at_s = gl.allocate_shared_memory(gl.int32, [QS] + at_desc.block_type.shape, at_desc.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [QS] + lse_desc.block_type.shape, lse_desc.layout)
    delta_s = gl.allocate_shared_memory(gl.float32, [QS] + delta_desc.block_type.shape, delta_desc.layout)
    k_s = gl.allocate_shared_memory(q_desc.dtype, [2] + k_desc.block_type.shape, k_desc.layout)
    v_s = gl.allocate_shared_memory(q_desc.dtype, [2] + v_desc.block_type.shape, v_desc.layout)
    board = gl.allocate_shared_memory(gl.int32, [6, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    places = q_s, dy_s, at_s, lse_s, delta_s, k_s, v_s, board
    bars = _barriers(1, 1), _barriers(1, 2), _barriers(QS, 1), _barriers(QS, 2)
    inputs = k_at, window, n_meta, mask_row, scale, shape
    gl.warp_specialize(
        [
            (_keys_half, (0, dk_desc, dv_desc, places, bars, inputs)),
            (_keys_half, (1, dk_desc, dv_desc, places, bars, inputs)),
            (_fetch_queries, (q_desc, dy_desc, at_desc, lse_desc, delta_desc, k_desc, v_desc, places, bars, lists,
                              counter, mask_row, shape)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def supports(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> bool:
    (B, H, T, dk), S = q.shape, k.shape[2]
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and documents is None
        and q.dtype == torch.bfloat16
        and (dk, v.shape[3]) == (DK, DV)
        and T % BLOCK == 0
        and S % BLOCK == 0
        and _processors(q.device) <= B * H * T // BLOCK
    )


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _described(x: Tensor, *block: int) -> TensorDescriptor:
    kind = {torch.bfloat16: gl.bfloat16, torch.float32: gl.float32, torch.int32: gl.int32}[x.dtype]
    return TensorDescriptor.from_tensor(x, list(block), gl.NVMMASharedLayout.get_default_for(list(block), kind))


def _matrix(x: Tensor) -> Tensor:
    """(B, T, ...) -> (B T, ...), without a copy if rows of a batch lie as far apart as steps do"""
    x = x.reshape(x.shape[0] * x.shape[1], -1)
    return x if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 else x.contiguous()


def _numbers(q: Tensor, k: Tensor, mask: "Mask", scale: float) -> tuple:
    (B, H, T, _), (_, G, S, _) = q.shape, k.shape
    return B, T, S, H, G, mask.window, mask.n_meta, int(mask.at.q_at.shape[0] > 1), scale


def forward(q: Tensor, k: Tensor, v: Tensor, mask: "Mask", scale: float) -> tuple[Tensor, Tensor]:
    """As `flash.forward`"""
    B, H, T, _ = q.shape
    y = torch.empty(B, T, H * DV, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    KS, VS = RINGS["forward"]
    _forward_kernel[(_processors(q.device),)](
        _described(_matrix(q.transpose(1, 2)), HALF.value, DK), _described(_matrix(k.flatten(0, 1)), BLOCK, DK),
        _described(_matrix(v.flatten(0, 1)), BLOCK, DV), _described(mask.at.k_at.view(-1), BLOCK),
        _described(_matrix(y), HALF.value, DV), mask.at.q_at, mask.forward, counter, lse, *_numbers(q, k, mask, scale),
        KS=KS, VS=VS, num_warps=4,
    )  # fmt: skip
    return y, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, dy: Tensor, mask: "Mask", scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `flash.backward`"""
    (B, H, T, _), (_, G, S, _) = q.shape, k.shape
    dq = torch.empty(B, T, H, DK, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(B, S, G, x.shape[3], dtype=x.dtype, device=x.device) for x in (k, v))
    delta = torch.empty_like(lse)
    counters = torch.zeros(2, 4, dtype=torch.int32, device=q.device)
    half, (KS, VS), QS = HALF.value, RINGS["queries"], RINGS["keys"]
    q_rows, dy_rows = _matrix(q.transpose(1, 2)), _matrix(dy)
    k_rows, v_rows = (_matrix(x.flatten(0, 1)) for x in (k, v))
    grid, numbers = (_processors(q.device),), _numbers(q, k, mask, scale)
    _queries_kernel[grid](
        _described(q_rows, half, DK), _described(k_rows, BLOCK, DK), _described(v_rows, BLOCK, DV),
        _described(mask.at.k_at.view(-1), BLOCK), _described(_matrix(y), BLOCK, DV), _described(dy_rows, half, DV),
        _described(_matrix(dq), half, DK), mask.at.q_at, mask.queries, counters[0], lse, delta, *numbers,
        KS=KS, VS=VS, num_warps=4,
    )  # fmt: skip
    _keys_kernel[grid](
        _described(q_rows, QUERIES, DK), _described(dy_rows, QUERIES, DV), _described(mask.at.q_at.view(-1), QUERIES),
        _described(lse.view(-1), QUERIES), _described(delta.view(-1), QUERIES), _described(k_rows, half, DK),
        _described(v_rows, half, DV), _described(_matrix(dk), half, DK), _described(_matrix(dv), half, DV),
        mask.at.k_at, mask.keys, counters[1], *numbers, QS=QS, num_warps=4,
    )  # fmt: skip
    return tuple(x.transpose(1, 2) for x in (dq, dk, dv))
