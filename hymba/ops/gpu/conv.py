"""Depthwise causal convolution with SiLU, forward and backward, as Triton kernels.

Math, with x_(t-j) from `state` where it lies before the row or before its document:

    p_t = bias + sum_j w_j x_(t-j)        y_t = SiLU(p_t)        j = 0 .. K - 1

Tiling: forward, a program owns a tile of BT steps and BE channels, and reads it K times, shifted; all but the first
read hit the L1 cache, so x crosses the memory bus once. Backward, a program is one warp that walks along some channels
of a part of a row, the last K - 1 inputs in registers, and beside them the sums dx_t = sum_j w_j dp_(t+j) that are not
complete; it goes K - 1 steps beyond its part, whose dp its last inputs need.

float32: everything between load and store. Partial sums are added outside in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.gpu.common import INTERPRET, library_op, rows_contiguous

STEPS, CHANNELS = (8, 8) if INTERPRET else (32, 128)
# of the backward pass: channels of a program, steps that it walks over, steps whose loads are under way together
LANES, PART, GROUP = (8, 8, 4) if INTERPRET else (128, 128, 8)
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
def _rows(x, t, step, end, e, real_e, GROUP: tl.constexpr):
    """Rows t .. t + GROUP - 1 of x, a tuple; 0 from `end` on"""
    out = ()
    for i in tl.static_range(GROUP):
        out = out + (tl.load(x + (t + i) * step + e, mask=real_e & (t + i < end), other=0.0),)
    return out


@triton.jit
def _backward_kernel(
    x, weight, bias, state, age, dy, dx, dweight, dbias, dstate,
    T, E, x_row, x_step, state_row, dy_row, dy_step, steps,
    K: tl.constexpr, GROUP: tl.constexpr, BE: tl.constexpr, AGES: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    part, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    real_e = e < E
    begin = part * steps
    end = tl.minimum(begin + steps, T)
    last = tl.minimum(end + K - 1, T)  # later steps read inputs of this part
    x += row * x_row
    dy += row * dy_row
    state += row * state_row
    dstate += (row * tl.num_programs(1) + part) * (K - 1) * E
    first = tl.load(bias + e, mask=real_e, other=0.0).to(tl.float32)
    w, past, open_, sums = (), (), (), ()
    zero = row * 0  # 64 bits
    nothing = tl.zeros((BE,), tl.float32)
    for back in tl.static_range(K):
        w = w + (tl.load(weight + e * K + (K - 1 - back), mask=real_e, other=0.0).to(tl.float32),)
        sums = sums + (nothing,)
        if back > 0:
            before = tl.load(x + (zero + begin - back) * x_step + e, mask=real_e & (begin >= back), other=0.0)
            past = past + (before.to(tl.float32),)  # the input `back` steps ago
            open_ = open_ + (nothing,)  # its gradient as far as it is known
    dbias_sum = nothing
    xs = _rows(x, zero + begin, x_step, last, e, real_e, GROUP)
    dys = _rows(dy, zero + begin, dy_step, last, e, real_e, GROUP)
    for t0 in tl.range(begin, last, GROUP, num_stages=1):
        # the next group's loads before this one's work
        next_xs = _rows(x, zero + t0 + GROUP, x_step, last, e, real_e, GROUP)
        next_dys = _rows(dy, zero + t0 + GROUP, dy_step, last, e, real_e, GROUP)
        for i in tl.static_range(GROUP):
            t = t0 + i
            since = t
            if AGES:
                since = tl.minimum(tl.load(age + row * T + t, mask=t < T, other=0), t)
            new = xs[i].to(tl.float32)
            taps = (new,)
            p = first + w[0] * new
            for back in tl.static_range(1, K):
                slot = tl.maximum(K - 1 - back + since, 0)
                old = tl.load(state + slot * E + e, mask=real_e & (since < back), other=0.0).to(tl.float32)
                taps = taps + (tl.where(since < back, old, past[back - 1]),)
                p += w[back] * taps[back]
            sigmoid = tl.sigmoid(p)
            dp = dys[i].to(tl.float32) * sigmoid * (1.0 + p * (1.0 - sigmoid))  # 0 behind the end, as dy is
            own = tl.where(t < end, dp, 0.0)
            dbias_sum += own
            new_sums = ()
            for back in tl.static_range(K):
                new_sums = new_sums + (sums[back] + own * taps[back],)
            sums = new_sums
            if since < K - 1:
                for back in tl.static_range(1, K):
                    slot = tl.maximum(K - 1 - back + since, 0)
                    reads = real_e & (since < back) & (t < end)
                    tl.atomic_add(dstate + slot * E + e, w[back] * dp, mask=reads, sem="relaxed")  # nobody else does
            done = t - (K - 1)
            out = dx + (row * T + done) * E + e
            whole = dp * w[0]
            if K > 1:
                whole = open_[K - 2] + tl.where(since >= K - 1, w[K - 1] * dp, 0.0)
            tl.store(out, whole.to(dx.dtype.element_ty), mask=real_e & (done >= begin) & (done < end))
            new_open, new_past = (dp * w[0],), (new,)
            for back in tl.static_range(1, K - 1):
                new_open = new_open + (open_[back - 1] + tl.where(since >= back, w[back] * dp, 0.0),)
                new_past = new_past + (past[back - 1],)
            if K > 1:
                open_, past = new_open, new_past
        xs, dys = next_xs, next_dys
    # what no later step completes: the row's last inputs
    for back in tl.static_range(1, K):
        left = T - back
        here = (left >= begin) & (left < end)
        number = tl.cdiv(last - begin, GROUP) * GROUP + begin - T  # steps behind the row, in which dp was 0
        for shift in tl.static_range(K - 1):
            mine = here & (shift == back - 1 + number)
            tl.store(dx + (row * T + left) * E + e, open_[shift].to(dx.dtype.element_ty), mask=real_e & mine)
    at = row * tl.num_programs(1) + part
    tl.store(dbias + at * E + e, dbias_sum, mask=real_e)
    for back in tl.static_range(K):
        tl.store(dweight + (at * K + K - 1 - back) * E + e, sums[back], mask=real_e)


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
    parts = triton.cdiv(T, PART)
    f32 = {"dtype": torch.float32, "device": x.device}
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight, dbias = torch.empty(rows * parts, K, E, **f32), torch.empty(rows * parts, E, **f32)
    dstate = torch.zeros(rows, parts, K - 1, E, **f32)
    _backward_kernel[(triton.cdiv(E, LANES), parts, rows)](
        x, weight, bias, state, age, dy, dx, dweight, dbias, dstate,
        T, E, x.stride(0), x.stride(1), _row(state), dy.stride(0), dy.stride(1), PART,
        K=K, GROUP=GROUP, BE=LANES, AGES=age is not None, num_warps=1,
    )  # fmt: skip
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
