"""Depthwise causal convolution with SiLU, forward and backward, as Triton kernels.

Math, with x_(t-j) from `state` where it lies before the row or before its document:

    p_t = bias + sum_j w_j x_(t-j)        y_t = SiLU(p_t)        j = 0 .. K - 1

Tiling: a program is one warp that walks along some channels of a part of a row, the last K - 1 inputs in registers.
Backward it has beside them the sums dx_t = sum_j w_j dp_(t+j) that are not complete, and goes K - 1 steps beyond its
part, whose dp its last inputs need. Loads of the next few steps are under way while these are worked on. The inputs
of a row without documents are `state` and then x, so only the first part knows of `state`.

float32: everything between load and store. Partial sums are added outside in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.gpu.common import INTERPRET, add_up, library_op, rows_contiguous, sigmoid, silu, state_row, strides
from hymba.ops.gpu.slices import place_of

# channels of a program, steps whose loads are under way together, steps of a part at most and at least
LANES, GROUP, PART, LEAST_PART = (8, 4, 8, 4) if INTERPRET else (128, 4, 128, 16)
PROGRAMS = 2112  # sixteen warps for each of an H100's multiprocessors: shorter parts, if there are fewer
# "how long since the document began", where none began: further back than any kernel reaches
FAR = 2**30


@triton.jit
def _rows(x, t, step, end, e, real_e, GROUP: tl.constexpr):
    """Rows t .. t + GROUP - 1 of x, a tuple; 0 from `end` on"""
    at = x + tl.cast(t, tl.int64) * step + e
    out = ()
    for i in tl.static_range(GROUP):
        out = out + (tl.load(at + i * step, mask=real_e & (t + i < end), other=0.0),)
    return out


@triton.jit
def _ages(age, t, T, GROUP: tl.constexpr, AGES: tl.constexpr):
    """How many inputs lie between a step and the beginning of its row or document, of GROUP steps, a tuple"""
    out = ()
    for i in tl.static_range(GROUP):
        since = t + i
        if AGES:
            since = tl.minimum(tl.load(age + t + i, mask=t + i < T, other=0), t + i)
        out = out + (since,)
    return out


@triton.jit
def _weights(weight, e, real_e, K: tl.constexpr):
    """w_0 .. w_(K - 1), a tuple"""
    w = ()
    for back in tl.static_range(K):
        w = w + (tl.load(weight + e * K + (K - 1 - back), mask=real_e, other=0.0).to(tl.float32),)
    return w


@triton.jit
def _past(x, x_step, state, state_step, t, e, real_e, K: tl.constexpr):
    """The K - 1 inputs before step t, newest first, a tuple; of `state` before the row"""
    past = ()
    for back in tl.static_range(1, K):
        own = tl.load(x + tl.cast(t - back, tl.int64) * x_step + e, mask=real_e & (t >= back), other=0.0)
        before = tl.load(state + (K - 1 - back + t) * state_step + e, mask=real_e & (t < back), other=0.0)
        past = past + (own.to(tl.float32) + before.to(tl.float32),)
    return past


@triton.jit
def _shifted(new, past, K: tl.constexpr):
    """`past` of the next step"""
    out = (new,)
    for back in tl.static_range(1, K - 1):
        out = out + (past[back - 1],)
    return out


@triton.jit
def _taps(new, past, state, state_step, since, e, real_e, K: tl.constexpr, AGES: tl.constexpr):
    """x_t .. x_(t - K + 1), a tuple; of `state` where they lie before the document"""
    taps = (new,)
    for back in tl.static_range(1, K):
        tap = past[back - 1]
        if AGES:
            slot = tl.maximum(K - 1 - back + since, 0)
            before = tl.load(state + slot * state_step + e, mask=real_e & (since < back), other=0.0)
            tap = tl.where(since < back, before.to(tl.float32), tap)
        taps = taps + (tap,)
    return taps


@triton.jit
def _forward_kernel(
    x, weight, bias, state, age, y, T, E, x_row, x_step, state_row, state_step, steps,
    K: tl.constexpr, GROUP: tl.constexpr, BE: tl.constexpr, AGES: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    row = tl.program_id(2).to(tl.int64)
    real_e = e < E
    begin = tl.program_id(1) * steps
    end = tl.minimum(begin + steps, T)
    x += row * x_row
    y += row * T * E
    state += row * state_row
    age += row * T
    first = tl.load(bias + e, mask=real_e, other=0.0).to(tl.float32)
    w = _weights(weight, e, real_e, K)
    past = _past(x, x_step, state, state_step, begin, e, real_e, K)
    xs, ages = _rows(x, begin, x_step, end, e, real_e, GROUP), _ages(age, begin, T, GROUP, AGES)
    for t0 in tl.range(begin, end, GROUP, num_stages=1):
        # the next steps' loads before these steps' work
        next_xs = _rows(x, t0 + GROUP, x_step, end, e, real_e, GROUP)
        next_ages = _ages(age, t0 + GROUP, T, GROUP, AGES)
        out = y + tl.cast(t0, tl.int64) * E + e
        for i in tl.static_range(GROUP):
            new = xs[i].to(tl.float32)
            taps = _taps(new, past, state, state_step, ages[i], e, real_e, K, AGES)
            p = first
            for back in tl.static_range(K):
                p += w[back] * taps[back]
            tl.store(out + i * E, silu(p).to(y.dtype.element_ty), mask=real_e & (t0 + i < end))
            if K > 1:
                past = _shifted(new, past, K)
        xs, ages = next_xs, next_ages


@triton.jit
def _backward_kernel(
    x, weight, bias, state, age, dy, beside, dx, dstate, dsums,
    T, E, x_row, x_step, state_row, state_step, dy_row, dy_step, beside_row, beside_step, dx_row, dx_step, steps,
    K: tl.constexpr, GROUP: tl.constexpr, BE: tl.constexpr, AGES: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """BESIDE: y's gradient is the sum of two. dsums: (rows, parts, E (K + 1)), of weight (E, K) and bias"""
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    row = tl.program_id(2).to(tl.int64)
    real_e = e < E
    begin = tl.program_id(1) * steps
    end = tl.minimum(begin + steps, T)
    last = tl.minimum(end + K - 1, T)  # later steps read inputs of this part
    part = row * tl.num_programs(1) + tl.program_id(1)
    x += row * x_row
    dx += row * dx_row
    dy += row * dy_row
    beside += row * beside_row
    state += row * state_row
    age += row * T
    dstate += (part if AGES else row) * (K - 1) * E
    first = tl.load(bias + e, mask=real_e, other=0.0).to(tl.float32)
    w = _weights(weight, e, real_e, K)
    past = _past(x, x_step, state, state_step, begin, e, real_e, K)
    nothing = tl.zeros((BE,), tl.float32)
    open_, sums = (), (nothing,)  # the gradients of past inputs as far as they are known; those of the weight
    for _ in tl.static_range(1, K):
        open_, sums = open_ + (nothing,), sums + (nothing,)
    dbias = nothing
    xs, ages = _rows(x, begin, x_step, last, e, real_e, GROUP), _ages(age, begin, T, GROUP, AGES)
    dys = _rows(dy, begin, dy_step, last, e, real_e, GROUP)
    besides = _rows(beside, begin, beside_step, last, e, real_e & BESIDE, GROUP)
    for t0 in tl.range(begin, end + K - 1, GROUP, num_stages=1):
        # the next steps' loads before these steps' work
        next_xs = _rows(x, t0 + GROUP, x_step, last, e, real_e, GROUP)
        next_ages = _ages(age, t0 + GROUP, T, GROUP, AGES)
        next_dys = _rows(dy, t0 + GROUP, dy_step, last, e, real_e, GROUP)
        next_besides = _rows(beside, t0 + GROUP, beside_step, last, e, real_e & BESIDE, GROUP)
        out = dx + tl.cast(t0 - (K - 1), tl.int64) * dx_step + e
        for i in tl.static_range(GROUP):
            t, since = t0 + i, ages[i]
            new = xs[i].to(tl.float32)
            taps = _taps(new, past, state, state_step, since, e, real_e, K, AGES)
            p = first
            for back in tl.static_range(K):
                p += w[back] * taps[back]
            share = sigmoid(p)
            dout = dys[i].to(tl.float32)
            if BESIDE:
                dout += besides[i].to(tl.float32)
            dp = dout * (share + p * share * (1.0 - share))  # 0 behind the end, as dout is
            own = tl.where(t < end, dp, 0.0)
            dbias += own
            whole = w[0] * dp
            new_sums, new_open = (sums[0] + own * taps[0],), ()
            for back in tl.static_range(1, K):
                new_sums = new_sums + (sums[back] + own * taps[back],)
                new_open = new_open + (whole,)
                more = w[back] * dp
                if AGES:
                    more = tl.where(since >= back, more, 0.0)
                whole = open_[back - 1] + more
            sums = new_sums
            if K > 1:
                open_, past = new_open, _shifted(new, past, K)
            if AGES:
                if since < K - 1:
                    for back in tl.static_range(1, K):
                        reads = real_e & (since < back) & (t < end)
                        slot = tl.maximum(K - 1 - back + since, 0)
                        # nobody else adds here
                        tl.atomic_add(dstate + slot * E + e, w[back] * dp, mask=reads, sem="relaxed")
            elif t < K - 1:  # an input of `state` is complete
                tl.store(dstate + t * E + e, whole, mask=real_e)
            done = t - (K - 1)
            complete = real_e & (done >= begin) & (done < end)
            tl.store(out + i * dx_step, whole.to(dx.dtype.element_ty), mask=complete)
        xs, ages, dys, besides = next_xs, next_ages, next_dys, next_besides
    dsums += part * E * (K + 1)
    for back in tl.static_range(K):
        tl.store(dsums + e * K + K - 1 - back, sums[back], mask=real_e)
    tl.store(dsums + E * K + e, dbias, mask=real_e)


def _parts(x: Tensor) -> tuple[tuple[int, int, int], int]:
    """-> programs, steps of a part"""
    rows, T, E = x.shape
    blocks = triton.cdiv(E, LANES)
    steps = triton.cdiv(T * rows * blocks, PROGRAMS)
    steps = min(max(triton.cdiv(steps, GROUP) * GROUP, LEAST_PART), PART)
    return (blocks, triton.cdiv(T, steps), rows), steps


@library_op("conv_forward")
def conv_forward(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, age: Tensor | None) -> Tensor:
    """age: (B, T) int32, see `_ages` -> (B, T, E)"""
    x, weight, state = rows_contiguous(x), weight.contiguous(), rows_contiguous(state)
    (_, T, E), K = x.shape, weight.shape[1]
    y = conv_forward_like(x, weight, bias, state, age)
    programs, steps = _parts(x)
    _forward_kernel[programs](
        x, weight, bias, state, x if age is None else age, y,
        T, E, x.stride(0), x.stride(1), state_row(state), state.stride(1), steps,
        K=K, GROUP=GROUP, BE=LANES, AGES=age is not None, num_warps=1,
    )  # fmt: skip
    return y


@conv_forward.register_fake
def conv_forward_like(x, weight, bias, state, age):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@library_op("conv_backward")
def conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, age: Tensor | None, dy: Tensor, beside: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output's gradient is `dy`, and `beside` added to it -> gradients of x, weight, bias, state"""
    return _gradients(x, weight, bias, state, age, dy, beside, torch.empty(x.shape, dtype=x.dtype, device=x.device))


def _gradients(x, weight, bias, state, age, dy, beside, dx):
    """dx: the gradient of x, to be written"""
    x, dy, weight, state = rows_contiguous(x), rows_contiguous(dy), weight.contiguous(), rows_contiguous(state)
    other = dy if beside is None else rows_contiguous(beside)
    (rows, T, E), K = x.shape, weight.shape[1]
    programs, steps = _parts(x)
    f32 = {"dtype": torch.float32, "device": x.device}
    dsums = torch.empty(rows * programs[1], E * (K + 1), **f32)
    dstate = torch.empty(rows, 1, K - 1, E, **f32) if age is None else torch.zeros(rows, programs[1], K - 1, E, **f32)
    _backward_kernel[programs](
        x, weight, bias, state, x if age is None else age, dy, other, dx, dstate, dsums,
        T, E, x.stride(0), x.stride(1), state_row(state), state.stride(1), *strides(dy, other, dx), steps,
        K=K, GROUP=GROUP, BE=LANES, AGES=age is not None, BESIDE=beside is not None, num_warps=1,
    )  # fmt: skip
    if state.shape[0] == 1:
        (dstate,) = add_up(dstate.flatten(0, 1), state)
    else:
        dstate = dstate.sum(1).to(state.dtype)
    return dx, *add_up(dsums, weight, bias), dstate


@conv_backward.register_fake
def _(x, weight, bias, state, age, dy, beside):
    return tuple(torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (x, weight, bias, state))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return *torch.ops.hymba_gpu.conv_backward(*ctx.saved_tensors, dy, None), None


conv_forward.register_autograd(_backward, setup_context=_setup)


class BranchConv(torch.autograd.Function):
    """As `reference.branch_conv`: the kernel adds the gradients of both outputs."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        ctx.place = place_of(inputs[0])
        ctx.set_materialize_grads(False)
        y = conv_forward(*inputs)
        return y, y.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        given = [x for x in gradients if x is not None]
        if not given:
            return (None,) * 5
        saved = ctx.saved_tensors  # once: a recomputed block refuses to give them twice
        x = saved[0]
        dx = ctx.place() if ctx.place else None
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx is None else dx
        return *_gradients(*saved, *given, *[None] * (2 - len(given)), dx), None
