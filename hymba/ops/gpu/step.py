"""Decoding one token: kernels that a CUDA graph chains (`hymba/engine/cuda.py`). None knows a length on the host.

`gemv` is the matrix-vector product of a batch of one, which reads each weight once and is all that such a step costs;
what stands before and after a product is folded into it:

    y = W x                                     plain
    y = W (w x) s(x)                            behind an RMSNorm: s, a scalar, is found along the way
    y = W (w_a a s(a) + w_b b s(b)) / 2         behind the mean of the branches' norms
    SiLU(W x) (V x), relu(W x)^2, + residual    after it

A program owns BN rows of W and runs along them. `prepare` rotates queries and keys, stores keys and values in the ring,
and takes the convolution's step; `scan_step` projects dt (batch of one), norms B and C, and takes the recurrence's
step.

float32: everything between load and store.
"""

import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.gpu.common import softplus

NO_ACTIVATION, GATED_SILU, SQUARED_RELU = 0, 1, 2


@triton.jit
def _gemv_kernel(
    x, x_norm, x2, x2_norm, w, w2, residual, y, rows, K, eps,
    NORM: tl.constexpr, MEAN: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BN + tl.arange(0, BN)
    real_r = r < rows
    acc, acc2 = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BK), tl.float32)
    square, square2 = tl.zeros((BK,), tl.float32), tl.zeros((BK,), tl.float32)
    at = r.to(tl.int64)[:, None] * K
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        mask = real_r[:, None] & (k < K)[None, :]
        tile = tl.load(w + at + k[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if NORM:
            square += value * value
            value *= tl.load(x_norm + k, mask=k < K, other=0.0).to(tl.float32)
        acc += tile * value[None, :]
        if MEAN:
            value = tl.load(x2 + k, mask=k < K, other=0.0).to(tl.float32)
            square2 += value * value
            value *= tl.load(x2_norm + k, mask=k < K, other=0.0).to(tl.float32)
            acc2 += tile * value[None, :]
        if ACTIVATION == 1:
            acc2 += tl.load(w2 + at + k[None, :], mask=mask, other=0.0).to(tl.float32) * value[None, :]
    out = tl.sum(acc, axis=1)
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(square, axis=0) / K + eps)
        out *= scale
    if MEAN:
        out = 0.5 * (out + tl.sum(acc2, axis=1) * tl.rsqrt(tl.sum(square2, axis=0) / K + eps))
    if ACTIVATION == 1:
        out = out * tl.sigmoid(out) * tl.sum(acc2, axis=1) * scale
    if ACTIVATION == 2:
        out = tl.maximum(out, 0.0)
        out = out * out
    if RESIDUAL:
        out += tl.load(residual + r, mask=real_r, other=0.0).to(tl.float32)
    tl.store(y + r, out.to(y.dtype.element_ty), mask=real_r)


def gemv(
    x: Tensor, w: Tensor, y: Tensor, *, norm: Tensor | None = None, eps: float = 0.0,
    mean_with: tuple[Tensor, Tensor] | None = None, up: Tensor | None = None, squared_relu: bool = False,
    residual: Tensor | None = None,
) -> None:  # fmt: skip
    """x: (K,), w: (rows, K) -> y: (rows,), which is written. norm: weight of an RMSNorm of x; mean_with: (x of the
    other branch, weight of its norm); up: (rows, K), makes this SiLU(W x) (V x); residual: (rows,), is added"""
    rows, K = w.shape
    x2, x2_norm = mean_with or (x, norm)
    BN = 8 if rows >= 4096 and up is None else 4
    _gemv_kernel[(triton.cdiv(rows, BN),)](
        x, norm, x2, x2_norm, w, up, residual, y, rows, K, eps,
        NORM=norm is not None, MEAN=mean_with is not None,
        ACTIVATION=GATED_SILU if up is not None else SQUARED_RELU if squared_relu else NO_ACTIVATION,
        RESIDUAL=residual is not None, BN=BN, BK=512, num_warps=4,
    )  # fmt: skip


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
    K: tl.constexpr, BE: tl.constexpr, NORM: tl.constexpr, KV: tl.constexpr,
):  # fmt: skip
    job = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    proj += row * proj_row
    token = tl.load(lengths + row)
    if job < H:
        y = _head(proj + job * DK, q_norm + job * DK, cos + token * (DK // 2), sin + token * (DK // 2), eps, DK, BK,
                  NORM,
                  proj.dtype.element_ty)  # fmt: skip
        d = tl.arange(0, BK)
        tl.store(q + (row * H + job) * DK + d, y.to(q.dtype.element_ty), mask=d < DK)
    elif job < H + KV * G:
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
        new = tl.load(proj + u_at + e, mask=real, other=0.0)
        p = tl.load(conv_bias + e, mask=real, other=0.0).to(tl.float32)
        p += new.to(tl.float32) * tl.load(conv_weight + e * K + K - 1, mask=real, other=0.0).to(tl.float32)
        state = conv_state + row * (K - 1) * E + e
        for slot in tl.static_range(K - 1):
            old = tl.load(state + slot * E, mask=real, other=0.0)
            p += old.to(tl.float32) * tl.load(conv_weight + e * K + slot, mask=real, other=0.0).to(tl.float32)
            if slot > 0:
                tl.store(state + (slot - 1) * E, old, mask=real)
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
        K=K, BE=BE, NORM=q_norm is not None, KV=int(KV), num_warps=2,
    )  # fmt: skip


@triton.jit
def _scan_step_kernel(
    x, u, dt, dt_norm, dt_weight, dt_bias, A, B_norm, C_norm, D, gate, state, y, E, x_row, gate_row, rank, eps,
    N: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr, BE: tl.constexpr, PROJECT: tl.constexpr,
):  # fmt: skip
    e, n = tl.program_id(0) * BE + tl.arange(0, BE), tl.arange(0, NP)
    row = tl.program_id(1).to(tl.int64)
    real_e, real_n = e < E, n < N
    real = real_e[:, None] & real_n[None, :]
    TYPE: tl.constexpr = x.dtype.element_ty
    x += row * x_row
    if PROJECT:
        r = tl.arange(0, RANK)
        low = tl.load(x + r, mask=r < rank, other=0.0).to(tl.float32)
        low *= tl.rsqrt(tl.sum(low * low, axis=0) / rank + eps)
        low = low.to(TYPE).to(tl.float32) * tl.load(dt_norm + r, mask=r < rank, other=0.0).to(tl.float32)
        at = e[:, None] * rank + r[None, :]
        w = tl.load(dt_weight + at, mask=real_e[:, None] & (r < rank)[None, :], other=0.0).to(tl.float32)
        delta = tl.sum(w * low[None, :], axis=1)
    else:
        delta = tl.load(dt + row * E + e, mask=real_e, other=0.0).to(tl.float32)
    b = tl.load(x + rank + n, mask=real_n, other=0.0).to(tl.float32)
    b = (b * tl.rsqrt(tl.sum(b * b, axis=0) / N + eps)).to(TYPE).to(tl.float32)
    b *= tl.load(B_norm + n, mask=real_n, other=0.0).to(tl.float32)
    c = tl.load(x + rank + N + n, mask=real_n, other=0.0).to(tl.float32)
    c = (c * tl.rsqrt(tl.sum(c * c, axis=0) / N + eps)).to(TYPE).to(tl.float32)
    c *= tl.load(C_norm + n, mask=real_n, other=0.0).to(tl.float32)
    delta = softplus(delta + tl.load(dt_bias + e, mask=real_e, other=0.0).to(tl.float32))
    v = tl.load(u + row * E + e, mask=real_e, other=0.0).to(tl.float32)
    z = tl.load(gate + row * gate_row + e, mask=real_e, other=0.0).to(tl.float32)
    at = e[:, None] * N + n[None, :]
    rate = tl.load(A + at, mask=real, other=0.0)
    h = tl.load(state + row * E * N + at, mask=real, other=0.0)
    h = tl.exp(delta[:, None] * rate) * h + (delta * v)[:, None] * b[None, :]
    tl.store(state + row * E * N + at, h, mask=real)
    out = tl.sum(h * c[None, :], axis=1) + v * tl.load(D + e, mask=real_e, other=0.0).to(tl.float32)
    tl.store(y + row * E + e, (out * z * tl.sigmoid(z)).to(y.dtype.element_ty), mask=real_e)


def scan_step(
    x: Tensor, u: Tensor, dt: Tensor | None, dt_norm: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor,
    B_norm: Tensor, C_norm: Tensor, D: Tensor, gate: Tensor, state: Tensor, eps: float, y: Tensor,
) -> None:  # fmt: skip
    """x: (B, rank + 2 N) of `x_proj`, u: (B, E), dt: (B, E), or None: it is projected here, gate: (B, E) of any row
    stride, state: (B, E, N) float32, is advanced -> y: (B, E), which is written"""
    B, E, N = state.shape
    rank = dt_weight.shape[1]
    BE = 16 if B == 1 else 64
    _scan_step_kernel[(triton.cdiv(E, BE), B)](
        x, u, u if dt is None else dt, dt_norm, dt_weight, dt_bias, A, B_norm, C_norm, D, gate, state, y,
        E, x.stride(0), gate.stride(0), rank, eps,
        N=N, NP=triton.next_power_of_2(N), RANK=triton.next_power_of_2(rank), BE=BE, PROJECT=dt is None, num_warps=4,
    )  # fmt: skip


@triton.jit
def _positions_kernel(lengths, positions, slots, n_meta, BLOCK: tl.constexpr):
    row = tl.program_id(1)
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    last = tl.load(lengths + row)
    # `visibility.stored_positions` once the new token is stored; `last` is its number
    turns = (last - s) // slots  # of a ring; negative numerators do not arise where s <= last
    token = tl.where(s <= last, s + turns * slots, -1)
    tl.store(positions + row * slots + s, tl.where(token >= 0, token + n_meta, 2147483647), mask=s < slots)


def store_positions(lengths: Tensor, positions: Tensor, n_meta: int) -> None:
    """lengths: (B,) int32 tokens before this step -> positions: (B, slots) int32 with its token stored, written"""
    B, slots = positions.shape
    _positions_kernel[(triton.cdiv(slots, 1024), B)](lengths, positions, slots, n_meta, BLOCK=1024)
