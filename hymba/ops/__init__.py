"""Kernels behind one door: the model calls `ops.selective_scan(...)` and does not know who computes it.

Every backend is a module with the functions of `reference.py`, which is the definition. `backend()` makes the choice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from torch import Tensor

from hymba.errors import UserError
from hymba.ops import reference

BACKENDS: dict[str, ModuleType] = {"reference": reference}

_forced: str | None = None


def backend(x: Tensor) -> ModuleType:
    """The module that computes operations on tensors like `x`."""
    return BACKENDS[_forced or "reference"]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend: `with ops.use_backend("reference"):`. Raises `UserError` for a name that is not there."""
    global _forced
    if name not in BACKENDS:
        raise UserError(f"unknown backend {name!r}; available here: {', '.join(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def rms_norm(x, weight, eps):
    return backend(x).rms_norm(x, weight, eps)


def mean_of_norms(attn, ssm, attn_weight, ssm_weight, eps):
    return backend(attn).mean_of_norms(attn, ssm, attn_weight, ssm_weight, eps)


def causal_conv(x, weight, bias, state, starts=None):
    return backend(x).causal_conv(x, weight, bias, state, starts)


def selective_scan(u, dt, dt_bias, A, B, C, D, gate, state, starts=None, lengths=None):
    return backend(u).selective_scan(u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths)


def attention(q, positions, documents, sources, window, n_meta, scale):
    return backend(q).attention(q, positions, documents, sources, window, n_meta, scale)


for _name in ("rms_norm", "mean_of_norms", "causal_conv", "selective_scan", "attention"):
    globals()[_name].__doc__ = getattr(reference, _name).__doc__
