"""`native.py` under `torch.compile`: every kernel is an operator of `torch.library`, so that a graph stays whole.

Eager code does not come this way, because an operator costs 17 us more per call than a plain function, and 34 us more
than a `torch.autograd.Function` where a gradient is wanted (measured; a small model makes hundreds of calls a step).
"""

from functools import partial
from typing import List, Sequence  # noqa: UP035 (PyTorch 2.6 knows no others in an operator's signature)

import torch
from torch import Tensor
from torch.library import custom_op

from hymba.ops import native, reference
from hymba.ops.reference import (  # noqa: F401  the compiler fuses them
    cross_entropy_,
    gated_linear,
    gated_silu,
    heads,
    rotate,
    split,
)
from hymba.visibility import KeyValue


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What a backward operator returns, for the tracer: gradients like their tensors."""
    return tuple(x.new_empty(x.shape) for x in tensors)


# ---- selective scan


@custom_op("hymba::scan_forward", mutates_args=())
def _scan_forward(
    u: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor, state: Tensor,
    starts: Tensor | None, lengths: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return native.scan_forward(u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths, keep)


@_scan_forward.register_fake
def _(u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths, keep):
    last = A.new_empty(u.shape[0], *A.shape, dtype=torch.float32)
    kept = A.new_empty(native.kept_shape(u, A.shape[1]) if keep else (0,), dtype=torch.float32)
    return u.new_empty(u.shape), last, kept


@custom_op("hymba::scan_backward", mutates_args=())
def _scan_backward(
    u: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor, state: Tensor,
    starts: Tensor | None, lengths: Tensor | None, kept: Tensor, gy: Tensor, glast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return native.scan_backward(u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths, kept, gy, glast)


@_scan_backward.register_fake
def _(u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths, kept, gy, glast):
    return _like(u, dt, dt_bias, A, B, C, D, gate, state)


def _scan_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:11], output[2])


def _scan_grad(ctx, gy, glast, _):
    return (*_scan_backward(*ctx.saved_tensors, gy, glast), None, None, None)


_scan_forward.register_autograd(_scan_grad, setup_context=_scan_setup)


def selective_scan(u, dt, dt_bias, A, B, C, D, gate, state, starts=None, lengths=None) -> tuple[Tensor, Tensor]:
    keep = native.needs_grad(u, dt, dt_bias, A, B, C, D, gate, state)
    return _scan_forward(u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths, keep)[:2]


def ssd(*inputs) -> tuple[Tensor, Tensor]:
    return native.ssd(*inputs, scan=selective_scan)


# ---- causal convolution


@custom_op("hymba::conv_forward", mutates_args=())
def _conv_forward(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, starts: Tensor | None) -> Tensor:
    return native.conv_forward(x, weight, bias, state, starts)


@_conv_forward.register_fake
def _(x, weight, bias, state, starts):
    return x.new_empty(x.shape)


@custom_op("hymba::conv_backward", mutates_args=())
def _conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, starts: Tensor | None, gy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return native.conv_backward(x, weight, bias, state, starts, gy)


@_conv_backward.register_fake
def _(x, weight, bias, state, starts, gy):
    return _like(x, weight, bias, state)


def _conv_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _conv_grad(ctx, gy):
    return (*_conv_backward(*ctx.saved_tensors, gy), None)


_conv_forward.register_autograd(_conv_grad, setup_context=_conv_setup)


def causal_conv(x, weight, bias, state, starts=None) -> Tensor:
    return _conv_forward(x, weight, bias, state, starts)


branch_conv = partial(reference.branch_conv, conv=causal_conv)


# ---- norms


@custom_op("hymba::norm_forward", mutates_args=())
def _norm_forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return native.norm_forward(x, weight, eps)


@_norm_forward.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))


@custom_op("hymba::norm_backward", mutates_args=())
def _norm_backward(x: Tensor, weight: Tensor, eps: float, gy: Tensor) -> tuple[Tensor, Tensor]:
    return native.norm_backward(x, weight, eps, gy)


@_norm_backward.register_fake
def _(x, weight, eps, gy):
    return _like(x, weight)


def _norm_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.eps = inputs[2]


def _norm_grad(ctx, gy):
    return (*_norm_backward(*ctx.saved_tensors, ctx.eps, gy), None)


_norm_forward.register_autograd(_norm_grad, setup_context=_norm_setup)


def rms_norm(x, weight, eps) -> Tensor:
    return _norm_forward(x, weight, eps)


@custom_op("hymba::mean_forward", mutates_args=())
def _mean_forward(attn: Tensor, ssm: Tensor, attn_weight: Tensor, ssm_weight: Tensor, eps: float) -> Tensor:
    return native.mean_forward(attn, ssm, attn_weight, ssm_weight, eps)


@_mean_forward.register_fake
def _(attn, ssm, attn_weight, ssm_weight, eps):
    return attn.new_empty(attn.shape, dtype=native.common_dtype(attn, ssm, attn_weight, ssm_weight))


@custom_op("hymba::mean_backward", mutates_args=())
def _mean_backward(
    attn: Tensor, ssm: Tensor, attn_weight: Tensor, ssm_weight: Tensor, eps: float, gy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return native.mean_backward(attn, ssm, attn_weight, ssm_weight, eps, gy)


@_mean_backward.register_fake
def _(attn, ssm, attn_weight, ssm_weight, eps, gy):
    return _like(attn, ssm, attn_weight, ssm_weight)


def _mean_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.eps = inputs[4]


def _mean_grad(ctx, gy):
    return (*_mean_backward(*ctx.saved_tensors, ctx.eps, gy), None)


_mean_forward.register_autograd(_mean_grad, setup_context=_mean_setup)


branch_norm = partial(reference.branch_norm, norm=rms_norm)
selection = partial(reference.selection, norm=rms_norm)


def mean_of_norms(attn, ssm, attn_weight, ssm_weight, eps) -> Tensor:
    parts = zip(attn, ssm, strict=True)
    return reference.rows_of([_mean_forward(a, b, attn_weight, ssm_weight, eps) for a, b in parts])


# ---- attention: an operator takes lists of tensors, not of tuples


def _sources(ks, vs, positions, documents) -> list[KeyValue]:
    return [KeyValue(*source) for source in zip(ks, vs, positions, documents, strict=True)]


@custom_op("hymba::attention_forward", mutates_args=())
def _attention_forward(
    q: Tensor, positions: Tensor, documents: Tensor | None, ks: Sequence[Tensor], vs: Sequence[Tensor],
    key_positions: Sequence[Tensor], key_documents: Sequence[Tensor | None], window: int | None, n_meta: int,
    scale: float, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sources = _sources(ks, vs, key_positions, key_documents)
    return native.attention_forward(q, positions, documents, sources, window, n_meta, scale, keep)


@_attention_forward.register_fake
def _(q, positions, documents, ks, vs, key_positions, key_documents, window, n_meta, scale, keep):
    B, H, T, _ = q.shape
    lse = q.new_empty((B, H, T) if keep else (0,), dtype=torch.float32)
    return q.new_empty(B, T, H * vs[0].shape[3]), lse


@custom_op("hymba::attention_backward", mutates_args=())
def _attention_backward(
    q: Tensor, positions: Tensor, documents: Tensor | None, ks: Sequence[Tensor], vs: Sequence[Tensor],
    key_positions: Sequence[Tensor], key_documents: Sequence[Tensor | None], window: int | None, n_meta: int,
    scale: float, y: Tensor, lse: Tensor, gy: Tensor,
) -> tuple[Tensor, List[Tensor], List[Tensor]]:  # noqa: UP006  # fmt: skip
    sources = _sources(ks, vs, key_positions, key_documents)
    return native.attention_backward(q, positions, documents, sources, window, n_meta, scale, y, lse, gy)


@_attention_backward.register_fake
def _(q, positions, documents, ks, vs, key_positions, key_documents, window, n_meta, scale, y, lse, gy):
    return q.new_empty(q.shape), list(_like(*ks)), list(_like(*vs))


def _attention_setup(ctx, inputs, output):
    q, positions, documents, ks, vs, key_positions, key_documents, *ctx.rule, _ = inputs
    ctx.save_for_backward(q, positions, documents, *output, *ks, *vs, *key_positions, *key_documents)
    ctx.n = len(ks)


def _attention_grad(ctx, gy, _):
    q, positions, documents, y, lse, *parts = ctx.saved_tensors
    lists = [parts[i * ctx.n : (i + 1) * ctx.n] for i in range(4)]
    dq, dks, dvs = _attention_backward(q, positions, documents, *lists, *ctx.rule, y, lse, gy)
    # PyTorch wants a list of Nones for a list of tensors, but one None for a list that holds a None
    no_documents = None if any(x is None for x in lists[3]) else [None] * ctx.n
    return dq, None, None, dks, dvs, [None] * ctx.n, no_documents, None, None, None, None


_attention_forward.register_autograd(_attention_grad, setup_context=_attention_setup)


def attention(q, positions, documents, sources: Sequence[KeyValue], window, n_meta, scale) -> Tensor:
    lists = [[getattr(source, name) for source in sources] for name in KeyValue._fields]
    keep = native.needs_grad(q, *lists[0], *lists[1])
    return _attention_forward(q, positions, documents, *lists, window, n_meta, scale, keep)[0]
