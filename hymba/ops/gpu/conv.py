"""Depthwise causal convolution with SiLU, forward and backward, as Triton kernels.

Math, with x_(t-j) from `state` where it lies before the row or before its document:

    p_t = bias + sum_j w_j x_(t-j)        y_t = SiLU(p_t)        j = 0 .. K - 1

Tiling: a program owns a tile of BT steps and BE channels, and reads it K times, shifted; all but the first read hit the
L1 cache, so x crosses the memory bus once. The backward pass writes dp (float32) in a first kernel, which also sums the
gradients of weight, bias and state over its tile, and gathers dx_t = sum_j w_j dp_(t+j) from it in a second.

float32: everything between load and store. Partial sums are added outside in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.gpu.common import INTERPRET, library_op, rows_contiguous

STEPS, CHANNELS = (8, 8) if INTERPRET else (32, 128)
# "how long since the document began", where none began: further back than any kernel reaches
FAR = 2**30


@triton.jit
def _age(age, row, t, T, AGES: tl.constexpr):
    """How many inputs lie between step t and the beginning of its row or document."""
    if AGES:
        return tl.minimum(tl.load(age + row * T + t, mask=(t >= 0) & (t < T), other=0), t)
    else:
        return t


@triton.jit
def _tap(x, state, row, t, since, e, real_e, back, T, E, x_row, x_step, state_row, K: tl.constexpr):
    """The input `back` steps before t: (BT, BE)"""
    own = (since >= back) & (t < T)
    at = row * x_row + (t - back)[:, None].to(tl.int64) * x_step + e[None, :]
    value = tl.load(x + at, mask=own[:, None] & real_e[None, :], other=0.0).to(tl.float32)
    if back > 0:
        before = (since < back) & (t < T)
        at = row * state_row + (K - 1 - back + since)[:, None] * E + e[None, :]
        value += tl.load(state + at, mask=before[:, None] & real_e[None, :], other=0.0).to(tl.float32)
    return value


@triton.jit
def _forward_kernel(
    x, weight, bias, state, age, y, T, E, x_row, x_step, state_row,
    K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, AGES: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    row = tl.program_id(2).to(tl.int64)
    real_e = e < E
    since = _age(age, row, t, T, AGES)
    p = tl.zeros((BT, BE), tl.float32) + tl.load(bias + e, mask=real_e, other=0.0).to(tl.float32)[None, :]
    for back in tl.static_range(K):
        w = tl.load(weight + e * K + (K - 1 - back), mask=real_e, other=0.0).to(tl.float32)
        p += w[None, :] * _tap(x, state, row, t, since, e, real_e, back, T, E, x_row, x_step, state_row, K)
    at = (row * T + t[:, None]) * E + e[None, :]
    tl.store(y + at, (p * tl.sigmoid(p)).to(y.dtype.element_ty), mask=(t < T)[:, None] & real_e[None, :])


@triton.jit
def _backward_sums_kernel(
    x, weight, bias, state, age, dy, dp, dweight, dbias, dstate,
    T, E, x_row, x_step, state_row, dy_row, dy_step,
    K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, AGES: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    row = tl.program_id(2).to(tl.int64)
    real_e = e < E
    inside = (t < T)[:, None] & real_e[None, :]
    since = _age(age, row, t, T, AGES)
    p = tl.zeros((BT, BE), tl.float32) + tl.load(bias + e, mask=real_e, other=0.0).to(tl.float32)[None, :]
    for back in tl.static_range(K):
        w = tl.load(weight + e * K + (K - 1 - back), mask=real_e, other=0.0).to(tl.float32)
        p += w[None, :] * _tap(x, state, row, t, since, e, real_e, back, T, E, x_row, x_step, state_row, K)
    at = row * dy_row + t[:, None].to(tl.int64) * dy_step + e[None, :]
    dout = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(p)
    dp_tile = dout * sigmoid * (1.0 + p * (1.0 - sigmoid))  # 0 outside, as dout is
    tl.store(dp + (row * T + t[:, None]) * E + e[None, :], dp_tile, mask=inside)
    part = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(dbias + part * E + e, tl.sum(dp_tile, axis=0), mask=real_e)
    for back in tl.static_range(K):
        tap = _tap(x, state, row, t, since, e, real_e, back, T, E, x_row, x_step, state_row, K)
        tl.store(dweight + (part * K + K - 1 - back) * E + e, tl.sum(dp_tile * tap, axis=0), mask=real_e)
    for slot in tl.static_range(K - 1):
        total = tl.zeros((BE,), tl.float32)
        for back in tl.static_range(K - 1 - slot, K):
            if back > 0:
                w = tl.load(weight + e * K + (K - 1 - back), mask=real_e, other=0.0).to(tl.float32)
                # read by the step that is slot - (K - 1 - back) steps into its document, if that is less than `back`
                reads = (since == slot - (K - 1 - back)) & (t < T)
                total += w * tl.sum(tl.where(reads[:, None], dp_tile, 0.0), axis=0)
        tl.store(dstate + (part * (K - 1) + slot) * E + e, total, mask=real_e)


@triton.jit
def _backward_input_kernel(
    dp, weight, age, dx, T, E, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, AGES: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    row = tl.program_id(2).to(tl.int64)
    real_e = e < E
    total = tl.zeros((BT, BE), tl.float32)
    for back in tl.static_range(K):
        later = t + back
        reads = (_age(age, row, later, T, AGES) >= back) & (later < T)
        at = (row * T + later[:, None]) * E + e[None, :]
        w = tl.load(weight + e * K + (K - 1 - back), mask=real_e, other=0.0).to(tl.float32)
        total += w[None, :] * tl.load(dp + at, mask=reads[:, None] & real_e[None, :], other=0.0)
    at = (row * T + t[:, None]) * E + e[None, :]
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=(t < T)[:, None] & real_e[None, :])


def _grid(x: Tensor) -> tuple[int, int, int]:
    rows, T, E = x.shape
    return triton.cdiv(E, CHANNELS), triton.cdiv(T, STEPS), rows


def _row(state: Tensor) -> int:
    return 0 if state.shape[0] == 1 else state.stride(0)


@library_op("conv_forward")
def conv_forward(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, age: Tensor | None) -> Tensor:
    """age: (B, T) int32, see `_age` -> (B, T, E)"""
    x, weight, state = rows_contiguous(x), weight.contiguous(), state.contiguous()
    (_, T, E), K = x.shape, weight.shape[1]
    y = conv_forward_like(x, weight, bias, state, age)
    _forward_kernel[_grid(x)](
        x, weight, bias, state, age, y, T, E, x.stride(0), x.stride(1), _row(state),
        K=K, BT=STEPS, BE=CHANNELS, AGES=age is not None,
    )  # fmt: skip
    return y


@conv_forward.register_fake
def conv_forward_like(x, weight, bias, state, age):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@library_op("conv_backward")
def conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, age: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, weight, bias, state"""
    x, dy, weight, state = rows_contiguous(x), rows_contiguous(dy), weight.contiguous(), state.contiguous()
    (rows, T, E), K = x.shape, weight.shape[1]
    parts = triton.cdiv(T, STEPS)
    f32 = {"dtype": torch.float32, "device": x.device}
    dp = torch.empty(x.shape, **f32)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight, dbias = torch.empty(rows * parts, K, E, **f32), torch.empty(rows * parts, E, **f32)
    dstate = torch.empty(rows, parts, K - 1, E, **f32)
    sizes = {"K": K, "BT": STEPS, "BE": CHANNELS, "AGES": age is not None}
    _backward_sums_kernel[_grid(x)](
        x, weight, bias, state, age, dy, dp, dweight, dbias, dstate,
        T, E, x.stride(0), x.stride(1), _row(state), dy.stride(0), dy.stride(1), **sizes,
    )  # fmt: skip
    _backward_input_kernel[_grid(x)](dp, weight, age, dx, T, E, **sizes)
    dstate = dstate.sum(1)
    if state.shape[0] != rows:
        dstate = dstate.sum(0, keepdim=True)
    return (
        dx, dweight.sum(0).t().contiguous().to(weight.dtype), dbias.sum(0).to(bias.dtype), dstate.to(state.dtype),
    )  # fmt: skip


@conv_backward.register_fake
def _(x, weight, bias, state, age, dy):
    return tuple(torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (x, weight, bias, state))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return *torch.ops.hymba_gpu.conv_backward(*ctx.saved_tensors, dy), None


conv_forward.register_autograd(_backward, setup_context=_setup)
