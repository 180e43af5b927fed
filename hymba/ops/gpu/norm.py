"""RMSNorm, and the mean of two of them, forward and backward, as Triton kernels.

Math, for a row x of width D, with s = (mean(x^2) + eps)^(-1/2):

    y = w round(x s)          dx = s (g - x s mean(g x s)),  g = w dy          dw = sum over rows of dy round(x s)

Tiling: a program owns BR rows at once, each whole, so that a row is read once; narrow rows (the norms of dt, B and C)
go many to a program. The backward pass runs on a fixed number of programs, each of which walks over rows and keeps its
share of dw in registers; shares are added outside in a fixed order.

float32: everything between load and store; x s is rounded to x's dtype before it meets the weight, as in the reference.
"""

from collections.abc import Sequence
from functools import reduce

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.gpu.common import add_up, library_op

ELEMENTS = 4096  # in a tile, at least
BACKWARD_PROGRAMS = 396  # three for each of an H100's multiprocessors: so many fit, with a long row and the next
SLICE_ROWS, SLICE_PROGRAMS = 8, 528  # of the norms of dt, B and C
MEAN_PROGRAMS = 264  # two: one is there at a time, with registers for two long rows and what comes next


@triton.jit
def _normed(x, D, eps):
    """x: (BR, BD) float32, 0 beyond D -> x s, s"""
    s = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    return x * s[:, None], s


@triton.jit
def _forward_kernel(
    x, added, weight, y, total, rows, D, x_row, added_row, eps,
    ADDED: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """ADDED: norm of the sum of x and another tensor, which is stored beside it"""
    r, d = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64), tl.arange(0, BD)
    real = (r < rows)[:, None] & (d < D)[None, :]
    at = r[:, None] * D + d[None, :]
    TYPE: tl.constexpr = total.dtype.element_ty
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    x_tile = tl.load(x + r[:, None] * x_row + d[None, :], mask=real, other=0.0).to(tl.float32)
    if ADDED:
        x_tile += tl.load(added + r[:, None] * added_row + d[None, :], mask=real, other=0.0).to(tl.float32)
        x_tile = x_tile.to(TYPE)
        tl.store(total + at, x_tile, mask=real)
        x_tile = x_tile.to(tl.float32)
    n, _ = _normed(x_tile, D, eps)
    tl.store(y + at, (n.to(TYPE).to(tl.float32) * w[None, :]).to(y.dtype.element_ty), mask=real)


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _row_gradient(x, dout, w, D, eps, ROUND: tl.constexpr):
    """x, dout: (BR, BD) float32 -> gradient of x, what each row gives to the weight's"""
    g = dout * w[None, :]
    squares, products = tl.reduce((x * x, x * g), 1, _add_both)
    s = tl.rsqrt(squares / D + eps)
    n = x * s[:, None]
    return s[:, None] * (g - n * (products * s / D)[:, None]), dout * n.to(ROUND).to(tl.float32)


@triton.jit
def _backward_kernel(
    x, weight, dy, beside, dx, dw, rows, D, x_row, dy_row, beside_row, eps,
    BESIDE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """BESIDE: add another gradient of x to dx. The next rows come while these are worked on, and both sums over a row
    are taken at once."""
    d = tl.arange(0, BD)
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    share = tl.zeros((BR, BD), tl.float32)
    step = tl.num_programs(0) * BR
    r = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    real = (r < rows)[:, None] & (d < D)[None, :]
    next_x = tl.load(x + r[:, None] * x_row + d[None, :], mask=real, other=0.0)
    next_dy = tl.load(dy + r[:, None] * dy_row + d[None, :], mask=real, other=0.0)
    next_beside = tl.load(beside + r[:, None] * beside_row + d[None, :], mask=real & BESIDE, other=0.0)
    for _ in tl.range(tl.program_id(0) * BR, rows, step, num_stages=1):
        x_tile, dout, other = next_x.to(tl.float32), next_dy.to(tl.float32), next_beside.to(tl.float32)
        at, here = dx + r[:, None] * D + d[None, :], real
        r += step
        real = (r < rows)[:, None] & (d < D)[None, :]
        next_x = tl.load(x + r[:, None] * x_row + d[None, :], mask=real, other=0.0)
        next_dy = tl.load(dy + r[:, None] * dy_row + d[None, :], mask=real, other=0.0)
        next_beside = tl.load(beside + r[:, None] * beside_row + d[None, :], mask=real & BESIDE, other=0.0)
        dx_tile, more = _row_gradient(x_tile, dout, w, D, eps, x.dtype.element_ty)
        share += more
        tl.store(at, (dx_tile + other).to(dx.dtype.element_ty), mask=here)
    tl.store(dw + tl.program_id(0) * D + d, tl.sum(share, axis=0), mask=d < D)


@triton.jit
def _mean_forward_kernel(a, b, a_weight, b_weight, y, rows, D, eps, BR: tl.constexpr, BD: tl.constexpr):
    r, d = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64), tl.arange(0, BD)
    real = (r < rows)[:, None] & (d < D)[None, :]
    at = r[:, None] * D + d[None, :]
    na, _ = _normed(tl.load(a + at, mask=real, other=0.0).to(tl.float32), D, eps)
    nb, _ = _normed(tl.load(b + at, mask=real, other=0.0).to(tl.float32), D, eps)
    na = na.to(a.dtype.element_ty).to(tl.float32) * tl.load(a_weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    nb = nb.to(b.dtype.element_ty).to(tl.float32) * tl.load(b_weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, ((na + nb) * 0.5).to(y.dtype.element_ty), mask=real)


@triton.jit
def _slice_forward(x, weight, y, r, rows, D, x_row, y_row, eps, BD: tl.constexpr):
    """Rows of y may be wider: zeros follow"""
    d = tl.arange(0, BD)
    real = (r < rows)[:, None] & (d < D)[None, :]
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    n, _ = _normed(tl.load(x + r[:, None] * x_row + d[None, :], mask=real, other=0.0).to(tl.float32), D, eps)
    n = n.to(x.dtype.element_ty).to(tl.float32)
    inside = (r < rows)[:, None] & (d < y_row)[None, :]
    tl.store(y + r[:, None] * y_row + d[None, :], (n * w[None, :]).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _slices_forward_kernel(
    x, w0, w1, w2, y0, y1, y2, rows, D0, D1, D2, x_row, y0_row, eps,
    BR: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
):  # fmt: skip
    r = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    _slice_forward(x, w0, y0, r, rows, D0, x_row, y0_row, eps, B0)
    _slice_forward(x + D0, w1, y1, r, rows, D1, x_row, D1, eps, B1)
    _slice_forward(x + D0 + D1, w2, y2, r, rows, D2, x_row, D2, eps, B2)


@triton.jit
def _slice_backward(x, weight, dy, dx, share, r, rows, D, x_row, dy_row, dx_row, eps, BD: tl.constexpr):
    """-> share of the weight's gradient, with that of these rows"""
    d = tl.arange(0, BD)
    real = (r < rows)[:, None] & (d < D)[None, :]
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    x_tile = tl.load(x + r[:, None] * x_row + d[None, :], mask=real, other=0.0).to(tl.float32)
    dout = tl.load(dy + r[:, None] * dy_row + d[None, :], mask=real, other=0.0).to(tl.float32)
    dx_tile, more = _row_gradient(x_tile, dout, w, D, eps, x.dtype.element_ty)
    tl.store(dx + r[:, None] * dx_row + d[None, :], dx_tile.to(dx.dtype.element_ty), mask=real)
    return share + more


@triton.jit
def _slices_backward_kernel(
    x, w0, w1, w2, dy0, dy1, dy2, dx, dw, rows, D0, D1, D2, x_row, dy0_row, dy1_row, dy2_row, dx_row, eps,
    BR: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rows of dx may be wider, by REST at most: zeros follow"""
    s0, s1, s2 = tl.zeros((BR, B0), tl.float32), tl.zeros((BR, B1), tl.float32), tl.zeros((BR, B2), tl.float32)
    D = D0 + D1 + D2
    for first in range(tl.program_id(0) * BR, rows, tl.num_programs(0) * BR):
        r = (first + tl.arange(0, BR)).to(tl.int64)
        s0 = _slice_backward(x, w0, dy0, dx, s0, r, rows, D0, x_row, dy0_row, dx_row, eps, B0)
        s1 = _slice_backward(x + D0, w1, dy1, dx + D0, s1, r, rows, D1, x_row, dy1_row, dx_row, eps, B1)
        s2 = _slice_backward(x + D0 + D1, w2, dy2, dx + D0 + D1, s2, r, rows, D2, x_row, dy2_row, dx_row, eps, B2)
        rest = D + tl.arange(0, REST)
        nothing = tl.zeros((BR, REST), dx.dtype.element_ty)
        inside = (r < rows)[:, None] & (rest < dx_row)[None, :]
        tl.store(dx + r[:, None] * dx_row + rest[None, :], nothing, mask=inside)
    dw += tl.program_id(0) * D
    d0, d1, d2 = tl.arange(0, B0), tl.arange(0, B1), tl.arange(0, B2)
    tl.store(dw + d0, tl.sum(s0, axis=0), mask=d0 < D0)
    tl.store(dw + D0 + d1, tl.sum(s1, axis=0), mask=d1 < D1)
    tl.store(dw + D0 + D1 + d2, tl.sum(s2, axis=0), mask=d2 < D2)


@triton.jit
def _add_each(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _mean_backward_kernel(
    a, b, a_weight, b_weight, dy, da, db, dw, rows, D, dy_row, eps, BR: tl.constexpr, BD: tl.constexpr
):
    """dw: (programs, 2 D), of both weights. The next rows come while these are worked on, and all sums over a row are
    taken at once: rows are long, so few fit on a multiprocessor, and each would wait for memory and for every sum in
    turn."""
    d = tl.arange(0, BD)
    wa = tl.load(a_weight + d, mask=d < D, other=0.0).to(tl.float32)
    wb = tl.load(b_weight + d, mask=d < D, other=0.0).to(tl.float32)
    share_a, share_b = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    step = tl.num_programs(0) * BR
    r = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    real = (r < rows)[:, None] & (d < D)[None, :]
    next_dy = tl.load(dy + r[:, None] * dy_row + d[None, :], mask=real, other=0.0)
    next_a = tl.load(a + r[:, None] * D + d[None, :], mask=real, other=0.0)
    next_b = tl.load(b + r[:, None] * D + d[None, :], mask=real, other=0.0)
    for _ in tl.range(tl.program_id(0) * BR, rows, step, num_stages=1):
        dout, xa, xb = next_dy.to(tl.float32) * 0.5, next_a.to(tl.float32), next_b.to(tl.float32)
        at = r[:, None] * D + d[None, :]
        here = real
        r += step
        real = (r < rows)[:, None] & (d < D)[None, :]
        next_dy = tl.load(dy + r[:, None] * dy_row + d[None, :], mask=real, other=0.0)
        next_a = tl.load(a + r[:, None] * D + d[None, :], mask=real, other=0.0)
        next_b = tl.load(b + r[:, None] * D + d[None, :], mask=real, other=0.0)
        ga, gb = dout * wa[None, :], dout * wb[None, :]
        aa, ag, bb, bg = tl.reduce((xa * xa, xa * ga, xb * xb, xb * gb), 1, _add_each)
        sa, sb = tl.rsqrt(aa / D + eps), tl.rsqrt(bb / D + eps)
        na, nb = xa * sa[:, None], xb * sb[:, None]
        dxa = sa[:, None] * (ga - na * (ag * sa / D)[:, None])
        dxb = sb[:, None] * (gb - nb * (bg * sb / D)[:, None])
        share_a += tl.sum(dout * na.to(a.dtype.element_ty).to(tl.float32), axis=0)
        share_b += tl.sum(dout * nb.to(b.dtype.element_ty).to(tl.float32), axis=0)
        tl.store(da + at, dxa.to(da.dtype.element_ty), mask=here)
        tl.store(db + at, dxb.to(db.dtype.element_ty), mask=here)
    dw += tl.program_id(0) * 2 * D
    tl.store(dw + d, share_a, mask=d < D)
    tl.store(dw + D + d, share_b, mask=d < D)


def _rows(x: Tensor) -> Tensor:  # (..., D) -> (rows, D) with a contiguous last dimension, without a copy where possible
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _tile(D: int) -> dict[str, int]:
    BD = triton.next_power_of_2(D)
    return {"BR": max(1, ELEMENTS // BD // 4 if BD < 1024 else 1), "BD": BD, "num_warps": 8 if BD > 2048 else 4}


def _forward(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> norm of the sum, the sum"""
    total = x
    if added is not None:
        total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, added.dtype), device=x.device)
    y, flat, tile = rms_norm_like(total, weight, eps), _rows(x), _tile(x.shape[-1])
    other, (rows, D) = flat if added is None else _rows(added), flat.shape
    _forward_kernel[(triton.cdiv(rows, tile["BR"]),)](
        flat, other, weight.contiguous(), y, total, rows, D, flat.stride(0), other.stride(0), eps,
        ADDED=added is not None, **tile,
    )  # fmt: skip
    return y, total


def _out_type(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype)


@library_op("rms_norm_forward")
def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: (..., D), weight: (D,)"""
    return _forward(x, None, weight, eps)[0]


@rms_norm_forward.register_fake
def rms_norm_like(x, weight, eps):
    return torch.empty(x.shape, dtype=_out_type(x, weight), device=x.device)


@library_op("rms_norm_backward")
def rms_norm_backward(
    x: Tensor, weight: Tensor, eps: float, dy: Tensor, beside: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> gradients of x, with `beside` added, and weight"""
    flat, dflat, tile = _rows(x), _rows(dy), _tile(x.shape[-1])
    other = dflat if beside is None else _rows(beside)
    rows, D = flat.shape
    programs = min(BACKWARD_PROGRAMS, triton.cdiv(rows, tile["BR"]))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dw = torch.empty(programs, D, dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](
        flat, weight.contiguous(), dflat, other, dx, dw, rows, D, flat.stride(0), dflat.stride(0), other.stride(0),
        eps, BESIDE=beside is not None, **tile,
    )  # fmt: skip
    return dx, *add_up(dw, weight)


@rms_norm_backward.register_fake
def _(x, weight, eps, dy, beside):
    return tuple(torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (x, weight))


def _rms_setup(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_backward(ctx, dy):
    x, weight = ctx.saved_tensors
    return *torch.ops.hymba_gpu.rms_norm_backward(x, weight, ctx.eps, dy, None), None


rms_norm_forward.register_autograd(_rms_backward, setup_context=_rms_setup)


class BranchNorm(torch.autograd.Function):
    """As `reference.branch_norm`: one kernel adds, if there is something to add, and norms; one backward adds the
    gradients of both outputs."""

    @staticmethod
    def forward(ctx, x, weight, eps, added):
        y, total = _forward(x, added, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.adds = eps, added is not None
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dtotal):
        dweight = None
        if dy is not None:
            dtotal, dweight = rms_norm_backward(*ctx.saved_tensors, ctx.eps, dy, dtotal)
        return dtotal, dweight, None, dtotal if ctx.adds else None


def slices_forward(
    x: Tensor, weights: Sequence[Tensor], eps: float, dtypes: Sequence[torch.dtype], width: int
) -> list[Tensor]:
    """x: (R, sum of widths or more) -> norm of each of three slices, (R, width of the slice); of the first one, rows of
    `width`, with zeros behind it"""
    rows, widths = x.shape[0], [w.shape[0] for w in weights]
    outs = [
        torch.empty(rows, n, dtype=dtype, device=x.device)
        for n, dtype in zip((width, *widths[1:]), dtypes, strict=True)
    ]
    _slices_forward_kernel[(triton.cdiv(rows, SLICE_ROWS),)](
        x, *(w.contiguous() for w in weights), *outs, rows, *widths, x.stride(0), width, eps,
        **_slice_tile([width, *widths[1:]]),
    )  # fmt: skip
    return outs


def slices_backward(
    x: Tensor, weights: Sequence[Tensor], eps: float, gradients: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """gradients: of each slice -> of x, shaped as x, zeros behind the slices; of the weights"""
    (rows, width), widths = x.shape, [w.shape[0] for w in weights]
    gradients = [_rows(dy) for dy in gradients]
    programs = min(SLICE_PROGRAMS, triton.cdiv(rows, SLICE_ROWS))
    dx = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    dw = torch.empty(programs, sum(widths), dtype=torch.float32, device=x.device)
    _slices_backward_kernel[(programs,)](
        x, *(w.contiguous() for w in weights), *gradients, dx, dw, rows, *widths, x.stride(0),
        *(dy.stride(0) for dy in gradients), width, eps, REST=triton.next_power_of_2(max(1, width - sum(widths))),
        **_slice_tile(widths),
    )  # fmt: skip
    return dx, add_up(dw, *weights)


def _slice_tile(widths: list[int]) -> dict[str, int]:
    return {"BR": SLICE_ROWS, **{f"B{i}": triton.next_power_of_2(width) for i, width in enumerate(widths)}}


class MeanOfNorms(torch.autograd.Function):
    """As `reference.mean_of_norms`; parts: all of the one branch, then all of the other"""

    @staticmethod
    def forward(ctx, eps, a_weight, b_weight, *parts):
        ctx.eps, ctx.shapes = eps, [x.shape for x in parts]
        parts = [_rows(x).contiguous() for x in parts]
        ctx.save_for_backward(a_weight, b_weight, *parts)
        half, D = len(parts) // 2, a_weight.shape[0]
        dtype = reduce(torch.promote_types, (x.dtype for x in (parts[0], parts[half], a_weight, b_weight)))
        y, tile = torch.empty(sum(map(len, parts[:half])), D, dtype=dtype, device=a_weight.device), _tile(D)
        for a, b, out in zip(parts[:half], parts[half:], y.split([*map(len, parts[:half])]), strict=True):
            _mean_forward_kernel[(triton.cdiv(len(a), tile["BR"]),)](
                a, b, a_weight.contiguous(), b_weight.contiguous(), out, len(a), D, eps, **tile
            )  # fmt: skip
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        a_weight, b_weight, *parts = ctx.saved_tensors
        half, D, dy = len(parts) // 2, a_weight.shape[0], _rows(dy)
        gradients, tile = [torch.empty_like(x) for x in parts], _tile(D)
        programs = [min(MEAN_PROGRAMS, triton.cdiv(len(x), tile["BR"])) for x in parts[:half]]
        tile["num_warps"] *= 2
        dw = torch.empty(sum(programs), 2 * D, dtype=torch.float32, device=dy.device)
        each = zip(
            parts[:half], parts[half:], gradients[:half], gradients[half:], programs, dw.split(programs),
            dy.split([*map(len, parts[:half])]), strict=True,
        )  # fmt: skip
        for a, b, da, db, count, dw_part, dout in each:
            _mean_backward_kernel[(count,)](
                a, b, a_weight.contiguous(), b_weight.contiguous(), dout, da, db, dw_part, len(a), D, dout.stride(0),
                ctx.eps, **tile,
            )  # fmt: skip
        gradients = [x.view(shape) for x, shape in zip(gradients, ctx.shapes, strict=True)]
        return None, *add_up(dw, a_weight, b_weight), *gradients
