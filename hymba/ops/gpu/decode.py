"""Attention of one query per row over meta tokens and a cache (Flash-Decoding, Dao et al. 2023).

Keys stay where they are: the shared meta tokens in one place, a ring or a span in another. `_split_kernel` cuts each
into pieces that are attended to independently; all query heads of a group go together, so that keys and values are read
once. `_merge_kernel` weighs the pieces by their log-sum-exp. Blocks of keys that no query may see are not read:
positions decide, so a store may be used at its full size and needs no length from the host.

float32: scores, softmax, partial outputs. Products are in the type of the cache; for float32 without TF32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.gpu.blocks import NO_WINDOW
from hymba.ops.gpu.common import INTERPRET, LOG2E
from hymba.visibility import KeyValue

BLOCK = 16 if INTERPRET else 64
# pieces of work in flight that fill a large card
WANTED = 512
MAX_PIECES = 64


@triton.jit
def absorb(q_tile, k_tile, v_tile, see, acc, m, l, scale, PRECISION: tl.constexpr):
    """Keys (BK, BN), of which some are seen, into the running softmax of queries (RP, BK); scale: times log2 e"""
    score = tl.dot(q_tile.to(k_tile.dtype), k_tile, input_precision=PRECISION) * scale
    score = tl.where(see[None, :], score, float("-inf"))
    new = tl.maximum(m, tl.max(score, axis=1))
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(score - base[:, None])
    shrink = tl.exp2(m - base)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new, l * shrink + tl.sum(p, axis=1)


@triton.jit
def store_piece(acc, m, l, partial, lse, at, real, DV: tl.constexpr, BV: tl.constexpr):
    """at: of each query among all partial outputs"""
    j, seen = tl.arange(0, BV), l > 0
    acc = acc / tl.where(seen, l, 1.0)[:, None]
    tl.store(partial + at[:, None] * DV + j[None, :], acc, mask=real[:, None] & (j < DV)[None, :])
    tl.store(lse + at, tl.where(seen, m + tl.log2(l), float("-inf")), mask=real)


@triton.jit
def attend_piece(
    number, pieces, group, row, q, q_positions, k0, v0, positions0, k1, v1, positions1, partial, lse,
    S0, S1, piece0, piece1, pieces0, window, n_meta, scale,
    q_row, q_head, k0_row, k0_head, k0_step, v0_row, v0_head, v0_step, p0_row,
    k1_row, k1_head, k1_step, v1_row, v1_head, v1_step, p1_row, qp_row, H,
    R: tl.constexpr, RP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pieces 0 .. pieces0 - 1 of source 0, the others of source 1."""
    r, i, j = tl.arange(0, RP), tl.arange(0, BK), tl.arange(0, BV)
    head = group * R + r
    q_tile = tl.load(
        q + row * q_row + head[:, None] * q_head + i[None, :], mask=(r < R)[:, None] & (i < DK)[None, :], other=0.0
    )
    q_at = tl.load(q_positions + row * qp_row)
    second = number >= pieces0
    k = tl.where(second, k1 + row * k1_row + group * k1_head, k0 + row * k0_row + group * k0_head)
    v = tl.where(second, v1 + row * v1_row + group * v1_head, v0 + row * v0_row + group * v0_head)
    positions = tl.where(second, positions1 + row * p1_row, positions0 + row * p0_row)
    k_step, v_step = tl.where(second, k1_step, k0_step), tl.where(second, v1_step, v0_step)
    piece = tl.where(second, piece1, piece0)
    begin = tl.where(second, number - pieces0, number) * piece
    end = tl.minimum(begin + piece, tl.where(second, S1, S0))
    acc = tl.zeros((RP, BV), tl.float32)
    m = tl.full((RP,), float("-inf"), tl.float32)
    l = tl.zeros((RP,), tl.float32)
    scale *= LOG2E
    for first in range(begin, end, BN):
        s = first + tl.arange(0, BN)
        k_at = tl.load(positions + s, mask=s < end, other=2147483647)
        see = (k_at <= q_at) & ((q_at - k_at <= window) | (k_at < n_meta))
        if tl.max(see.to(tl.int32), axis=0) > 0:
            k_tile = tl.load(k + i[:, None] + s[None, :] * k_step, mask=see[None, :] & (i < DK)[:, None], other=0.0)
            v_tile = tl.load(v + s[:, None] * v_step + j[None, :], mask=see[:, None] & (j < DV)[None, :], other=0.0)
            acc, m, l = absorb(q_tile, k_tile, v_tile, see, acc, m, l, scale, PRECISION)
    store_piece(acc, m, l, partial, lse, (row * H + head) * pieces + number, r < R, DV, BV)


@triton.jit
def _split_kernel(
    q, q_positions, k0, v0, positions0, k1, v1, positions1, partial, lse,
    S0, S1, piece0, piece1, pieces0, window, n_meta, scale,
    q_row, q_head, k0_row, k0_head, k0_step, v0_row, v0_head, v0_step, p0_row,
    k1_row, k1_head, k1_step, v1_row, v1_head, v1_step, p1_row, qp_row, H,
    R: tl.constexpr, RP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    attend_piece(
        tl.program_id(0), tl.num_programs(0), tl.program_id(1), tl.program_id(2).to(tl.int64),
        q, q_positions, k0, v0, positions0, k1, v1, positions1, partial, lse,
        S0, S1, piece0, piece1, pieces0, window, n_meta, scale,
        q_row, q_head, k0_row, k0_head, k0_step, v0_row, v0_head, v0_step, p0_row,
        k1_row, k1_head, k1_step, v1_row, v1_head, v1_step, p1_row, qp_row, H,
        R, RP, DK, DV, BK, BV, BN, PRECISION,
    )  # fmt: skip


@triton.jit
def merge_head(head, partial, lse, pieces, DV: tl.constexpr, BV: tl.constexpr, PP: tl.constexpr):
    """head: of all rows -> (BV,)"""
    piece, j = tl.arange(0, PP), tl.arange(0, BV)
    weight = tl.load(lse + head * pieces + piece, mask=piece < pieces, other=float("-inf"))
    top = tl.max(weight, axis=0)
    weight = tl.exp2(weight - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, axis=0)
    at = (head * pieces + piece[:, None]) * DV + j[None, :]
    parts = tl.load(partial + at, mask=(piece < pieces)[:, None] & (j < DV)[None, :], other=0.0)
    return tl.sum(parts * weight[:, None], axis=0) / tl.where(total > 0, total, 1.0)


@triton.jit
def _merge_kernel(partial, lse, out, pieces, DV: tl.constexpr, BV: tl.constexpr, PP: tl.constexpr):
    head, j = tl.program_id(0).to(tl.int64), tl.arange(0, BV)
    y = merge_head(head, partial, lse, pieces, DV, BV, PP)
    tl.store(out + head * DV + j, y.to(out.dtype.element_ty), mask=j < DV)


class Plan(NamedTuple):
    """How one call is cut: what the kernels need beside the tensors of the call."""

    pieces: int
    partial: Tensor  # (B, H, pieces, dv) float32
    lse: Tensor  # (B, H, pieces) float32
    arguments: tuple  # of `attend_piece`, from q to H
    sizes: dict[str, int | str]  # its constants


def plan(
    q: Tensor, positions: Tensor, sources: Sequence[KeyValue], window: int | None, n_meta: int, scale: float
) -> Plan:
    """As `decode_attention`."""
    B, H, _, DK = q.shape
    G, DV = sources[0].v.shape[1], sources[0].v.shape[3]
    cuts = []  # for each source: how many pieces, of how many keys
    for source in sources:
        S = source.k.shape[2]
        count = max(1, min(MAX_PIECES, triton.cdiv(S, BLOCK), WANTED // (B * G)))
        length = triton.cdiv(triton.cdiv(S, BLOCK), count) * BLOCK
        cuts.append((triton.cdiv(S, length), length))
    pieces = sum(count for count, _ in cuts)
    partial = torch.empty(B, H, pieces, DV, dtype=torch.float32, device=q.device)
    lse = torch.empty(B, H, pieces, dtype=torch.float32, device=q.device)
    row = lambda x: 0 if x.shape[0] == 1 else x.stride(0)  # noqa: E731
    one, two = sources[0], sources[-1]
    strides = [
        stride
        for k, v, at, _ in (one, two)
        for stride in (row(k), k.stride(1), k.stride(2), row(v), v.stride(1), v.stride(2), row(at))
    ]
    arguments = (
        q, positions, *one[:3], *two[:3], partial, lse,
        one.k.shape[2], two.k.shape[2], cuts[0][1], cuts[-1][1], cuts[0][0],
        NO_WINDOW if window is None else window, n_meta, scale,
        q.stride(0), q.stride(1), *strides, row(positions), H,
    )  # fmt: skip
    sizes = {
        "R": H // G, "RP": max(16, triton.next_power_of_2(H // G)), "DK": DK, "DV": DV,
        "BK": max(16, triton.next_power_of_2(DK)), "BV": max(16, triton.next_power_of_2(DV)), "BN": BLOCK,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    return Plan(pieces, partial, lse, arguments, sizes)


def decode_attention(
    q: Tensor, positions: Tensor, sources: Sequence[KeyValue], window: int | None, n_meta: int, scale: float
) -> Tensor:
    """`reference.attention` for one query per row and one or two sources, without documents and gradients.

    q: (B, H, 1, dk) -> (B, 1, H dv)
    """
    (B, H, *_), (_, G, _, DV) = q.shape, sources[0].v.shape
    cut = plan(q, positions, sources, window, n_meta, scale)
    out = torch.empty(B, 1, H * DV, dtype=q.dtype, device=q.device)
    _split_kernel[(cut.pieces, G, B)](*cut.arguments, **cut.sizes, num_warps=4, num_stages=3)
    _merge_kernel[(B * H,)](
        cut.partial, cut.lse, out, cut.pieces,
        DV=DV, BV=triton.next_power_of_2(DV), PP=triton.next_power_of_2(cut.pieces), num_warps=4,
    )  # fmt: skip
    return out
