"""Keys and values from several places in one tensor each, for attention in blocks: those of meta tokens and of a text
by a Triton kernel.

Tiling: a program copies a block of positions of one group of heads, both keys and values. Backward nothing is copied:
the text's gradients are a part of those that come, and the meta tokens' a sum over rows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.gpu.common import INTERPRET, rows_contiguous
from hymba.visibility import KeyValue

BLOCK = 8 if INTERPRET else 64


@triton.jit
def _one(first, second, out, s, d, M, S, width, first_step, second_step):
    """The first M steps from one place, the rest from another"""
    real = (s < S)[:, None] & (d < width)[None, :]
    s = s[:, None].to(tl.int64)
    x = tl.load(first + s * first_step + d[None, :], mask=real & (s < M), other=0.0).to(out.dtype.element_ty)
    y = tl.load(second + (s - M) * second_step + d[None, :], mask=real & (s >= M), other=0.0).to(out.dtype.element_ty)
    tl.store(out + s * width + d[None, :], tl.where(s < M, x, y), mask=real)


@triton.jit
def _join_kernel(
    meta_k, meta_v, k, v, out_k, out_v, M, S, G, dk, dv,
    meta_k_row, meta_k_head, meta_k_step, meta_v_row, meta_v_head, meta_v_step,
    k_row, k_head, k_step, v_row, v_head, v_step, BLOCK: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    at = (row * G + head) * S
    meta_k += row * meta_k_row + head * meta_k_head
    meta_v += row * meta_v_row + head * meta_v_head
    k += row * k_row + head * k_head
    v += row * v_row + head * v_head
    _one(meta_k, k, out_k + at * dk, s, tl.arange(0, DK), M, S, dk, meta_k_step, k_step)
    _one(meta_v, v, out_v + at * dv, s, tl.arange(0, DV), M, S, dv, meta_v_step, v_step)


class Join(torch.autograd.Function):
    """meta_k, meta_v: (1 or B, G, M, d), k, v: (B, G, T, d) -> (B, G, M + T, dk), (B, G, M + T, dv)"""

    @staticmethod
    def forward(ctx, meta_k, meta_v, k, v):
        ctx.shape = meta_k.shape
        tensors = [rows_contiguous(x) for x in (meta_k, meta_v, k, v)]
        B, G, T, dk = k.shape
        M, dv = meta_k.shape[2], v.shape[3]
        S = M + T
        out_k, out_v = (torch.empty(B, G, S, x.shape[3], dtype=x.dtype, device=x.device) for x in (k, v))
        strides = [y for x in tensors for y in (0 if x.shape[0] == 1 else x.stride(0), x.stride(1), x.stride(2))]
        _join_kernel[(triton.cdiv(S, BLOCK), G, B)](
            *tensors, out_k, out_v, M, S, G, dk, dv, *strides,
            BLOCK=BLOCK, DK=triton.next_power_of_2(dk), DV=triton.next_power_of_2(dv), num_warps=4,
        )  # fmt: skip
        return out_k, out_v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        B, _, M, _ = ctx.shape
        meta = [x[:, :, :M] if B > 1 else x[:, :, :M].sum(0, keepdim=True) for x in gradients]
        return *meta, *(x[:, :, M:] for x in gradients)


def joined(sources: Sequence[KeyValue], rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of all sources -> (rows, G, S, dk), (rows, G, S, dv)"""
    keys, values = ([source[i].to(dtype) for source in sources] for i in (0, 1))
    if len(sources) == 1:
        return tuple(x[0].expand(rows, -1, -1, -1) for x in (keys, values))
    if len(sources) == 2 and keys[1].shape[0] == rows and not torch.compiler.is_compiling():  # meta tokens and a text
        return Join.apply(keys[0], values[0], keys[1], values[1])
    return tuple(torch.cat([x.expand(rows, -1, -1, -1) for x in parts], dim=2) for parts in (keys, values))
