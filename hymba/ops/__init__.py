"""Kernels behind one door: the model calls `ops.selective_scan(...)` and does not know who computes it.

Every backend is a module with the functions of `reference.py`, which is the definition:

    native      C++ kernels for the CPU (float32, bfloat16), if the package was installed with them
    gpu         Triton kernels for CUDA (float32, bfloat16, float16), where there is a device and `triton`
    torch       plain PyTorch without long Python loops, for every device and type
    reference   the definition

`backend()` makes the choice. `use_backend`, or the environment variable HYMBA_BACKEND, forces one. `observe` reports
every call, for those who want to see what happens inside a model.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hymba.errors import UserError
from hymba.ops import chunked, library, reference
from hymba.ops.reference import rows_of  # noqa: F401  a layout, the same for all backends

BACKENDS: dict[str, ModuleType] = {"torch": chunked, "reference": reference}
if library.available():
    from hymba.ops import compiled, native

    BACKENDS = {"native": native, **BACKENDS}
if torch.cuda.is_available() and find_spec("triton"):
    from hymba.ops import gpu

    BACKENDS = {"gpu": gpu, **BACKENDS}

# called with an operation's name, its arguments by name, and what it returned
Listener = Callable[[str, dict[str, Any], Any], None]

_forced: str | None = os.environ.get("HYMBA_BACKEND") or None
_listener: Listener | None = None


class _Observed:
    """A backend that reports its calls."""

    def __init__(self, module: ModuleType, listener: Listener):
        self._module, self._listener = module, listener

    def __getattr__(self, name: str) -> Callable:
        def call(*arguments):
            output = getattr(self._module, name)(*arguments)
            named = inspect.signature(getattr(reference, name)).bind(*arguments).arguments
            self._listener(name, named, output)
            return output

        return call


def backend(x: Tensor) -> ModuleType:
    """The module that computes operations on tensors like `x`. Raises `UserError` if HYMBA_BACKEND names none."""
    module = _choose(x)
    return module if _listener is None else _Observed(module, _listener)


def _choose(x: Tensor) -> ModuleType:
    module = chunked
    if _forced is not None:
        module = _backend(_forced)
    elif "native" in BACKENDS and native.supports(x):
        module = native
    elif "gpu" in BACKENDS and gpu.supports(x):
        return gpu
    if "native" in BACKENDS and module is native and torch.compiler.is_compiling():
        return compiled
    return module


def _backend(name: str) -> ModuleType:
    if name not in BACKENDS:
        missing = f" (native: {library.status()})" if name == "native" else ""
        raise UserError(f"unknown backend {name!r}; available here: {', '.join(BACKENDS)}{missing}")
    return BACKENDS[name]


def describe() -> dict[str, str]:
    """What computes on which tensors, and why no kernel does where that is so; for people (`hymba doctor`)."""
    if _forced is not None:
        return {"all tensors": f"{_forced}, forced by HYMBA_BACKEND or use_backend"}
    native_cpu = f"native: {library.status()}" if "native" in BACKENDS else f"torch, slower: {library.status()}"
    return {
        "CPU, float32 and bfloat16": native_cpu,
        "CPU, other types": "torch: the native kernels know float32 and bfloat16 only",
        "CUDA": "gpu: Triton kernels" if "gpu" in BACKENDS else "torch: no CUDA device, or no package `triton`",
        "other devices": "torch: plain PyTorch",
    }


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend: `with ops.use_backend("reference"):`. Raises `UserError` for a name that is not there."""
    global _forced
    _backend(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@contextmanager
def observe(listener: Listener) -> Iterator[None]:
    """Report every operation: `with ops.observe(listener):`. For eager code; the innermost listener hears."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def rms_norm(x, weight, eps):
    return backend(x).rms_norm(x, weight, eps)


def branch_norm(x, weight, eps, added=None):
    return backend(x).branch_norm(x, weight, eps, added)


def selection(x, weight, dt_weight, norms, eps):
    return backend(x).selection(x, weight, dt_weight, norms, eps)


def mean_of_norms(attn, ssm, attn_weight, ssm_weight, eps):
    return backend(attn[0]).mean_of_norms(attn, ssm, attn_weight, ssm_weight, eps)


def causal_conv(x, weight, bias, state, starts=None):
    return backend(x).causal_conv(x, weight, bias, state, starts)


def branch_conv(x, weight, bias, state, starts=None):
    return backend(x).branch_conv(x, weight, bias, state, starts)


def selective_scan(u, dt, dt_bias, A, B, C, D, gate, state, starts=None, lengths=None):
    return backend(u).selective_scan(u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths)


def ssd(x, dt, dt_bias, A, B, C, D, gate, state, starts=None, lengths=None):
    return backend(x).ssd(x, dt, dt_bias, A, B, C, D, gate, state, starts, lengths)


def attention(q, positions, documents, sources, window, n_meta, scale):
    return backend(q).attention(q, positions, documents, sources, window, n_meta, scale)


def split(x, widths, shapes):
    return backend(x).split(x, widths, shapes)


def heads(x, count):
    return backend(x).heads(x, count)


def rotate(x, cos, sin):
    return backend(x).rotate(x, cos, sin)


def gated_linear(x, gate, up):
    return backend(x).gated_linear(x, gate, up)


def gated_silu(gate, up):
    return backend(gate).gated_silu(gate, up)


def cross_entropy_(logits, targets, ignored):
    return backend(logits).cross_entropy_(logits, targets, ignored)


_NAMES = (
    "rms_norm", "branch_norm", "selection", "mean_of_norms", "causal_conv", "branch_conv", "selective_scan", "ssd",
    "attention", "split", "heads", "rotate", "gated_linear", "gated_silu", "cross_entropy_",
)  # fmt: skip
for _name in _NAMES:
    globals()[_name].__doc__ = getattr(reference, _name).__doc__
