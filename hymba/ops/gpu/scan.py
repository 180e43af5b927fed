"""Selective scan, forward and backward (Gu and Dao, "Mamba", arXiv 2312.00752, algorithm 2), as Triton kernels;
`scan_cuda.fits` says what takes those of `scan.cu`.

Math (one channel e, one state n; `starts` and `lengths` as in `reference.selective_scan`):

    delta_t = softplus(dt_t + dt_bias)      a_t = exp(delta_t A)
    h_t = a_t h_(t-1) + delta_t B_t u_t     y_t = (sum_n C_t h_t + D u_t) SiLU(gate_t)

and backwards, with g_t the gradient of h_t through y_t:

    dh_t = g_t + a_(t+1) dh_(t+1)           d(delta_t A) = a_t h_(t-1) dh_t

Tiling: a program is one warp and owns 32 channels of one row, a lane for each, whose N states lie in the lane's
registers: sums over states need no exchange, loads along E are coalesced, and time is a loop. Steps go in groups, so
that many loads are under way at once. Nothing of size (B, T, E, N) is written: the forward pass keeps the state in
front of every group, and the backward pass computes states again from it, for half a group at a time, as many as the
registers hold. Gradients of B and C are sums over
channels, across lanes: the products are rounded to bfloat16 (split into three of them where inputs are float32) and
summed by the matrix unit, a product with a line of ones for each step.

exp(delta A) is the limit of the forward pass beside memory: a multiprocessor has 16 units for it to 128 for
multiply-adds. Few rows of long texts are cut into segments of time that run side by side, at twice the exponentials:
once to learn what a segment does to a state, once more from the right one.

float32: everything between load and store but those products. Gradients of A, D, dt_bias, B and C are partial sums,
added outside in a fixed order, so that a run can be repeated bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.gpu import scan_cuda
from hymba.ops.gpu.common import (
    INTERPRET,
    LOG2E,
    library_op,
    rows_contiguous,
    silu,
    softplus,
    softplus_slope,
    state_row,
    strides,
)
from hymba.ops.gpu.slices import place_of

# steps in a group forward, and between the kept states; in a group backward, where states of all steps are in registers
GROUP, BACKWARD_GROUP = 8, 4
LINES = tl.constexpr(16)  # of a product with the matrix unit; line k has the sums of step k
CHANNELS = 32
# programs that fill a large card; fewer than that walk in several segments of time
WANTED, LEAST_SEGMENT = (8, 16) if INTERPRET else (1056, 128)
FORGET = tl.constexpr(1e30)
# what the matrix unit multiplies; the interpreter has no bfloat16
FACTOR = tl.constexpr(tl.float32 if INTERPRET else tl.bfloat16)


@triton.jit
def _rows(x, t0, step, end, GROUP: tl.constexpr):
    """Rows t0 .. t0 + GROUP - 1 of x, a tuple; 0 from `end` on"""
    x += t0 * step
    out = ()
    for i in tl.static_range(GROUP):
        out = out + (tl.load(x + i * step, mask=t0 + i < end, other=0.0),)
    return out


@triton.jit
def _touch(x, row, end, N: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr):
    """Read a word of every 32 bytes of GROUP rows of x (float32, N wide) from `row` on, so that they come to the L1
    cache; none from `end` on. -> (GROUP, words) int32"""
    r, word = row + tl.arange(0, GROUP)[:, None], tl.arange(0, WORDS)[None, :] * 8
    found = tl.load(x + r * N + word, mask=(r < end) & (word < N), other=0.0)
    return found.to(tl.int32, bitcast=True)


@triton.jit
def _states(at, N: tl.constexpr, NP: tl.constexpr):
    n = tl.arange(0, NP)
    if N == NP:
        return tl.load(at + n)
    else:
        return tl.load(at + n, mask=n < N, other=0.0)


@triton.jit(do_not_specialize=["unit"])
def _forward_kernel(
    u, dt, gate, B, C, dt_bias, A, D, state, starts, lengths, initial, y, last, kept, ends, sums,
    T, E, u_row, u_step, dt_row, dt_step, gate_row, gate_step, state_row, segments, steps, groups, unit,
    N: tl.constexpr, NP: tl.constexpr, GROUP: tl.constexpr, BE: tl.constexpr,
    STARTS: tl.constexpr, LENGTHS: tl.constexpr, SEGMENTS: tl.constexpr, OUTPUT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """With OUTPUT: y and the last state. Without: what a segment does to a state, as its end from 0 and its sum of
    delta. unit: 1, unknown to the compiler, which then gives a lane one channel and not four, and does not drop loads
    that only bring B and C of the next group near."""
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    row, segment = tl.program_id(1).to(tl.int64), tl.program_id(2)
    n = tl.arange(0, NP)
    zero = row * 0  # 64 bits: a step times its stride outgrows 32 in a long text
    real_e = e < E
    e = tl.minimum(e, E - 1) * unit
    real = real_e[:, None] & (n < N)[None, :]
    rate = tl.load(A + e[:, None] + n[None, :] * E, mask=real, other=0.0) * LOG2E
    bias = tl.load(dt_bias + e).to(tl.float32)
    skip = tl.load(D + e).to(tl.float32)
    h = tl.zeros((BE, NP), tl.float32)
    at_first = state + row * state_row + e[:, None] + n[None, :] * E
    at = ((row * segments + segment) * N + n[None, :]) * E + e[:, None]
    if OUTPUT:
        if SEGMENTS:
            h += tl.load(initial + at, mask=real, other=0.0)
        else:
            h += tl.load(at_first, mask=real, other=0.0)
    length = T
    if LENGTHS:
        length = tl.minimum(tl.load(lengths + row), T).to(tl.int32)
    total = tl.zeros((BE,), tl.float32)
    begin = segment * steps
    end = tl.minimum(begin + steps, T)
    WORDS: tl.constexpr = (NP + 7) // 8
    touched = tl.zeros((GROUP, WORDS), tl.int32)
    u += row * u_row + e
    dt += row * dt_row + e
    gate += row * gate_row + e
    y += row * T * E + e
    xs = _rows(u, zero + begin, u_step, end, GROUP)
    ds = _rows(dt, zero + begin, dt_step, end, GROUP)
    zs = _rows(gate, zero + begin, gate_step, end, GROUP) if OUTPUT else xs
    for t0 in tl.range(begin, end, GROUP, num_stages=1):
        t64 = zero + t0
        if KEEP:
            tl.store(kept + ((row * groups + t0 // GROUP) * N + n[None, :]) * E + e[:, None], h, mask=real)
        # the next group's loads before this one's work
        next_xs = _rows(u, t64 + GROUP, u_step, end, GROUP)
        next_ds = _rows(dt, t64 + GROUP, dt_step, end, GROUP)
        next_zs = _rows(gate, t64 + GROUP, gate_step, end, GROUP) if OUTPUT else xs
        near = row * T + t0 + GROUP
        ahead = _touch(B, near, row * T + end, N, WORDS, GROUP)
        if OUTPUT:
            ahead |= _touch(C, near, row * T + end, N, WORDS, GROUP)
        at_B = B + (row * T + t64) * N
        at_C = C + (row * T + t64) * N
        at_y = y + t64 * E
        outs = ()
        for i in tl.static_range(GROUP):
            t = t0 + i
            inside = t < T
            step = tl.minimum(t, T - 1) - t0
            b = _states(at_B + step * N, N, NP)
            x = xs[i].to(tl.float32)
            delta = tl.where(t < length, softplus(ds[i].to(tl.float32) + bias), 0.0)
            if STARTS:
                new = tl.load(starts + row * T + t, mask=inside, other=0) != 0
                h = tl.load(at_first, mask=real & new, other=h)
                total = tl.where(new, FORGET, total)
            total += delta
            h = tl.exp2(delta[:, None] * rate) * h + (delta * x)[:, None] * b[None, :]
            if OUTPUT:
                c = _states(at_C + step * N, N, NP)
                out = (tl.sum(h * c[None, :], axis=1) + x * skip) * silu(zs[i].to(tl.float32))
                outs = outs + (out.to(y.dtype.element_ty),)
        if OUTPUT:  # not earlier: no load passes a store, and steps would not overlap
            for i in tl.static_range(GROUP):
                tl.store(at_y + i * E, outs[i], mask=real_e & (t0 + i < T))
        xs, ds, zs = next_xs, next_ds, next_zs
        touched |= ahead & (unit - 1)
    h += tl.sum(tl.sum(touched, axis=1), axis=0).to(tl.float32)  # 0, which the compiler does not know
    if OUTPUT:
        if segment == segments - 1:
            tl.store(last + (row * N + n[None, :]) * E + e[:, None], h, mask=real)
    else:
        tl.store(ends + at, h, mask=real)
        tl.store(sums + (row * segments + segment) * E + e, total, mask=real_e)


@triton.jit(do_not_specialize=["unit"])
def _backward_kernel(
    u, dt, gate, B, C, dt_bias, A, D, state, starts, lengths, kept, dy, dlast,
    du, ddt, dgate, dBC, dbias, dA, dD, dstate,
    rows, T, E, u_row, u_step, dt_row, dt_step, gate_row, gate_step, state_row, dy_row, dy_step, groups, unit,
    N: tl.constexpr, NP: tl.constexpr, EVERY: tl.constexpr, GROUP: tl.constexpr, BE: tl.constexpr,
    STARTS: tl.constexpr, LENGTHS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """PARTS: how many bfloat16 stand for a float32 in the sums over channels. dstate: zeros, if STARTS. unit: as in
    `_forward_kernel`"""
    block = tl.program_id(0)
    e = block * BE + tl.arange(0, BE)
    row = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, NP)
    zero = row * 0  # 64 bits: a step times its stride outgrows 32 in a long text
    real_e = e < E
    e = tl.minimum(e, E - 1) * unit
    real = real_e[:, None] & (n < N)[None, :]
    rate = tl.load(A + e[:, None] + n[None, :] * E, mask=real, other=0.0) * LOG2E
    bias = tl.load(dt_bias + e).to(tl.float32)
    skip = tl.load(D + e).to(tl.float32)
    length = T
    if LENGTHS:
        length = tl.minimum(tl.load(lengths + row), T).to(tl.int32)
    at_first = state + row * state_row + e[:, None] + n[None, :] * E
    at_state = row * N * E + e[:, None] + n[None, :] * E
    # what comes back from the steps behind: a_(t+1) dh_(t+1)
    back = tl.load(dlast + at_state, mask=real, other=0.0)
    dA_sum = tl.zeros((BE, NP), tl.float32)
    dD_sum = tl.zeros((BE,), tl.float32)
    dbias_sum = tl.zeros((BE,), tl.float32)
    line, pair = tl.arange(0, LINES), tl.arange(0, 2 * NP)
    u += row * u_row + e
    dt += row * dt_row + e
    gate += row * gate_row + e
    dy += row * dy_row + e
    # lanes beyond E read the last channel, and count for nothing: their dy is 0
    for i in tl.range(0, tl.cdiv(T, GROUP), num_stages=1):
        t0 = (tl.cdiv(T, GROUP) - 1 - i) * GROUP
        t64 = zero + t0
        begin = t0 // EVERY * EVERY
        h = tl.load(kept + ((row * groups + t0 // EVERY) * N + n[None, :]) * E + e[:, None], mask=real, other=0.0)
        for s0 in tl.range(begin, t0, GROUP, num_stages=1):  # from the kept state to the group
            xs = _rows(u, zero + s0, u_step, T, GROUP)
            ds = _rows(dt, zero + s0, dt_step, T, GROUP)
            for k in tl.static_range(GROUP):
                delta = tl.where(s0 + k < length, softplus(ds[k].to(tl.float32) + bias), 0.0)
                b = _states(B + (row * T + s0 + k) * N, N, NP)
                if STARTS:
                    h = tl.load(at_first, mask=real & (tl.load(starts + row * T + s0 + k) != 0), other=h)
                h = tl.exp2(delta[:, None] * rate) * h + (delta * xs[k].to(tl.float32))[:, None] * b[None, :]
        xs = _rows(u, t64, u_step, T, GROUP)
        ds = _rows(dt, t64, dt_step, T, GROUP)
        at_gate = gate + t64 * gate_step
        at_dy = dy + t64 * dy_step
        last = GROUP - 1
        next_z = tl.load(at_gate + last * gate_step, mask=t0 + last < T, other=0.0)
        next_dout = tl.load(at_dy + last * dy_step, mask=real_e & (t0 + last < T), other=0.0)
        at_B = B + (row * T + t64) * N
        at_C = C + (row * T + t64) * N
        # the states of this group once more; hs: in front of each step, unless a document starts there
        deltas, hs = (), ()
        for k in tl.static_range(GROUP):
            t = t0 + k
            b = _states(at_B + (tl.minimum(t, T - 1) - t0) * N, N, NP)
            delta = tl.where(t < length, softplus(ds[k].to(tl.float32) + bias), 0.0)
            deltas, hs = deltas + (delta,), hs + (h,)
            if STARTS:
                h = tl.load(at_first, mask=real & (tl.load(starts + row * T + t, mask=t < T, other=0) != 0), other=h)
            h = tl.exp2(delta[:, None] * rate) * h + (delta * xs[k].to(tl.float32))[:, None] * b[None, :]
        sums = tl.zeros((LINES, 2 * NP), tl.float32)
        out = (row * T + t64) * E + e
        for k in tl.static_range(GROUP - 1, -1, -1):
            t = t0 + k
            step = tl.minimum(t, T - 1) - t0
            x, delta = xs[k].to(tl.float32), deltas[k]
            z, dout = next_z.to(tl.float32), next_dout.to(tl.float32)
            if k > 0:
                next_z = tl.load(at_gate + (k - 1) * gate_step, mask=t - 1 < T, other=0.0)
                next_dout = tl.load(at_dy + (k - 1) * dy_step, mask=real_e & (t - 1 < T), other=0.0)
            b, c = _states(at_B + step * N, N, NP)[None, :], _states(at_C + step * N, N, NP)[None, :]
            sigmoid = tl.fdiv(1.0, 1.0 + tl.exp2(-LOG2E * z))
            dgated = dout * z * sigmoid
            y_ungated = tl.sum(h * c, axis=1) + x * skip
            dh = back + c * dgated[:, None]
            drive = delta * x
            sums = _put_row(sums, dh * drive[:, None], h * dgated[:, None], k, PARTS)
            ddrive = tl.sum(dh * b, axis=1)
            back = tl.exp2(delta[:, None] * rate) * dh
            h = hs[k]
            if STARTS:
                new = tl.load(starts + row * T + t, mask=t < T, other=0) != 0
                dlog = back * tl.load(at_first, mask=real & new, other=h)
            else:
                dlog = back * h
            dA_sum += dlog * delta[:, None]
            ddelta = tl.sum(dlog * rate, axis=1) * (1.0 / LOG2E) + ddrive * x
            if STARTS:
                if new:
                    tl.atomic_add(dstate + at_state, back, mask=real, sem="relaxed")  # nobody else adds here
                back = tl.where(new, 0.0, back)
            dpre = ddelta * softplus_slope(delta)  # 0 in padding, where delta is 0
            dD_sum += dgated * x
            dbias_sum += dpre
            inside = real_e & (t < T)
            tl.store(du + out + k * E, (delta * ddrive + dgated * skip).to(du.dtype.element_ty), mask=inside)
            tl.store(ddt + out + k * E, dpre.to(ddt.dtype.element_ty), mask=inside)
            dz = dout * y_ungated * sigmoid * (1.0 + z * (1.0 - sigmoid))
            tl.store(dgate + out + k * E, dz.to(dgate.dtype.element_ty), mask=inside)
        at = ((block * rows + row) * T + t64 + line[:, None]) * (2 * N) + pair[None, :]
        tl.store(dBC + at, sums, mask=(line < tl.minimum(GROUP, T - t0))[:, None] & (pair < 2 * N)[None, :])
    if STARTS:
        tl.atomic_add(dstate + at_state, back, mask=real, sem="relaxed")
    else:
        tl.store(dstate + at_state, back, mask=real)
    tl.store(dA + at_state, dA_sum, mask=real)
    tl.store(dD + row * E + e, dD_sum, mask=real_e)
    tl.store(dbias + row * E + e, dbias_sum, mask=real_e)


@triton.jit
def _put_row(sums, x, y, line: tl.constexpr, PARTS: tl.constexpr):
    """Write the sums of x and y (BE, NP) over channels, a pair for each state, to one line of sums (LINES, 2 NP)."""
    ones = tl.full((LINES, x.shape[0]), 1.0, FACTOR)
    total = tl.zeros(sums.shape, tl.float32)  # every line of it will be the sum
    pairs = tl.join(x, y).reshape(x.shape[0], 2 * x.shape[1])
    for part in tl.static_range(PARTS):
        rounded = pairs.to(FACTOR)
        total = tl.dot(ones, rounded, total)
        if part + 1 < PARTS:
            pairs -= rounded.to(tl.float32)
    return tl.where((tl.arange(0, LINES) == line)[:, None], total, sums)


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


def _channels_last(x: Tensor) -> Tensor:  # (..., E, N) -> (..., N, E): threads lie along the channels
    return x.transpose(-1, -2).contiguous()


@library_op("scan_forward")
def scan_forward(
    u: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor, state: Tensor,
    starts: Tensor | None, lengths: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y (B, T, E), last state (B, E, N), states that the backward pass begins with, if `keep`"""
    y, last, kept = scan_forward_like(u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths, keep)
    if scan_cuda.fits(u, dt, gate, A, keep):
        scan_cuda.forward(u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths, keep, y, last, kept)
        return y, last, kept
    u, dt, gate = (rows_contiguous(x) for x in (u, dt, gate))
    B, C, A, state = B.float().contiguous(), C.float().contiguous(), _channels_last(A), _channels_last(state)
    (rows, T, E), N = u.shape, A.shape[0]
    groups, blocks = triton.cdiv(T, GROUP), triton.cdiv(E, CHANNELS)
    f32 = {"dtype": torch.float32, "device": u.device}
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
            T, E, *strides(u, dt, gate), state_row(state), segments, steps, groups, 1, **sizes, GROUP=GROUP,
            STARTS=starts is not None, LENGTHS=lengths is not None, SEGMENTS=segments > 1, OUTPUT=output,
            KEEP=keep and output, num_warps=1,
        )  # fmt: skip

    if segments > 1:
        run(output=False)
        _join_kernel[(blocks, rows)](A, state, ends, sums, initial, E, state_row(state), segments, **sizes, num_warps=1)
    run(output=True)
    return y, last.transpose(1, 2).contiguous(), kept


@scan_forward.register_fake
def scan_forward_like(u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths, keep):
    (rows, T, E), N = u.shape, A.shape[1]
    kept = (0,)
    if keep:
        kept = scan_cuda.kept(u, N) if scan_cuda.fits(u, dt, gate, A, keep) else (rows, -(-T // GROUP), N, E)
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
    if scan_cuda.fits(u, dt, gate, A, keep=True):
        return scan_cuda.backward(u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths, kept, dy, dlast)
    u, dt, gate, dy = (rows_contiguous(x) for x in (u, dt, gate, dy))
    types = B.dtype, C.dtype
    B, C = B.float().contiguous(), C.float().contiguous()
    A, state, dlast = _channels_last(A), _channels_last(state), _channels_last(dlast)
    (rows, T, E), N = u.shape, A.shape[0]
    blocks = triton.cdiv(E, CHANNELS)
    f32 = {"dtype": torch.float32, "device": u.device}
    du, ddt, dgate = (torch.empty(rows, T, E, dtype=x.dtype, device=x.device) for x in (u, dt, gate))
    dBC = torch.empty(blocks, rows, T, N, 2, **f32)
    dA = torch.empty(rows, N, E, **f32)
    dstate = torch.empty_like(dA) if starts is None else torch.zeros_like(dA)
    dD, dbias = (torch.empty(rows, E, **f32) for _ in range(2))
    _backward_kernel[(blocks, rows)](
        u, dt, gate, B, C, dt_bias, A, D, state, starts, lengths, kept, dy, dlast,
        du, ddt, dgate, dBC, dbias, dA, dD, dstate,
        rows, T, E, *strides(u, dt, gate), state_row(state), *strides(dy), triton.cdiv(T, GROUP), 1,
        N=N, NP=max(16, triton.next_power_of_2(N)), EVERY=GROUP, GROUP=BACKWARD_GROUP, BE=CHANNELS,
        STARTS=starts is not None, LENGTHS=lengths is not None, PARTS=3 if u.dtype == torch.float32 else 1,
        num_warps=1,
    )  # fmt: skip
    dstate = dstate.transpose(1, 2)
    if state.shape[0] != rows:
        dstate = dstate.sum(0, keepdim=True)
    dBC = dBC.sum(0)
    dB, dC = (dBC[..., i].to(kind).contiguous() for i, kind in enumerate(types))
    return (
        du, ddt, dbias.sum(0).to(dt_bias.dtype), dA.sum(0).t().contiguous(), dB, dC,
        dD.sum(0).to(D.dtype), dgate, dstate.contiguous(),
    )  # fmt: skip


@scan_backward.register_fake
def _(u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths, kept, dy, dlast):
    like = lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device)  # noqa: E731
    return tuple(like(x) for x in (u, dt, dt_bias, A, B, C, D, gate, state))


def _setup(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])
    ctx.place = place_of(tensors[7])


def _backward(ctx, dy, dlast, _):
    saved = ctx.saved_tensors  # once: a recomputed block refuses to give them twice
    u, dt, _, A, _, _, _, gate, state = saved[:9]
    dy = torch.zeros_like(u) if dy is None else dy
    dlast = state.new_zeros(u.shape[0], *state.shape[1:]) if dlast is None else dlast
    if ctx.place and scan_cuda.fits(u, dt, gate, A, keep=True):  # a slice, so no graph is being compiled
        return *scan_cuda.backward(*saved, dy, dlast, dgate=ctx.place()), None, None, None
    return *torch.ops.hymba_gpu.scan_backward(*saved, dy, dlast), None, None, None


scan_forward.register_autograd(_backward, setup_context=_setup)
