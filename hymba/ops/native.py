"""The operations of `reference.py` on the CPU, by the kernels in `hymba/csrc`, in float32 and bfloat16, with gradients.

Every operation is a pair of plain functions, forward and backward, that allocate tensors and call a kernel. Eager code
reaches them through `torch.autograd.Function`; code under `torch.compile` through `compiled.py`.

    B batch, T time, E inner width, N state, K conv width, H query heads, G key/value heads, S keys
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from hymba.errors import UserError
from hymba.ops import reference
from hymba.ops.library import DTYPES, call, pointer, threads, vector_width
from hymba.ops.reference import (  # noqa: F401  in decoding they are part of other kernels
    gated_linear,
    gated_silu,
    heads,
    rotate,
    split,
)
from hymba.visibility import KeyValue

MAX_SOURCES = 16  # kMaxSources in csrc/attention.cpp
TILE = 32  # steps between kept scan states (kTile in csrc/scan.cpp)
# below this many multiply-adds a second thread costs more than it brings
ALONE = 1 << 15


def supports(x: Tensor) -> bool:
    return x.dtype in DTYPES and x.device.type == "cpu"


def _threads(work: int) -> int:
    return threads() if work >= ALONE else 1


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _rows(x: Tensor) -> Tensor:
    """x with a contiguous last dimension; the other strides may be anything, 0 included."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _same(x: Tensor, dtype: torch.dtype) -> Tensor:
    return _rows(x if x.dtype == dtype else x.to(dtype))


def _float(x: Tensor) -> Tensor:
    return x.float().contiguous()


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """The type that a kernel reads these in: bfloat16 if all are."""
    return torch.bfloat16 if all(x.dtype == torch.bfloat16 for x in tensors) else torch.float32


# ---- selective scan


def _scan_fields(u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths):
    """What both directions read -> (dtype, fields of ScanArgs up to `lengths`, tensors to keep alive)"""
    dtype = common_dtype(u, dt, B, C, gate)
    u, dt, gate, B, C = (_same(x, dtype) for x in (u, dt, gate, B, C))
    dt_bias, A, D = _float(dt_bias), _float(A), _float(D)
    state = _float(state)
    starts = None if starts is None else starts.contiguous()
    lengths = None if lengths is None else lengths.to(torch.int64).contiguous()
    (rows, T, E), N = u.shape, A.shape[1]
    strided = [field for x in (u, dt, gate, B, C) for field in (x.data_ptr(), x.stride(0), x.stride(1))]
    fields = (
        DTYPES[dtype], _threads(rows * T * E * N * 8), rows, T, E, N, *strided,
        dt_bias.data_ptr(), A.data_ptr(), D.data_ptr(),
        state.data_ptr(), E * N if state.shape[0] == rows else 0, pointer(starts), pointer(lengths),
    )  # fmt: skip
    return dtype, fields, (u, dt, gate, B, C, dt_bias, A, D, state, starts, lengths)


def kept_shape(u: Tensor, N: int) -> tuple[int, ...]:
    width = vector_width()
    return (u.shape[0], -(-u.shape[1] // TILE), -(-u.shape[2] // width), N, width)


def scan_forward(u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths, keep: bool):
    """-> y, last state, kept states (empty unless `keep`)"""
    dtype, fields, alive = _scan_fields(u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths)
    y = u.new_empty(u.shape, dtype=dtype)
    last = u.new_empty(u.shape[0], *A.shape, dtype=torch.float32)
    kept = u.new_empty(kept_shape(u, A.shape[1]) if keep else 0, dtype=torch.float32)
    call("scan_forward", *fields, y.data_ptr(), last.data_ptr(), kept.data_ptr() if keep else 0)
    del alive
    return y.to(u.dtype), last, kept


def scan_backward(u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths, kept, gy, glast):
    """-> gradients of u, dt, dt_bias, A, B, C, D, gate, state"""
    dtype, fields, alive = _scan_fields(u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths)
    (rows, T, E), N, n_threads = u.shape, A.shape[1], fields[1]
    gy = _same(gy, dtype)
    glast = None if glast is None else _float(glast)
    du, ddt, dgate = (torch.empty(rows, T, E, dtype=dtype) for _ in range(3))
    dbias, dD = torch.empty(rows, E), torch.empty(rows, E)
    dA, dstate = torch.empty(rows, E, N), torch.empty(rows, E, N)
    dB, dC = torch.zeros(n_threads, rows, T, N), torch.zeros(n_threads, rows, T, N)
    call(
        "scan_backward", *fields, 0, 0, kept.data_ptr(), gy.data_ptr(), gy.stride(0), gy.stride(1), pointer(glast),
        *(x.data_ptr() for x in (du, ddt, dgate, dbias, dD, dA, dstate, dB, dC)),
    )  # fmt: skip
    del alive
    dstate = dstate if state.shape[0] == rows else dstate.sum(0, keepdim=True)
    grads = (du, ddt, dbias.sum(0), dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dgate, dstate)
    return tuple(g.to(x.dtype) for g, x in zip(grads, (u, dt, dt_bias, A, B, C, D, gate, state), strict=True))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        y, last, kept = scan_forward(*inputs, True)
        ctx.save_for_backward(*inputs, kept)
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, glast):
        return (*scan_backward(*ctx.saved_tensors, gy, glast), None, None)


def selective_scan(u, dt, dt_bias, A, B, C, D, gate, state, starts=None, lengths=None) -> tuple[Tensor, Tensor]:
    inputs = (u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths)
    if needs_grad(*inputs[:9]):
        return _Scan.apply(*inputs)
    return scan_forward(*inputs, False)[:2]


def ssd(x, dt, dt_bias, A, B, C, D, gate, state, starts=None, lengths=None, scan=selective_scan):
    """As a selective scan whose channels share their decay: on two cores faster than the products of `chunked.ssd`, at
    states of 128 too (docs/log.md)."""
    P, N = x.shape[3], B.shape[2]
    channels = lambda x: x.repeat_interleave(P, dim=-1)  # noqa: E731
    dt_bias, A, D = dt_bias.float(), A.float(), D.float()  # so that gradients are summed before they are rounded
    y, last = scan(
        x.flatten(2), channels(dt), channels(dt_bias), channels(A)[:, None].expand(-1, N), B, C, channels(D),
        gate.flatten(2), state.flatten(1, 2), starts, lengths,
    )  # fmt: skip
    return y.view(x.shape), last.view(-1, *state.shape[1:])


# ---- causal convolution


def _conv_fields(x, weight, bias, state, starts):
    dtype = x.dtype
    x, state = _rows(x), _same(state, dtype).contiguous()
    weight, bias = weight.float().t().contiguous(), _float(bias)
    age = None
    if starts is not None:
        time = torch.arange(x.shape[1])
        age = time - torch.where(starts, time, -weight.shape[0]).cummax(dim=1).values
    (B, T, E), K = x.shape, weight.shape[0]
    fields = (
        DTYPES[dtype], _threads(B * T * E * 4), B, T, E, K, x.data_ptr(), x.stride(0), x.stride(1),
        weight.data_ptr(), bias.data_ptr(), state.data_ptr(), (K - 1) * E if state.shape[0] == B else 0, pointer(age),
    )  # fmt: skip
    return fields, (x, state, weight, bias, age)


def conv_forward(x, weight, bias, state, starts):
    fields, alive = _conv_fields(x, weight, bias, state, starts)
    y = torch.empty(x.shape, dtype=x.dtype)
    call("conv_forward", *fields, y.data_ptr())
    del alive
    return y


def conv_backward(x, weight, bias, state, starts, gy):
    """-> gradients of x, weight, bias, state"""
    fields, alive = _conv_fields(x, weight, bias, state, starts)
    (B, T, E), K = x.shape, weight.shape[1]
    gy = _same(gy, x.dtype)
    dx = torch.empty(B, T, E, dtype=x.dtype)
    dweight, dbias, dstate = torch.empty(B, K, E), torch.empty(B, E), torch.empty(B, K - 1, E)
    call(
        "conv_backward", *fields, 0, gy.data_ptr(), gy.stride(0), gy.stride(1), dx.data_ptr(), dweight.data_ptr(),
        dbias.data_ptr(), dstate.data_ptr(),
    )  # fmt: skip
    del alive
    dstate = dstate if state.shape[0] == B else dstate.sum(0, keepdim=True)
    grads = (dx, dweight.sum(0).t(), dbias.sum(0), dstate)
    return tuple(g.to(y.dtype).contiguous() for g, y in zip(grads, (x, weight, bias, state), strict=True))


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return conv_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy):
        return (*conv_backward(*ctx.saved_tensors, gy), None)


def causal_conv(x, weight, bias, state, starts=None) -> Tensor:
    inputs = (x, weight, bias, state, starts)
    return _Conv.apply(*inputs) if needs_grad(*inputs[:4]) else conv_forward(*inputs)


branch_conv = partial(reference.branch_conv, conv=causal_conv)


# ---- norms


def _as_4d(x: Tensor) -> Tensor:
    return x.flatten(0, -4) if x.dim() > 4 else x.view(*(1,) * (4 - x.dim()), *x.shape)


def _norm_fields(x, weight, eps):
    """-> (fields of NormArgs up to w, x and weight as (d0, d1, d2, D) views, to keep alive)"""
    x, weight = _as_4d(_rows(x)), _rows(weight)
    spread = weight.expand(x.shape)
    if spread.stride(-1) != 1 and x.shape[-1] > 1:  # one weight for a whole row
        spread = weight.expand(*weight.shape[:-1], x.shape[-1]).contiguous().expand(x.shape)
    fields = (
        DTYPES[x.dtype], DTYPES[weight.dtype], _threads(x.numel()), *x.shape, float(eps),
        x.data_ptr(), *x.stride()[:3], spread.data_ptr(), *spread.stride()[:3],
    )  # fmt: skip
    return fields, (x, spread)


def norm_forward(x, weight, eps: float):
    fields, alive = _norm_fields(x, weight, eps)
    y = torch.empty(alive[0].shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    call("norm_forward", *fields, y.data_ptr(), *y.stride()[:3])
    return y.view(x.shape)


def norm_backward(x, weight, eps: float, gy):
    """-> gradients of x, weight"""
    fields, alive = _norm_fields(x, weight, eps)
    gy = _as_4d(_same(gy, torch.promote_types(x.dtype, weight.dtype)))
    dx = torch.empty(alive[0].shape, dtype=x.dtype)
    # as the weight lies in memory
    size = 1 + sum((n - 1) * s for n, s in zip(alive[1].shape, alive[1].stride(), strict=True))
    dweight = torch.zeros(fields[2], size)
    call(
        "norm_backward", *fields, 0, 0, 0, 0, gy.data_ptr(), *gy.stride()[:3], dx.data_ptr(), *dx.stride()[:3],
        dweight.data_ptr(), size,
    )  # fmt: skip
    dweight = dweight.sum(0).as_strided(
        tuple(1 if s == 0 else n for n, s in zip(alive[1].shape, alive[1].stride(), strict=True)),
        alive[1].stride(),
    )
    return dx.view(x.shape), dweight.sum_to_size(_as_4d(weight).shape).reshape(weight.shape).to(weight.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return norm_forward(x, weight, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy):
        return (*norm_backward(*ctx.saved_tensors, ctx.eps, gy), None)


def rms_norm(x, weight, eps) -> Tensor:
    return _Norm.apply(x, weight, eps) if needs_grad(x, weight) else norm_forward(x, weight, eps)


def _mean_fields(attn, ssm, attn_weight, ssm_weight, eps):
    D = attn.shape[-1]
    dtype = common_dtype(attn, ssm, attn_weight, ssm_weight)
    alive = (
        *(_same(x, dtype).reshape(-1, D) for x in (attn, ssm)),
        *(_same(w, dtype) for w in (attn_weight, ssm_weight)),
    )
    rows = alive[0].shape[0]
    fields = (
        DTYPES[dtype], _threads(2 * attn.numel()), rows, D, float(eps), alive[0].data_ptr(), alive[1].data_ptr(),
        alive[0].stride(0), alive[1].stride(0), alive[2].data_ptr(), alive[3].data_ptr(),
    )  # fmt: skip
    return dtype, fields, alive


def mean_forward(attn, ssm, attn_weight, ssm_weight, eps: float):
    dtype, fields, alive = _mean_fields(attn, ssm, attn_weight, ssm_weight, eps)
    y = torch.empty(attn.shape, dtype=dtype)
    call("mean_forward", *fields, y.data_ptr())
    del alive
    return y


def mean_backward(attn, ssm, attn_weight, ssm_weight, eps: float, gy):
    """-> gradients of attn, ssm, attn_weight, ssm_weight"""
    dtype, fields, alive = _mean_fields(attn, ssm, attn_weight, ssm_weight, eps)
    gy = _same(gy, dtype).reshape(-1, attn.shape[-1])
    da, ds = torch.empty(attn.shape, dtype=dtype), torch.empty(attn.shape, dtype=dtype)
    dweight = torch.zeros(fields[1], 2, attn.shape[-1])
    call("mean_backward", *fields, 0, gy.data_ptr(), gy.stride(0), da.data_ptr(), ds.data_ptr(), dweight.data_ptr())
    del alive
    dattn_weight, dssm_weight = dweight[:, 0].sum(0), dweight[:, 1].sum(0)
    grads = zip((da, ds, dattn_weight, dssm_weight), (attn, ssm, attn_weight, ssm_weight), strict=True)
    return tuple(g.to(x.dtype) for g, x in grads)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs[:4])
        ctx.eps = inputs[4]
        return mean_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy):
        return (*mean_backward(*ctx.saved_tensors, ctx.eps, gy), None)


branch_norm = partial(reference.branch_norm, norm=rms_norm)
selection = partial(reference.selection, norm=rms_norm)


def mean_of_norms(attn, ssm, attn_weight, ssm_weight, eps) -> Tensor:
    learns = needs_grad(*attn, *ssm, attn_weight, ssm_weight)
    mean = _Mean.apply if learns else mean_forward
    return reference.rows_of([mean(a, b, attn_weight, ssm_weight, eps) for a, b in zip(attn, ssm, strict=True)])


# ---- attention


def _attention_fields(q, positions, documents, sources, window, n_meta, scale):
    """-> (fields of AttentionArgs up to `scale`, fields of its sources, tensors to keep alive)"""
    if len(sources) > MAX_SOURCES:
        raise ValueError(f"attention reads at most {MAX_SOURCES} sources of keys, not {len(sources)}")
    q = _rows(q)
    B, H, T, dk = q.shape
    G, dv = sources[0].k.shape[1], sources[0].v.shape[3]
    positions = _ids(positions)
    documents = None if documents is None else _ids(documents)
    alive, tail, first = [q, positions, documents], [], 0
    for source in sources:
        S = source.k.shape[2]
        k, v, where = _same(source.k, q.dtype), _same(source.v, q.dtype), _ids(source.positions)
        owners = None if documents is None or source.documents is None else _ids(source.documents)
        shared = k.shape[0] == 1 and B > 1
        tail += [
            k.data_ptr(), v.data_ptr(), S, 0 if shared else k.stride(0), k.stride(1), k.stride(2),
            0 if v.shape[0] == 1 and B > 1 else v.stride(0), v.stride(1), v.stride(2),
            where.data_ptr(), 0 if where.shape[0] == 1 else S, pointer(owners), first,
        ]  # fmt: skip
        alive += [k, v, where, owners]
        first += S
    fields = [
        DTYPES[q.dtype], _threads(B * H * T * first * (dk + dv) // 8), B, H, G, T, dk, dv,
        q.data_ptr(), *q.stride()[:3], positions.data_ptr(), 0 if positions.shape[0] == 1 else T, pointer(documents),
        -1 if window is None else window, n_meta, float(scale),
    ]  # fmt: skip
    return fields, [len(sources), *tail], alive


def _ids(x: Tensor) -> Tensor:
    """Positions or document ids as the kernels read them."""
    return x.to(torch.int64).contiguous()


def attention_forward(q, positions, documents, sources, window, n_meta, scale, keep: bool):
    """-> y, log of the sums (B, H, T) to base 2 (empty unless `keep`)"""
    fields, tail, alive = _attention_fields(q, positions, documents, sources, window, n_meta, scale)
    B, H, T, _ = q.shape
    y = torch.empty(B, T, H * sources[0].v.shape[3], dtype=q.dtype)
    lse = torch.empty((B, H, T) if keep else 0)
    call("attention_forward", *fields, y.data_ptr(), lse.data_ptr() if keep else 0, *(0,) * 7, *tail)
    del alive
    return y, lse


def attention_backward(q, positions, documents, sources, window, n_meta, scale, y, lse, gy):
    """-> gradient of q, of each source's k, of each source's v"""
    fields, tail, alive = _attention_fields(q, positions, documents, sources, window, n_meta, scale)
    (B, _, _, dk), G, dv = q.shape, sources[0].k.shape[1], sources[0].v.shape[3]
    gy, n_threads = _same(gy, q.dtype), fields[1]
    dq = torch.empty(q.shape, dtype=q.dtype)
    # rows and key heads are independent; if there are too few for the threads, query blocks are dealt out as well
    parts = n_threads // math.gcd(n_threads, B * G) if 4 * n_threads > B * G else 1
    S, width = sum(source.k.shape[2] for source in sources), vector_width()
    dks = torch.zeros(parts, B, G, S, -(-dk // width) * width)
    dvs = torch.zeros(parts, B, G, S, -(-dv // width) * width)
    call(
        "attention_backward", *fields, y.data_ptr(), lse.data_ptr(), gy.data_ptr(), gy.stride(0), gy.stride(1),
        dq.data_ptr(), dks.data_ptr(), dvs.data_ptr(), parts, *tail,
    )  # fmt: skip
    del alive
    sizes = [source.k.shape[2] for source in sources]
    grads = []
    for name, total, size in (("k", dks, dk), ("v", dvs, dv)):
        total = total[..., :size].sum(0) if parts > 1 else total[0, ..., :size]
        for source, part in zip(sources, total.split(sizes, dim=2), strict=True):
            x = getattr(source, name)
            part = part.sum(0, keepdim=True) if x.shape[0] == 1 and B > 1 else part
            grads.append(torch.empty(x.shape, dtype=x.dtype).copy_(part))
    return dq, grads[: len(sources)], grads[len(sources) :]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, positions, documents, window, n_meta, scale, n, *parts):
        sources = [KeyValue(*parts[i::n]) for i in range(n)]
        y, lse = attention_forward(q, positions, documents, sources, window, n_meta, scale, True)
        ctx.save_for_backward(q, positions, documents, y, lse, *parts)
        ctx.rule = (window, n_meta, scale, n)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy):
        q, positions, documents, y, lse, *parts = ctx.saved_tensors
        window, n_meta, scale, n = ctx.rule
        sources = [KeyValue(*parts[i::n]) for i in range(n)]
        dq, dks, dvs = attention_backward(q, positions, documents, sources, window, n_meta, scale, y, lse, gy)
        return (dq, *(None,) * 6, *dks, *dvs, *(None,) * (2 * n))


def attention(q, positions, documents, sources: Sequence[KeyValue], window, n_meta, scale) -> Tensor:
    if needs_grad(q, *(x for source in sources for x in (source.k, source.v))):
        parts = [getattr(source, name) for name in KeyValue._fields for source in sources]
        return _Attention.apply(q, positions, documents, window, n_meta, scale, len(sources), *parts)
    return attention_forward(q, positions, documents, sources, window, n_meta, scale, False)[0]


# ---- loss


def cross_entropy_(logits, targets, ignored: int) -> Tensor:
    if logits.stride(1) != 1:
        return reference.cross_entropy_(logits, targets, ignored)
    rows, V = logits.shape
    targets = _ids(targets)
    if bool(((targets != ignored) & ((targets < 0) | (targets >= V))).any()):
        raise UserError(f"a target is neither from 0 to {V - 1} nor {ignored}, which stands for none")
    losses = torch.empty(rows)
    call(
        "cross_entropy", DTYPES[logits.dtype], _threads(logits.numel() * 4), rows, V, logits.data_ptr(),
        logits.stride(0), targets.data_ptr(), ignored, losses.data_ptr(),
    )  # fmt: skip
    return losses
