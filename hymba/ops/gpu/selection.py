"""What the scan selects by: dt, B and C of every token, two narrow products with norms between them.

Products whose rows begin at no multiple of 16 bytes are left to kernels of an older generation, and dt's rank (100 in
Hymba-1.5B) and its sum with 2 N (132) are no such width. So weights are padded, and the norms' kernels leave and take
rows that are padded with zeros.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.ops.gpu.norm import slices_backward, slices_forward

PIECE = 16  # bytes


def _padded(weight: Tensor, dtype: torch.dtype, *, down: bool = False, across: bool = False) -> Tensor:
    piece = PIECE // dtype.itemsize
    out, width = weight.shape
    return F.pad(weight.to(dtype), (0, -width % piece if across else 0, 0, -out % piece if down else 0))


class Selection(torch.autograd.Function):
    """As `reference.selection`, with three norms. dtype: of products"""

    @staticmethod
    def forward(ctx, x, weight, dt_weight, dtype, eps, *norms):
        shape, x = x.shape[:-1], x.flatten(0, -2).to(dtype)
        wide = None if weight is None else _padded(weight, dtype, down=True)
        low = x if wide is None else F.linear(x, wide)
        narrow = _padded(dt_weight, dtype, across=True)
        types = [dtype, *(torch.promote_types(dtype, norm.dtype) for norm in norms[1:])]
        normed, B, C = slices_forward(low, norms, eps, types, narrow.shape[1])
        ctx.save_for_backward(x, weight, wide, dt_weight, narrow, low, normed, *norms)
        ctx.eps = eps
        return tuple(y.unflatten(0, shape) for y in (F.linear(normed, narrow), B, C))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, ddt, dB, dC):
        x, weight, wide, dt_weight, narrow, low, normed, *norms = ctx.saved_tensors
        shape, wanted = ddt.shape[:-1], ctx.needs_input_grad
        ddt = ddt.flatten(0, -2)
        dlow, dnorms = slices_backward(low, norms, ctx.eps, [ddt @ narrow, dB, dC])
        ddt_weight = (ddt.T @ normed)[:, : dt_weight.shape[1]].to(dt_weight.dtype) if wanted[2] else None
        dweight = (dlow.T @ x)[: weight.shape[0]].to(weight.dtype) if wanted[1] else None
        dx = dlow if wide is None else dlow @ wide if wanted[0] else None
        return None if dx is None else dx.unflatten(0, shape), dweight, ddt_weight, None, None, *dnorms
