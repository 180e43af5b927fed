"""Decoding one token: kernels that a CUDA graph chains (`hymba/engine/cuda.py`). None knows a length on the host.

`gemv` is the matrix-vector product of a batch of one, which reads each weight once and is all that such a step costs;
what stands before and after a product is folded into it:

    y = W x                                     plain
    y = W (w x) s(x)                            behind an RMSNorm: s, a scalar, is found along the way
    y = W (a s(a) + b s(b)) / 2                 behind the mean of the branches' norms, which come weighted, and with
                                                the sums of squares that s needs
    SiLU(W x) (V x), relu(W x)^2, + residual    after it

Rows of W are asked for before a kernel looks at x: the kernels of a step overlap (`common.overlap`), so that the
weights of a product are on their way while the kernels before it still run, and memory never waits for a launch. On
cards that have bulk copies the product is in CUDA C++, and rows come to shared memory (gemv.cu; `gemv_cuda.fits`
chooses); in Triton's, for the others, a warp owns a row, in registers.

Between the products of a batch of one stand two kernels (`branches`): `attend_and_project`, attention over pieces of
the keys beside the projection of B, C and dt, and `merge_and_scan`, which joins the pieces beside the recurrence's
step. Queries and keys are rotated, and the convolution is taken, where they are used, more than once: a kernel of its
own would cost more. Larger batches have one, `prepare`, and `scan_step`, which norms B and C and takes the recurrence's
step. In front of all layers `begin` finds embeddings and positions.

float32: everything between load and store.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.gpu import gemv_cuda
from hymba.ops.gpu.common import INTERPRET, LOG2E, inputs_ready, let_next_begin, overlap, softplus
from hymba.ops.gpu.decode import absorb, merge_head, plan, store_piece
from hymba.visibility import KeyValue

NO_ACTIVATION, GATED_SILU, SQUARED_RELU = 0, 1, 2
COLUMNS = 16 if INTERPRET else 256  # of a row of weights in a load of one warp, 16 bytes a lane


def _at_most(registers: int, x: Tensor) -> dict[str, bool | int]:
    """`overlap` for a kernel that needs no more when its weights x have two bytes: room for the programs after it"""
    options = overlap(x.device)
    return {**options, "maxnreg": registers} if options["PDL"] and x.dtype.itemsize == 2 else options


@triton.jit
def _rows_of(w, r, real_r, K: tl.constexpr, BK: tl.constexpr):
    """Rows r of w (rows, K), whole -> a tuple of (BN, BK) tiles"""
    k = tl.arange(0, BK)
    at = w + r.to(tl.int64)[:, None] * K + k[None, :]
    tiles = ()
    for k0 in tl.static_range(0, K, BK):
        tiles = tiles + (tl.load(at + k0, mask=real_r[:, None] & (k0 + k < K)[None, :], other=0.0),)
    return tiles


@triton.jit
def _gemv_rows(
    number, x, x_norm, x2, squares, heads, w, w2, residual, y, rows, eps, K: tl.constexpr,
    NORM: tl.constexpr, MEAN: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows number BN .. (number + 1) BN - 1 of a product; waits for its inputs once its weights are on their way."""
    r, k = number * BN + tl.arange(0, BN), tl.arange(0, BK)
    real_r = r < rows
    tiles = _rows_of(w, r, real_r, K, BK)
    if ACTIVATION == 1:
        others = _rows_of(w2, r, real_r, K, BK)
    # every warp reads x for itself, in the layout of its weights: no exchange through shared memory
    same = tl.zeros((BN,), tl.int32)[:, None]
    across = same + k[None, :]
    if NORM:
        norms = ()
        for k0 in tl.static_range(0, K, BK):
            norms = norms + (tl.load(x_norm + k0 + across, mask=k0 + across < K, other=0.0),)
    inputs_ready(PDL)
    if MEAN > 0:
        i = same + tl.arange(0, MEAN)[None, :]
        square = tl.load(squares + i)
        share = 0.5 * tl.rsqrt(tl.sum(tl.where(i < heads, square, 0.0), axis=1) / K + eps)
        share2 = 0.5 * tl.rsqrt(tl.sum(tl.where(i < heads, 0.0, square), axis=1) / K + eps)
    acc, acc2 = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BK), tl.float32)
    square = tl.zeros((BN, BK), tl.float32)
    for k0 in tl.static_range(0, K, BK):
        real = k0 + across < K
        tile = tiles[k0 // BK].to(tl.float32)
        value = tl.load(x + k0 + across, mask=real, other=0.0).to(tl.float32)
        if NORM:
            square += value * value
            value *= norms[k0 // BK].to(tl.float32)
        if MEAN > 0:
            other = tl.load(x2 + k0 + across, mask=real, other=0.0).to(tl.float32)
            value = value * share[:, None] + other * share2[:, None]
        acc += tile * value
        if ACTIVATION == 1:
            acc2 += others[k0 // BK].to(tl.float32) * value
    out = tl.sum(acc, axis=1)
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(square, axis=1) / K + eps)
        out *= scale
    if ACTIVATION == 1:
        out = out * tl.sigmoid(out) * tl.sum(acc2, axis=1) * scale
    if ACTIVATION == 2:
        out = tl.maximum(out, 0.0)
        out = out * out
    if RESIDUAL:
        out += tl.load(residual + r, mask=real_r, other=0.0).to(tl.float32)
    tl.store(y + r, out.to(y.dtype.element_ty), mask=real_r)


@triton.jit
def _gemv_kernel(
    x, x_norm, x2, squares, heads, w, w2, residual, y, rows, eps, K: tl.constexpr,
    NORM: tl.constexpr, MEAN: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_begin(PDL)
    _gemv_rows(tl.program_id(0), x, x_norm, x2, squares, heads, w, w2, residual, y, rows, eps, K, NORM, MEAN,
               ACTIVATION, RESIDUAL, BN, BK, PDL)  # fmt: skip


def gemv(
    x: Tensor, w: Tensor, y: Tensor, *, norm: Tensor | None = None, eps: float = 0.0,
    mean_with: tuple[Tensor, Tensor, int] | None = None, up: Tensor | None = None, squared_relu: bool = False,
    residual: Tensor | None = None, early: bool = True,
) -> None:  # fmt: skip
    """x: (K,), w: (rows, K) -> y: (rows,), which is written. norm: weight of an RMSNorm of x; mean_with: (the other
    branch, sums of squares, how many of them are those of x), as from `branches`; up: (rows, K), makes this
    SiLU(W x) (V x); residual: (rows,), is added; early: begin while the kernel before this one still runs. Then the
    kernel after this one may do so, too"""
    rows, K = w.shape
    x2, squares, heads = mean_with or (x, x, 0)
    form = {
        "NORM": int(norm is not None), "MEAN": squares.shape[0] if mean_with else 0,
        "ACTIVATION": GATED_SILU if up is not None else SQUARED_RELU if squared_relu else NO_ACTIVATION,
        "RESIDUAL": int(residual is not None),
    }  # fmt: skip
    arguments = x, norm, x2, squares, heads, w, up, residual, y, rows, eps
    if gemv_cuda.fits(*arguments):
        gemv_cuda.gemv(arguments, form, early)
        return
    BN = 8 if rows >= 4096 and up is None else 4
    # at 154 registers, four programs of the 1.5B shape's 400 would have to wait until others are done
    options = _at_most(128, w) if mean_with else overlap(x.device) if early else {"PDL": False}
    _gemv_kernel[(triton.cdiv(rows, BN),)](*arguments, K, **form, BN=BN, BK=COLUMNS, num_warps=BN, **options)


@triton.jit
def _head(x, weight, cos, sin, eps, D: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr, TYPE: tl.constexpr):
    """One head, normed if NORM, rotated by cos and sin (D / 2 of each)."""
    d = tl.arange(0, BD)
    half = D // 2
    other = tl.where(d < half, d + half, d - half)
    angle = tl.where(d < half, d, d - half)
    mine = tl.load(x + d, mask=d < D, other=0.0).to(tl.float32)
    theirs = tl.load(x + other, mask=d < D, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(mine * mine, axis=0) / D + eps)
        mine = (mine * scale).to(TYPE).to(tl.float32) * tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
        theirs = (theirs * scale).to(TYPE).to(tl.float32) * tl.load(weight + other, mask=d < D, other=0.0).to(
            tl.float32
        )
    c = tl.load(cos + angle, mask=d < D, other=0.0)
    s = tl.load(sin + angle, mask=d < D, other=0.0)
    return mine * c + tl.where(d < half, -theirs, theirs) * s


@triton.jit
def _prepare_kernel(
    proj, lengths, cos, sin, q_norm, k_norm, q, k_store, v_store, conv_weight, conv_bias, conv_state, u,
    E, proj_row, k_row, k_head, v_row, v_head, slots, u_at, eps,
    H: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    K: tl.constexpr, BE: tl.constexpr, NORM: tl.constexpr, KV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_begin(PDL)
    job = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    proj += row * proj_row
    token = tl.load(lengths + row)
    if job < H:
        inputs_ready(PDL)
        y = _head(proj + job * DK, q_norm + job * DK, cos + token * (DK // 2), sin + token * (DK // 2), eps, DK, BK,
                  NORM,
                  proj.dtype.element_ty)  # fmt: skip
        d = tl.arange(0, BK)
        tl.store(q + (row * H + job) * DK + d, y.to(q.dtype.element_ty), mask=d < DK)
    elif job < H + KV * G:
        inputs_ready(PDL)
        group = job - H
        slot = token % slots
        y = _head(proj + (H + group) * DK, k_norm + group * DK, cos + token * (DK // 2), sin + token * (DK // 2), eps,
                  DK,
                  BK, NORM, proj.dtype.element_ty)  # fmt: skip
        d = tl.arange(0, BK)
        tl.store(k_store + row * k_row + group * k_head + slot * DK + d, y.to(k_store.dtype.element_ty), mask=d < DK)
        d = tl.arange(0, BV)
        value = tl.load(proj + (H + G) * DK + group * DV + d, mask=d < DV, other=0.0)
        tl.store(v_store + row * v_row + group * v_head + slot * DV + d, value, mask=d < DV)
    else:
        e = (job - H - KV * G) * BE + tl.arange(0, BE)
        real = e < E
        state = conv_state + row * (K - 1) * E + e
        p = tl.load(conv_bias + e, mask=real, other=0.0).to(tl.float32)
        last = tl.load(conv_weight + e * K + K - 1, mask=real, other=0.0).to(tl.float32)
        for slot in tl.static_range(K - 1):
            old = tl.load(state + slot * E, mask=real, other=0.0)
            p += old.to(tl.float32) * tl.load(conv_weight + e * K + slot, mask=real, other=0.0).to(tl.float32)
            if slot > 0:
                tl.store(state + (slot - 1) * E, old, mask=real)
        inputs_ready(PDL)
        new = tl.load(proj + u_at + e, mask=real, other=0.0)
        p += new.to(tl.float32) * last
        if K > 1:
            tl.store(state + (K - 2) * E, new, mask=real)
        tl.store(u + row * E + e, (p * tl.sigmoid(p)).to(u.dtype.element_ty), mask=real)


def prepare(
    proj: Tensor, lengths: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
    k_store: Tensor | None, v_store: Tensor | None, conv_weight: Tensor, conv_bias: Tensor, conv_state: Tensor,
    q: Tensor, u: Tensor, u_at: int, n_kv_heads: int, d_value: int,
) -> None:  # fmt: skip
    """proj: (B, width) of the input projection, cos, sin: (tokens, dk / 2) float32, stores: (B, G, S, d) or None in a
    layer that makes no keys, conv_state: (B, K - 1, E), is advanced -> q: (B, H, 1, dk), u: (B, E), which are
    written"""
    B, H, _, DK = q.shape
    E, K = conv_weight.shape
    KV = k_store is not None
    ks, vs = (k_store, v_store) if KV else (q, q)
    BE = 256
    _prepare_kernel[(H + KV * n_kv_heads + triton.cdiv(E, BE), B)](
        proj, lengths, cos, sin, q if q_norm is None else q_norm, q if k_norm is None else k_norm, q, ks, vs,
        conv_weight, conv_bias, conv_state, u,
        E, proj.stride(0), ks.stride(0), ks.stride(1), vs.stride(0), vs.stride(1), ks.shape[2], u_at, eps,
        H=H, G=n_kv_heads, DK=DK, DV=d_value, BK=triton.next_power_of_2(DK), BV=triton.next_power_of_2(d_value),
        K=K, BE=BE, NORM=q_norm is not None, KV=int(KV), num_warps=2, **overlap(q.device),
    )  # fmt: skip


@triton.jit
def _scan_rows(
    block, row, x, u, dt, dt_norm, dt_weight, dt_bias, A, B_norm, C_norm, D, gate, state,
    conv_weight, conv_bias, conv_state, E: tl.constexpr, x_row, gate_row, eps,
    N: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr, KC: tl.constexpr,
    ONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """-> y of channels block BE .. of one row, float32; what earlier kernels of the step do not write is loaded before
    the wait. In a batch of ONE it also projects dt, and u comes as the convolution's input, whose state moves on."""
    e, n = block * BE + tl.arange(0, BE), tl.arange(0, NP)
    real_e, real_n = e < E, n < N
    real = real_e[:, None] & real_n[None, :]
    TYPE: tl.constexpr = x.dtype.element_ty
    at = e[:, None] * N + n[None, :]
    rate = tl.load(A + at, mask=real, other=0.0)
    h = tl.load(state + row * E * N + at, mask=real, other=0.0)
    bias = tl.load(dt_bias + e, mask=real_e, other=0.0).to(tl.float32)
    skip = tl.load(D + e, mask=real_e, other=0.0).to(tl.float32)
    if ONE:
        r = tl.arange(0, BR)
        w = tl.load(dt_weight + e[:, None] * RANK + r[None, :], mask=real_e[:, None] & (r < RANK)[None, :], other=0.0)
        p, last = _before_new(conv_bias, conv_weight, conv_state, e, E, KC)
    inputs_ready(PDL)
    x += row * x_row
    v = tl.load(u + row * E + e, mask=real_e, other=0.0)
    if ONE:
        # the kernel before this one was the last to look at the state; the program's own warps have all read it now
        tl.debug_barrier()
        for tap in tl.static_range(KC - 2):
            tl.store(conv_state + tap * E + e, tl.load(conv_state + (tap + 1) * E + e, mask=real_e), mask=real_e)
        if KC > 1:
            tl.store(conv_state + (KC - 2) * E + e, v, mask=real_e)
        p += v.to(tl.float32) * last
        v = (p * tl.sigmoid(p)).to(TYPE)
    v = v.to(tl.float32)
    z = tl.load(gate + row * gate_row + e, mask=real_e, other=0.0).to(tl.float32)
    b = tl.load(x + RANK + n, mask=real_n, other=0.0).to(tl.float32)
    c = tl.load(x + RANK + N + n, mask=real_n, other=0.0).to(tl.float32)
    if ONE:
        low = tl.load(x + r, mask=r < RANK, other=0.0).to(tl.float32)
        low *= tl.rsqrt(tl.sum(low * low, axis=0) / RANK + eps)
        low = low.to(TYPE).to(tl.float32) * tl.load(dt_norm + r, mask=r < RANK, other=0.0).to(tl.float32)
        delta = tl.sum(w.to(tl.float32) * low[None, :], axis=1)
    else:
        delta = tl.load(dt + row * E + e, mask=real_e, other=0.0).to(tl.float32)
    b = (b * tl.rsqrt(tl.sum(b * b, axis=0) / N + eps)).to(TYPE).to(tl.float32)
    b *= tl.load(B_norm + n, mask=real_n, other=0.0).to(tl.float32)
    c = (c * tl.rsqrt(tl.sum(c * c, axis=0) / N + eps)).to(TYPE).to(tl.float32)
    c *= tl.load(C_norm + n, mask=real_n, other=0.0).to(tl.float32)
    delta = softplus(delta + bias)
    h = tl.exp(delta[:, None] * rate) * h + (delta * v)[:, None] * b[None, :]
    tl.store(state + row * E * N + at, h, mask=real)
    out = tl.sum(h * c[None, :], axis=1) + v * skip
    return out * z * tl.sigmoid(z)


@triton.jit
def _scan_step_kernel(
    x, u, dt, dt_norm, dt_weight, dt_bias, A, B_norm, C_norm, D, gate, state, y, E: tl.constexpr, x_row, gate_row, eps,
    N: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    row, e = tl.program_id(1).to(tl.int64), tl.program_id(0) * BE + tl.arange(0, BE)
    out = _scan_rows(tl.program_id(0), row, x, u, dt, dt_norm, dt_weight, dt_bias, A, B_norm, C_norm, D, gate, state,
                     u, u, u, E, x_row, gate_row, eps, N, NP, RANK, BR, BE, 1, False, False)  # fmt: skip
    tl.store(y + row * E + e, out.to(y.dtype.element_ty), mask=e < E)


def _scan_sizes(state: Tensor, rank: int, BE: int) -> dict[str, int]:
    # constants: the compiler then knows where rows of weights begin, and takes half the registers
    N = state.shape[2]
    return {
        "N": N, "NP": triton.next_power_of_2(N), "RANK": rank, "BR": triton.next_power_of_2(rank), "BE": BE
    }  # fmt: skip


def scan_step(
    x: Tensor, u: Tensor, dt: Tensor, dt_norm: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor,
    B_norm: Tensor, C_norm: Tensor, D: Tensor, gate: Tensor, state: Tensor, eps: float, y: Tensor,
) -> None:  # fmt: skip
    """x: (B, rank + 2 N) of `x_proj`, u, dt: (B, E), gate: (B, E) of any row stride, state: (B, E, N) float32, is
    advanced -> y: (B, E), which is written"""
    (B, E, _), rank, BE = state.shape, dt_weight.shape[1], 64
    _scan_step_kernel[(triton.cdiv(E, BE), B)](
        x, u, dt, dt_norm, dt_weight, dt_bias, A, B_norm, C_norm, D, gate, state, y,
        E, x.stride(0), gate.stride(0), eps, **_scan_sizes(state, rank, BE), num_warps=4,
    )  # fmt: skip


@triton.jit
def _keys(k, v, positions, s, end, q_at, window, n_meta, k_step, v_step, DK: tl.constexpr, DV: tl.constexpr,
          BK: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """Keys s of one place, which stand before the query -> which are seen, (BK, BN), (BN, BV)"""
    i, j = tl.arange(0, BK), tl.arange(0, BV)
    at = tl.load(positions + s, mask=s < end, other=2147483647)
    see = (at < q_at) & ((q_at - at <= window) | (at < n_meta))
    k_tile = tl.load(k + i[:, None] + s[None, :] * k_step, mask=see[None, :] & (i < DK)[:, None], other=0.0)
    v_tile = tl.load(v + s[:, None] * v_step + j[None, :], mask=see[:, None] & (j < DV)[None, :], other=0.0)
    return see, k_tile, v_tile


@triton.jit
def _attend_new_token(
    number, pieces, group, proj, lengths, cos, sin, q_norm, k_norm, qk_eps,
    q_positions, k0, v0, positions0, k1, v1, positions1, partial, lse,
    S0, S1, piece0, piece1, pieces0, window, n_meta, scale,
    k0_head, k0_step, v0_head, v0_step, k1_head, k1_step, v1_head, v1_step, H: tl.constexpr, G: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr, NORM: tl.constexpr, MAKES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`decode.attend_piece` for queries as the input projection leaves them, in a batch of one.

    Stored keys are loaded before the wait. One program of a group adds the new token, which is not there yet, and
    stores its key and value if this layer makes them.
    """
    r, i, j = tl.arange(0, RP), tl.arange(0, BK), tl.arange(0, BV)
    head = group * R + r
    second = number >= pieces0
    k = tl.where(second, k1 + group * k1_head, k0 + group * k0_head)
    v = tl.where(second, v1 + group * v1_head, v0 + group * v0_head)
    positions = tl.where(second, positions1, positions0)
    k_step, v_step = tl.where(second, k1_step, k0_step), tl.where(second, v1_step, v0_step)
    begin = tl.where(second, (number - pieces0) * piece1, number * piece0)
    end = tl.where(second, tl.minimum(begin + piece1, S1), tl.minimum(begin + piece0, S0))
    token, q_at = tl.load(lengths), tl.load(q_positions)
    half: tl.constexpr = DK // 2
    other, angle = tl.where(i < half, i + half, i - half), tl.where(i < half, i, i - half)
    c = tl.load(cos + token * half + angle, mask=i < DK, other=0.0)
    d = tl.load(sin + token * half + angle, mask=i < DK, other=0.0)
    see, k_tile, v_tile = _keys(
        k, v, positions, begin + tl.arange(0, BN), end, q_at, window, n_meta, k_step, v_step, DK, DV, BK, BV
    )
    inputs_ready(PDL)
    TYPE: tl.constexpr = proj.dtype.element_ty
    real = (r < R)[:, None] & (i < DK)[None, :]
    mine = tl.load(proj + head[:, None] * DK + i[None, :], mask=real, other=0.0).to(tl.float32)
    theirs = tl.load(proj + head[:, None] * DK + other[None, :], mask=real, other=0.0).to(tl.float32)
    if NORM:
        size = tl.rsqrt(tl.sum(mine * mine, axis=1) / DK + qk_eps)[:, None]
        mine = (mine * size).to(TYPE).to(tl.float32)
        mine *= tl.load(q_norm + head[:, None] * DK + i[None, :], mask=real, other=0.0).to(tl.float32)
        theirs = (theirs * size).to(TYPE).to(tl.float32)
        theirs *= tl.load(q_norm + head[:, None] * DK + other[None, :], mask=real, other=0.0).to(tl.float32)
    q_tile = (mine * c[None, :] + tl.where(i < half, -theirs, theirs) * d[None, :]).to(TYPE)
    acc = tl.zeros((RP, BV), tl.float32)
    m = tl.full((RP,), float("-inf"), tl.float32)
    l = tl.zeros((RP,), tl.float32)
    scale *= LOG2E
    if number == pieces0 % pieces:
        slot = token % S1
        k_slot, v_slot = k1 + group * k1_head + slot * k1_step + i, v1 + group * v1_head + slot * v1_step + j
        if MAKES:
            k_new = _head(proj + (H + group) * DK, k_norm + group * DK, cos + token * half, sin + token * half, qk_eps,
                          DK, BK, NORM, TYPE).to(TYPE)  # fmt: skip
            v_new = tl.load(proj + (H + G) * DK + group * DV + j, mask=j < DV, other=0.0)
            tl.store(k_slot, k_new, mask=i < DK)
            tl.store(v_slot, v_new, mask=j < DV)
        else:
            k_new, v_new = tl.load(k_slot, mask=i < DK, other=0.0), tl.load(v_slot, mask=j < DV, other=0.0)
        m = tl.sum(tl.where(i < DK, q_tile.to(tl.float32) * k_new.to(tl.float32)[None, :], 0.0), axis=1) * scale
        l += 1.0
        acc += v_new.to(tl.float32)[None, :]
    for first in range(begin, end, BN):
        acc, m, l = absorb(q_tile, k_tile, v_tile, see, acc, m, l, scale, PRECISION)
        see, k_tile, v_tile = _keys(
            k, v, positions, first + BN + tl.arange(0, BN), end, q_at, window, n_meta, k_step, v_step, DK, DV, BK, BV
        )
    store_piece(acc, m, l, partial, lse, head * pieces + number, r < R, DV, BV)


@triton.jit
def _before_new(bias, weight, state, e, E: tl.constexpr, KC: tl.constexpr):
    """What the convolution of channels e has before the new input comes -> sum, weight of the new input"""
    real = e < E
    p = tl.load(bias + e, mask=real, other=0.0).to(tl.float32)
    for tap in tl.static_range(KC - 1):
        old = tl.load(state + tap * E + e, mask=real, other=0.0).to(tl.float32)
        p += old * tl.load(weight + e * KC + tap, mask=real, other=0.0).to(tl.float32)
    return p, tl.load(weight + e * KC + KC - 1, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _project_conv(
    row, proj, conv_weight, conv_bias, conv_state, w, y, u_at, E: tl.constexpr, KC: tl.constexpr, BE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Row `row` of w (rows, E) times the convolution's output, which every program takes for itself"""
    sums, lasts, weights = (), (), ()
    for e0 in tl.static_range(0, E, BE):
        e = e0 + tl.arange(0, BE)
        p, last = _before_new(conv_bias, conv_weight, conv_state, e, E, KC)
        sums, lasts = sums + (p,), lasts + (last,)
        weights = weights + (tl.load(w + row * E + e, mask=e < E, other=0.0),)
    inputs_ready(PDL)
    acc = tl.zeros((BE,), tl.float32)
    for e0 in tl.static_range(0, E, BE):
        e = e0 + tl.arange(0, BE)
        new = tl.load(proj + u_at + e, mask=e < E, other=0.0).to(tl.float32)
        p = sums[e0 // BE] + new * lasts[e0 // BE]
        acc += (p * tl.sigmoid(p)).to(proj.dtype.element_ty).to(tl.float32) * weights[e0 // BE].to(tl.float32)
    tl.store(y + row, tl.sum(acc, axis=0).to(y.dtype.element_ty))


@triton.jit
def _attend_and_project_kernel(
    proj, conv_weight, conv_bias, conv_state, w, y, u_at, pieces, lengths, cos, sin, q_norm, k_norm, qk_eps,
    q_positions, k0, v0, positions0, k1, v1, positions1, partial, lse,
    S0, S1, piece0, piece1, pieces0, window, n_meta, scale,
    k0_head, k0_step, v0_head, v0_step, k1_head, k1_step, v1_head, v1_step, H: tl.constexpr, G: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr, NORM: tl.constexpr, MAKES: tl.constexpr,
    E: tl.constexpr, KC: tl.constexpr, BE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_begin(PDL)
    job = tl.program_id(0)
    if job < pieces * G:
        _attend_new_token(
            job % pieces, pieces, job // pieces, proj, lengths, cos, sin, q_norm, k_norm, qk_eps,
            q_positions, k0, v0, positions0, k1, v1, positions1, partial, lse,
            S0, S1, piece0, piece1, pieces0, window, n_meta, scale,
            k0_head, k0_step, v0_head, v0_step, k1_head, k1_step, v1_head, v1_step, H, G,
            R, RP, DK, DV, BK, BV, BN, PRECISION, NORM, MAKES, PDL,
        )  # fmt: skip
    else:
        _project_conv(job - pieces * G, proj, conv_weight, conv_bias, conv_state, w, y, u_at, E, KC, BE, PDL)


@triton.jit
def _merge_and_scan_kernel(
    partial, lse, attn, pieces, heads, attn_norm, ssm_norm, squares,
    x, u, dt_norm, dt_weight, dt_bias, A, B_norm, C_norm, D, gate, state, conv_weight, conv_bias, conv_state, y,
    E: tl.constexpr, eps, DV: tl.constexpr, BV: tl.constexpr, PP: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr, KC: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    let_next_begin(PDL)
    job = tl.program_id(0)
    if job < heads:
        j = tl.arange(0, BV)
        at = job * DV + j
        weight = tl.load(attn_norm + at, mask=j < DV, other=0.0).to(tl.float32)
        inputs_ready(PDL)
        out = merge_head(job.to(tl.int64), partial, lse, pieces, DV, BV, PP)
        tl.store(attn + at, (out * weight).to(attn.dtype.element_ty), mask=j < DV)
        tl.store(squares + job, tl.sum(out * out, axis=0))
    elif job * BE < heads * BE + E:
        at = (job - heads) * BE + tl.arange(0, BE)
        weight = tl.load(ssm_norm + at, mask=at < E, other=0.0).to(tl.float32)
        out = _scan_rows(job - heads, (job * 0).to(tl.int64), x, u, u, dt_norm, dt_weight, dt_bias, A, B_norm, C_norm,
                         D, gate, state, conv_weight, conv_bias, conv_state, E, 0, 0, eps, N, NP, RANK, BR, BE, KC,
                         True, PDL)  # fmt: skip
        tl.store(y + at, (out * weight).to(y.dtype.element_ty), mask=at < E)
        tl.store(squares + job, tl.sum(tl.where(at < E, out * out, 0.0), axis=0))
    else:
        inputs_ready(PDL)
        tl.store(squares + job, 0.0)


def branches(
    proj: Tensor, lengths: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None,
    qk_eps: float, makes_keys: bool, heads: int, positions: Tensor, sources: Sequence[KeyValue], window: int | None,
    n_meta: int, scale: float, conv_weight: Tensor, conv_bias: Tensor, conv_state: Tensor, x_proj: Tensor,
    dt_norm: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, B_norm: Tensor, C_norm: Tensor, D: Tensor,
    state: Tensor, eps: float, attn_norm: Tensor, ssm_norm: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Both branches of a batch of one, side by side in two kernels, from what the input projection leaves.

    proj: (1, width), lengths: (1,) int32 tokens before this one, cos, sin: (tokens, dk / 2) float32, positions: (1, 1)
    and sources as in `decode_attention`, the last one the ring in which the new key and value go if this layer makes
    them, x_proj: (rank + 2 N, E), conv_state: (1, K - 1, E), state: (1, E, N) float32, both are advanced
    -> attention (1, H dv) and SSM (1, E), times the weights of their norms, and sums of squares without these weights:
    H of attention, the others of the SSM
    """
    (G, DV), (rows, E), rank, device = sources[0].v.shape[1::2], x_proj.shape, dt_weight.shape[1], proj.device
    q = proj[:, : heads * cos.shape[1] * 2].view(1, heads, 1, -1)  # as they are: for sizes alone
    cut = plan(q, positions, sources, window, n_meta, scale)
    _, _, *stores, S0, S1, piece0, piece1, pieces0, window, n_meta, scale, _, _ = cut.arguments[:20]
    _, k0_head, k0_step, _, v0_head, v0_step, _, _, k1_head, k1_step, _, v1_head, v1_step, *_ = cut.arguments[20:]
    attn = torch.empty(1, heads * DV, dtype=proj.dtype, device=device)
    low, y = (torch.empty(1, n, dtype=proj.dtype, device=device) for n in (rows, E))
    u = proj[:, proj.shape[1] - 2 * E : proj.shape[1] - E]
    gate = proj[:, proj.shape[1] - E :]
    conv = conv_weight, conv_bias, conv_state
    _attend_and_project_kernel[(cut.pieces * G + rows,)](
        proj, *conv, x_proj, low, proj.shape[1] - 2 * E, cut.pieces, lengths, cos, sin,
        proj if q_norm is None else q_norm, proj if k_norm is None else k_norm, qk_eps, positions, *stores,
        S0, S1, piece0, piece1, pieces0, window, n_meta, scale,
        k0_head, k0_step, v0_head, v0_step, k1_head, k1_step, v1_head, v1_step, H=heads, G=G,
        **cut.sizes, NORM=q_norm is not None, MAKES=makes_keys, E=E, KC=conv_weight.shape[1], BE=2 * COLUMNS,
        num_warps=4, **_at_most(160, proj),
    )  # fmt: skip
    BE = 16
    squares = torch.empty(triton.next_power_of_2(heads + triton.cdiv(E, BE)), dtype=torch.float32, device=device)
    _merge_and_scan_kernel[(squares.shape[0],)](
        cut.partial, cut.lse, attn, cut.pieces, heads, attn_norm, ssm_norm, squares,
        low, u, dt_norm, dt_weight, dt_bias, A, B_norm, C_norm, D, gate, state, *conv, y, E, eps,
        DV=DV, BV=triton.next_power_of_2(DV), PP=triton.next_power_of_2(cut.pieces), KC=conv_weight.shape[1],
        **_scan_sizes(state, rank, BE), num_warps=4, **overlap(device),
    )  # fmt: skip
    return attn, y, squares


@triton.jit
def _begin_kernel(
    ids, embedding, lengths, tokens, now, x, positions0, positions1, slots0, slots1, n_meta, V, D, BLOCK: tl.constexpr
):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    token = tl.load(lengths + row)
    word = tl.load(ids + row)
    tl.debug_barrier()  # before its last reader has it, the length does not move
    tl.store(lengths + row, token + 1)
    tl.store(tokens + row, token)
    tl.store(now + row, token + n_meta)
    for d in range(0, D, BLOCK):
        real = d + i < D
        known = real & (word >= 0) & (word < V)  # or else NaN, which nobody takes for a number
        vector = tl.load(embedding + word * D + d + i, mask=known, other=float("nan"))
        tl.store(x + row * D + d + i, vector, mask=real)
    _place(token, positions0 + row * slots0, slots0, n_meta, BLOCK)
    _place(token, positions1 + row * slots1, slots1, n_meta, BLOCK)


@triton.jit
def _place(last, positions, slots, n_meta, BLOCK: tl.constexpr):
    """`visibility.stored_positions` once the new token is stored; `last` is its number"""
    for first in range(0, slots, BLOCK):
        s = first + tl.arange(0, BLOCK)
        turns = (last - s) // slots  # of a ring; negative numerators do not arise where s <= last
        token = tl.where(s <= last, s + turns * slots, -1)
        tl.store(positions + s, tl.where(token >= 0, token + n_meta, 2147483647), mask=s < slots)


def begin(
    ids: Tensor, embedding: Tensor, lengths: Tensor, tokens: Tensor, now: Tensor, positions: Sequence[Tensor],
    n_meta: int,
) -> Tensor:  # fmt: skip
    """What a step needs before its first layer. ids: (B,), embedding: (V, D), lengths: (B,) int32 tokens before this
    step, is advanced; tokens: (B,) the same, now: (B, 1) position of the new token, positions: one or two of
    (B, slots), with its token stored, which are written -> x: (B, D)"""
    (B, D), one, two = (ids.shape[0], embedding.shape[1]), positions[0], positions[-1]
    x = embedding.new_empty(B, D)
    _begin_kernel[(B,)](
        ids, embedding, lengths, tokens, now, x, one, two, one.shape[1], two.shape[1], n_meta, embedding.shape[0], D,
        BLOCK=2048, num_warps=16,
    )  # fmt: skip
    return x
