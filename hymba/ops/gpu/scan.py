"""Selective scan, forward and backward (Gu and Dao, "Mamba", arXiv 2312.00752, algorithm 2), as Triton kernels.

Math (one channel e, one state n; `starts` and `lengths` as in `reference.selective_scan`):

    delta_t = softplus(dt_t + dt_bias)      a_t = exp(delta_t A)        b_t = delta_t B_t u_t
    h_t = a_t h_(t-1) + b_t                 y_t = (sum_n C_t h_t + D u_t) SiLU(gate_t)

and backwards, with g_t the gradient of h_t through y_t:

    dh_t = g_t + a_(t+1) dh_(t+1)           da_t a_t = dh_t (h_t - b_t)      as h_t - b_t = a_t h_(t-1)

Tiling: a program owns BE channels of one row and walks over time in tiles of BT steps. A tile is (BT, N, BE): lanes lie
along the channels (coalesced, as E is contiguous), warps along the states, and time in registers, so that the scan
along it is BT multiply-adds in a row and no exchange between threads; sums over states go through shared memory.
Nothing of size (B, T, E, N) is written: the forward pass keeps the state in front of every tile, 1 / BT of that, and
the backward pass computes a tile's states again from it. exp(delta A) is computed once per element and direction: a
card has one unit for it to eight for multiply-adds, and it, not memory, is the limit of this operation in bfloat16.

float32: everything between load and store. Gradients of A, D, dt_bias, B and C are partial sums, added outside in a
fixed order, so that a run can be repeated bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.gpu.common import INTERPRET, library_op, log1p_exp, rows_contiguous

# steps in a group, and between the kept states
GROUP = 8
CHANNELS = 8 if INTERPRET else 32
# programs of one warp that fill a large card; fewer channels than that are walked in several segments of time at once
WANTED, LEAST_SEGMENT = (8, 16) if INTERPRET else (1600, 128)
STAGES = tl.constexpr(2)
LOG2E = tl.constexpr(1.4426950408889634)
FORGET = tl.constexpr(1e30)


@triton.jit
def _forward_kernel(
    u, dt, gate, B, C, dt_bias, A, D, state, starts, lengths, initial, y, last, kept, ends, sums,
    T, E, u_row, u_step, dt_row, dt_step, gate_row, gate_step, state_row, segments, steps, groups,
    N: tl.constexpr, NP: tl.constexpr, GROUP: tl.constexpr, BE: tl.constexpr,
    STARTS: tl.constexpr, LENGTHS: tl.constexpr, SEGMENTS: tl.constexpr, OUTPUT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """With OUTPUT: y and the last state. Without: what a segment does to a state, as its end from 0 and its sum of
    delta."""
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    row, segment = tl.program_id(1).to(tl.int64), tl.program_id(2)
    n = tl.arange(0, NP)
    zero = row * 0  # 64 bits: a step times its stride outgrows 32 in a long text
    real_e = e < E
    real = (n < N)[:, None] & real_e[None, :]
    rate = tl.load(A + n[:, None] * E + e[None, :], mask=real, other=0.0) * LOG2E  # (N, BE)
    bias = tl.load(dt_bias + e, mask=real_e, other=0.0).to(tl.float32)
    skip = tl.load(D + e, mask=real_e, other=0.0).to(tl.float32)
    h = tl.zeros((NP, BE), tl.float32)
    first = tl.zeros((NP, BE), tl.float32)
    if STARTS or not SEGMENTS:
        first += tl.load(state + row * state_row + n[:, None] * E + e[None, :], mask=real, other=0.0)
    at = ((row * segments + segment) * N + n[:, None]) * E + e[None, :]
    if OUTPUT:
        if SEGMENTS:
            h += tl.load(initial + at, mask=real, other=0.0)
        else:
            h += first
    length = T
    if LENGTHS:
        length = tl.minimum(tl.load(lengths + row), T)
    total = tl.zeros((BE,), tl.float32)
    begin = segment * steps
    end = tl.minimum(begin + steps, T)
    for t0 in tl.range(begin, end, GROUP, num_stages=STAGES):
        if KEEP:
            tl.store(kept + ((row * groups + t0 // GROUP) * N + n[:, None]) * E + e[None, :], h, mask=real)
        xs, ds, zs, bs, cs = (), (), (), (), ()
        for i in tl.static_range(GROUP):  # all loads of the group before their first use
            t = zero + t0 + i
            inside = e < tl.where(t < T, E, 0)
            xs = xs + (tl.load(u + row * u_row + t * u_step + e, mask=inside, other=0.0),)
            ds = ds + (tl.load(dt + row * dt_row + t * dt_step + e, mask=inside, other=0.0),)
            bs = bs + (tl.load(B + (row * T + t) * N + n, mask=n < tl.where(t < T, N, 0), other=0.0),)
            if OUTPUT:
                zs = zs + (tl.load(gate + row * gate_row + t * gate_step + e, mask=inside, other=0.0),)
                cs = cs + (tl.load(C + (row * T + t) * N + n, mask=n < tl.where(t < T, N, 0), other=0.0),)
        for i in tl.static_range(GROUP):
            t = t0 + i
            x = xs[i].to(tl.float32)
            delta = tl.where(t < length, log1p_exp(ds[i].to(tl.float32) + bias), 0.0)  # 0: the identity, for padding
            if STARTS:
                new = (tl.load(starts + row * T + tl.minimum(t, T - 1)) != 0) & (t < T)
                h = tl.where(new, first, h)
                total = tl.where(new, FORGET, total)
            total += delta
            h = tl.exp2(delta[None, :] * rate) * h + (delta * x)[None, :] * bs[i][:, None]
            if OUTPUT:
                z = zs[i].to(tl.float32)
                out = (tl.sum(h * cs[i][:, None], axis=0) + x * skip) * (z / (1.0 + tl.exp(-z)))
                tl.store(y + (row * T + t) * E + e, out.to(y.dtype.element_ty), mask=e < tl.where(t < T, E, 0))
    if OUTPUT:
        if segment == segments - 1:
            tl.store(last + (row * N + n[:, None]) * E + e[None, :], h, mask=real)
    else:
        tl.store(ends + at, h, mask=real)
        tl.store(sums + (row * segments + segment) * E + e, total, mask=real_e)


@triton.jit
def _join_kernel(
    A, state, ends, sums, initial, E, state_row, segments, N: tl.constexpr, NP: tl.constexpr, BE: tl.constexpr
):
    """initial: the state in front of every segment."""
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    row = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, NP)
    real = (n < N)[:, None] & (e < E)[None, :]
    rate = tl.load(A + n[:, None] * E + e[None, :], mask=real, other=0.0) * LOG2E
    h = tl.load(state + row * state_row + n[:, None] * E + e[None, :], mask=real, other=0.0)
    for segment in range(0, segments):
        at = ((row * segments + segment) * N + n[:, None]) * E + e[None, :]
        tl.store(initial + at, h, mask=real)
        delta = tl.load(sums + (row * segments + segment) * E + e, mask=e < E, other=0.0)
        h = tl.exp2(delta[None, :] * rate) * h + tl.load(ends + at, mask=real, other=0.0)


@triton.jit
def _backward_kernel(
    u, dt, gate, B, C, dt_bias, A, D, state, starts, lengths, kept, dy, dlast,
    du, ddt, dgate, dBC, dbias, dA, dD, dstate,
    rows, T, E, u_row, u_step, dt_row, dt_step, gate_row, gate_step, state_row, dy_row, dy_step, groups,
    N: tl.constexpr, NP: tl.constexpr, GROUP: tl.constexpr, BE: tl.constexpr,
    STARTS: tl.constexpr, LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    e = block * BE + tl.arange(0, BE)
    row = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, NP)
    zero = row * 0  # 64 bits: a step times its stride outgrows 32 in a long text
    real_e = e < E
    real = (n < N)[:, None] & real_e[None, :]
    rate = tl.load(A + n[:, None] * E + e[None, :], mask=real, other=0.0) * LOG2E
    bias = tl.load(dt_bias + e, mask=real_e, other=0.0).to(tl.float32)
    skip = tl.load(D + e, mask=real_e, other=0.0).to(tl.float32)
    first = tl.zeros((NP, BE), tl.float32)
    if STARTS:
        first += tl.load(state + row * state_row + n[:, None] * E + e[None, :], mask=real, other=0.0)
    length = T
    if LENGTHS:
        length = tl.minimum(tl.load(lengths + row), T)
    # what comes back from the steps behind: a_(t+1) dh_(t+1)
    back = tl.load(dlast + (row * N + n[:, None]) * E + e[None, :], mask=real, other=0.0)
    dA_sum = tl.zeros((NP, BE), tl.float32)
    dfirst = tl.zeros((NP, BE), tl.float32)
    dD_sum = tl.zeros((BE,), tl.float32)
    dbias_sum = tl.zeros((BE,), tl.float32)
    # a product with these sums over channels; its columns 0 and 1 are stored
    column = tl.arange(0, 16)
    left = tl.where((column == 0)[None, :], tl.full((BE, 16), 1.0, tl.float32), 0.0)
    right = tl.where((column == 1)[None, :], tl.full((BE, 16), 1.0, tl.float32), 0.0)
    for i in tl.range(0, groups, num_stages=STAGES):
        t0 = (groups - 1 - i) * GROUP
        h = tl.load(kept + ((row * groups + t0 // GROUP) * N + n[:, None]) * E + e[None, :], mask=real, other=0.0)
        # the states of this group once more
        xs, pres, deltas, bs, hs = (), (), (), (), ()
        for k in tl.static_range(GROUP):
            t = zero + t0 + k
            inside = e < tl.where(t < T, E, 0)
            xs = xs + (tl.load(u + row * u_row + t * u_step + e, mask=inside, other=0.0).to(tl.float32),)
            pres = pres + (tl.load(dt + row * dt_row + t * dt_step + e, mask=inside, other=0.0).to(tl.float32) + bias,)
            bs = bs + (tl.load(B + (row * T + t) * N + n, mask=n < tl.where(t < T, N, 0), other=0.0)[:, None],)
        for k in tl.static_range(GROUP):
            t = t0 + k
            deltas = deltas + (tl.where(t < length, log1p_exp(pres[k]), 0.0),)
            if STARTS:
                h = tl.where((tl.load(starts + row * T + tl.minimum(t, T - 1)) != 0) & (t < T), first, h)
            h = tl.exp2(deltas[k][None, :] * rate) * h + (deltas[k] * xs[k])[None, :] * bs[k]
            hs = hs + (h,)
        for j in tl.static_range(GROUP):
            t = zero + t0 + (GROUP - 1 - j)
            inside = e < tl.where(t < T, E, 0)
            x, delta = xs[GROUP - 1 - j], deltas[GROUP - 1 - j]
            z = tl.load(gate + row * gate_row + t * gate_step + e, mask=inside, other=0.0).to(tl.float32)
            dout = tl.load(dy + row * dy_row + t * dy_step + e, mask=inside, other=0.0).to(tl.float32)
            c_out = tl.load(C + (row * T + t) * N + n, mask=n < tl.where(t < T, N, 0), other=0.0)[:, None]
            sigmoid = 1.0 / (1.0 + tl.exp(-z))
            dout_z = dout * z * sigmoid
            dh = back + c_out * dout_z[None, :]
            dlog = dh * (hs[GROUP - 1 - j] - (delta * x)[None, :] * bs[GROUP - 1 - j])  # gradient of delta A
            back = tl.exp2(delta[None, :] * rate) * dh
            if STARTS:
                new = (tl.load(starts + row * T + tl.minimum(t, T - 1)) != 0) & (t < T)
                dfirst += tl.where(new, back, 0.0)
                back = tl.where(new, 0.0, back)
            dA_sum += dlog * delta[None, :]
            y_ungated = tl.sum(hs[GROUP - 1 - j] * c_out, axis=0) + x * skip
            ddrive = tl.sum(dh * bs[GROUP - 1 - j], axis=0)
            ddelta = tl.sum(dlog * rate, axis=0) / LOG2E + ddrive * x
            dpre = tl.where(t < length, ddelta / (1.0 + tl.exp(-pres[GROUP - 1 - j])), 0.0)
            dD_sum += dout_z * x
            dbias_sum += dpre
            at = (row * T + t) * E + e
            tl.store(du + at, (delta * ddrive + dout_z * skip).to(du.dtype.element_ty), mask=inside)
            tl.store(ddt + at, dpre.to(ddt.dtype.element_ty), mask=inside)
            dz = dout * y_ungated * sigmoid * (1.0 + z * (1.0 - sigmoid))
            tl.store(dgate + at, dz.to(dgate.dtype.element_ty), mask=inside)
            both = tl.dot(dh * (delta * x)[None, :], left, input_precision=PRECISION)
            both = tl.dot(hs[GROUP - 1 - j] * dout_z[None, :], right, both, input_precision=PRECISION)
            at = (((block * rows + row) * T + t) * N + n[:, None]) * 2 + column[None, :]
            tl.store(dBC + at, both, mask=(n < tl.where(t < T, N, 0))[:, None] & (column < 2)[None, :])
    at = (row * N + n[:, None]) * E + e[None, :]
    tl.store(dstate + at, back + dfirst, mask=real)
    tl.store(dA + at, dA_sum, mask=real)
    tl.store(dD + row * E + e, dD_sum, mask=real_e)
    tl.store(dbias + row * E + e, dbias_sum, mask=real_e)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in (x.stride(0), x.stride(1))]


def _channels_last(x: Tensor) -> Tensor:  # (..., E, N) -> (..., N, E): threads lie along the channels
    return x.transpose(-1, -2).contiguous()


def _state_row(state: Tensor) -> int:
    return 0 if state.shape[0] == 1 else state.stride(0)


@library_op("scan_forward")
def scan_forward(
    u: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor, state: Tensor,
    starts: Tensor | None, lengths: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y (B, T, E), last state (B, E, N), the state before every group of steps (B, T / GROUP, N, E) if `keep`"""
    u, dt, gate = (rows_contiguous(x) for x in (u, dt, gate))
    B, C, A, state = B.float().contiguous(), C.float().contiguous(), _channels_last(A), _channels_last(state)
    (rows, T, E), N = u.shape, A.shape[0]
    groups, blocks = triton.cdiv(T, GROUP), triton.cdiv(E, CHANNELS)
    f32 = {"dtype": torch.float32, "device": u.device}
    y, _, kept = scan_forward_like(u, dt, dt_bias, A.t(), B, C, D, gate, state, starts, lengths, keep)
    last = torch.empty(rows, N, E, **f32)
    segments = max(1, min(WANTED // (rows * blocks), T // LEAST_SEGMENT))
    steps = triton.cdiv(groups, segments) * GROUP
    segments = triton.cdiv(T, steps)
    initial, ends = (torch.empty(rows, segments, N, E, **f32) for _ in range(2)) if segments > 1 else (last, last)
    sums = torch.empty(rows, segments, E, **f32) if segments > 1 else last
    sizes = {"N": N, "NP": triton.next_power_of_2(N), "BE": CHANNELS}

    def run(output: bool) -> None:
        _forward_kernel[(blocks, rows, segments)](
            u, dt, gate, B, C, dt_bias, A, D, state, starts, lengths, initial, y, last, kept, ends, sums,
            T, E, *_strides(u, dt, gate), _state_row(state), segments, steps, groups, **sizes, GROUP=GROUP,
            STARTS=starts is not None, LENGTHS=lengths is not None, SEGMENTS=segments > 1, OUTPUT=output,
            KEEP=keep and output, num_warps=1,
        )  # fmt: skip

    if segments > 1:
        run(output=False)
        _join_kernel[(blocks, rows)](
            A, state, ends, sums, initial, E, _state_row(state), segments, **sizes, num_warps=1
        )
    run(output=True)
    return y, last.transpose(1, 2).contiguous(), kept


@scan_forward.register_fake
def scan_forward_like(u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths, keep):
    (rows, T, E), N = u.shape, A.shape[1]
    kept = (rows, -(-T // GROUP), N, E) if keep else (0,)
    f32 = {"dtype": torch.float32, "device": u.device}
    return (
        torch.empty(u.shape, dtype=u.dtype, device=u.device),
        torch.empty(rows, E, N, **f32),
        torch.empty(kept, **f32),
    )


@library_op("scan_backward")
def scan_backward(
    u: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor, state: Tensor,
    starts: Tensor | None, lengths: Tensor | None, kept: Tensor, dy: Tensor, dlast: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> gradients of u, dt, dt_bias, A, B, C, D, gate, state"""
    u, dt, gate, dy = (rows_contiguous(x) for x in (u, dt, gate, dy))
    types = B.dtype, C.dtype
    B, C = B.float().contiguous(), C.float().contiguous()
    A, state, dlast = _channels_last(A), _channels_last(state), _channels_last(dlast)
    (rows, T, E), N = u.shape, A.shape[0]
    blocks = triton.cdiv(E, CHANNELS)
    f32 = {"dtype": torch.float32, "device": u.device}
    du, ddt, dgate = (torch.empty(rows, T, E, dtype=x.dtype, device=x.device) for x in (u, dt, gate))
    dBC = torch.empty(blocks, rows, T, N, 2, **f32)
    dA, dstate = (torch.empty(rows, N, E, **f32) for _ in range(2))
    dD, dbias = (torch.empty(rows, E, **f32) for _ in range(2))
    _backward_kernel[(blocks, rows)](
        u, dt, gate, B, C, dt_bias, A, D, state, starts, lengths, kept, dy, dlast,
        du, ddt, dgate, dBC, dbias, dA, dD, dstate,
        rows, T, E, *_strides(u, dt, gate), _state_row(state), *_strides(dy), triton.cdiv(T, GROUP),
        N=N, NP=max(16, triton.next_power_of_2(N)), GROUP=GROUP, BE=max(16, CHANNELS),
        STARTS=starts is not None, LENGTHS=lengths is not None,
        # bfloat16 inputs carry fewer bits than TF32 keeps of the terms of dB and dC
        PRECISION="tf32" if u.dtype == torch.bfloat16 else "tf32x3", num_warps=1,
    )  # fmt: skip
    dstate = dstate.transpose(1, 2)
    if state.shape[0] != rows:
        dstate = dstate.sum(0, keepdim=True)
    dB, dC = dBC.sum(0).unbind(-1)
    return (
        du, ddt, dbias.sum(0).to(dt_bias.dtype), dA.sum(0).t().contiguous(), dB.to(types[0]).contiguous(),
        dC.to(types[1]).contiguous(), dD.sum(0).to(D.dtype), dgate, dstate.contiguous(),
    )  # fmt: skip


@scan_backward.register_fake
def _(u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths, kept, dy, dlast):
    like = lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device)  # noqa: E731
    return tuple(like(x) for x in (u, dt, dt_bias, A, B, C, D, gate, state))


def _setup(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx, dy, dlast, _):
    u, state = ctx.saved_tensors[0], ctx.saved_tensors[8]
    dy = torch.zeros_like(u) if dy is None else dy
    dlast = state.new_zeros(u.shape[0], *state.shape[1:]) if dlast is None else dlast
    return *torch.ops.hymba_gpu.scan_backward(*ctx.saved_tensors, dy, dlast), None, None, None


scan_forward.register_autograd(_backward, setup_context=_setup)
