"""What the model does element by element, as Triton kernels: rotary positions and the gate of an MLP, both ways.

Tiling: a program of `rotate` owns a block of steps of one head, whose halves it exchanges in registers; one of
`gated_silu` a block of elements. Every tensor crosses the memory bus once.

float32: everything between load and store; cosines and sines are rounded to the type of x first, as in the reference.
Rotated heads lie in memory as unrotated ones do, (B, T, heads, dk), so that nothing around attention is copied.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.gpu.common import INTERPRET, library_op, rows_contiguous
from hymba.ops.gpu.slices import place_of

BLOCK, STEPS = (16, 8) if INTERPRET else (2048, 64)


@triton.jit
def _rotate_kernel(
    x, cos, sin, y, T, x_row, x_head, x_step, angle_row, y_row, y_head, y_step,
    HALF: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    t, i = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BH)
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    real = (t < T)[:, None] & (i < HALF)[None, :]
    t = t.to(tl.int64)[:, None]
    at = x + row * x_row + head * x_head + t * x_step + i[None, :]
    left = tl.load(at, mask=real, other=0.0).to(tl.float32)
    right = tl.load(at + HALF, mask=real, other=0.0).to(tl.float32)
    angle = row * angle_row + t * (2 * HALF) + i[None, :]
    TYPE: tl.constexpr = x.dtype.element_ty
    c = tl.load(cos + angle, mask=real, other=0.0).to(TYPE).to(tl.float32)
    s = tl.load(sin + angle, mask=real, other=0.0).to(TYPE).to(tl.float32)
    if BACKWARD:
        s = -s
    at = y + row * y_row + head * y_head + t * y_step + i[None, :]
    tl.store(at, (left * c - right * s).to(TYPE), mask=real)
    tl.store(at + HALF, (right * c + left * s).to(TYPE), mask=real)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, backward: bool, y: Tensor | None = None) -> Tensor:
    x, cos, sin = rows_contiguous(x), cos.contiguous(), sin.contiguous()
    y = rotate_like(x, cos, sin) if y is None else y
    B, H, T, dk = x.shape
    _rotate_kernel[(triton.cdiv(T, STEPS), H, B)](
        x, cos, sin, y, T, *x.stride()[:3], 0 if cos.shape[0] == 1 else T * dk, *y.stride()[:3],
        HALF=dk // 2, BH=triton.next_power_of_2(dk // 2), BT=STEPS, BACKWARD=backward, num_warps=4,
    )  # fmt: skip
    return y


@library_op("rotate_forward")
def rotate_forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (B, heads, T, dk), cos, sin: (B or 1, 1, T, dk), equal in both halves"""
    return _rotate(x, cos, sin, False)


@rotate_forward.register_fake
def rotate_like(x, cos, sin):
    B, H, T, dk = x.shape
    return torch.empty(B, T, H, dk, dtype=x.dtype, device=x.device).transpose(1, 2)


@library_op("rotate_backward")
def rotate_backward(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _rotate(dy, cos, sin, True)


rotate_backward.register_fake(rotate_like)


def _rotate_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])
    ctx.place = place_of(inputs[0])


def _rotate_backward(ctx, dy):
    if ctx.place:  # a slice, so no graph is being compiled
        return _rotate(dy, *ctx.saved_tensors, True, ctx.place()), None, None
    return torch.ops.hymba_gpu.rotate_backward(dy, *ctx.saved_tensors), None, None


rotate_forward.register_autograd(_rotate_backward, setup_context=_rotate_setup)


@triton.jit
def _gated_kernel(gate, up, dy, out, dup, n, out_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BACKWARD: tl.constexpr):
    """out_row: from a row of `out` or `dup`, which has WIDTH elements, to the next one"""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = i < n
    to = i + i // WIDTH * (out_row - WIDTH)
    z = tl.load(gate + i, mask=real, other=0.0).to(tl.float32)
    v = tl.load(up + i, mask=real, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(z)
    if BACKWARD:
        dout = tl.load(dy + i, mask=real, other=0.0).to(tl.float32)
        tl.store(dup + to, (dout * z * sigmoid).to(dup.dtype.element_ty), mask=real)
        tl.store(out + to, (dout * v * sigmoid * (1.0 + z * (1.0 - sigmoid))).to(out.dtype.element_ty), mask=real)
    else:
        tl.store(out + to, (z * sigmoid * v).to(out.dtype.element_ty), mask=real)


@library_op("gated_silu_forward")
def gated_silu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up: of one shape and type"""
    gate, up, y = gate.contiguous(), up.contiguous(), gated_silu_like(gate, up)
    _gated_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
        gate, up, gate, y, y, gate.numel(), gate.shape[-1], WIDTH=gate.shape[-1], BLOCK=BLOCK, BACKWARD=False,
        num_warps=8,
    )  # fmt: skip
    return y


@gated_silu_forward.register_fake
def gated_silu_like(gate, up):
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@library_op("gated_silu_backward")
def gated_silu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = gated_silu_like(gate, up), gated_silu_like(up, gate)
    _gated_backward_into(gate, up, dy, dgate, dup)
    return dgate, dup


def _gated_backward_into(gate: Tensor, up: Tensor, dy: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """dgate, dup: their rows are equally far apart"""
    gate, up, dy, width = gate.contiguous(), up.contiguous(), dy.contiguous(), gate.shape[-1]
    _gated_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
        gate, up, dy, dgate, dup, gate.numel(), dgate.stride(-2) if dgate.dim() > 1 else width, WIDTH=width,
        BLOCK=BLOCK, BACKWARD=True, num_warps=8,
    )  # fmt: skip


@gated_silu_backward.register_fake
def _(gate, up, dy):
    return gated_silu_like(gate, up), gated_silu_like(up, gate)


def _gated_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gated_backward(ctx, dy):
    return torch.ops.hymba_gpu.gated_silu_backward(*ctx.saved_tensors, dy)


gated_silu_forward.register_autograd(_gated_backward, setup_context=_gated_setup)


class GatedLinear(torch.autograd.Function):
    """As `reference.gated_linear`. The gradients of both products stand side by side, so that x gets its own from one
    long product, which is faster than two and a sum. For the weights two are: 760 us instead of 830 for 16384 tokens of
    the 1.5B shape on an H100."""

    @staticmethod
    def forward(ctx, x, gate, up):
        z, v = (F.linear(x, weight.to(x.dtype)) for weight in (gate, up))
        ctx.save_for_backward(x, gate, up, z, v)  # the weights as they are: copies in another type would stay till then
        return gated_silu_forward(z, v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, gate, up, z, v = ctx.saved_tensors
        width = gate.shape[0]
        both = torch.empty(*z.shape[:-1], 2 * width, dtype=z.dtype, device=z.device)
        _gated_backward_into(z, v, dy, both[..., :width], both[..., width:])
        both, rows = both.flatten(0, -2), x.flatten(0, -2)
        wanted, dx = ctx.needs_input_grad, None
        if wanted[0]:
            weights = z.new_empty(2 * width, x.shape[-1])
            weights[:width].copy_(gate)
            weights[width:].copy_(up)
            dx = (both @ weights).view_as(x)
        halves = zip(both.split(width, dim=-1), (gate, up), wanted[1:], strict=True)
        return dx, *((half.T @ rows).to(weight.dtype) if learns else None for half, weight, learns in halves)
