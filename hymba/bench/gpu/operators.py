"""The operators that the released code needs compiled from source, where they can be imported: same numbers, and time.

Sizes are those of the 1.5B shape, forward alone and both ways, in bfloat16. flash-attn has one size for keys and
values, and neither meta tokens nor a mask of documents, so both sides get what it can do.
"""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from hymba import HymbaConfig, ops
from hymba.bench.gpu.measure import GPU, captured, free, normal, timed
from hymba.visibility import KeyValue

ROWS, LENGTH = 8, 2048
SOURCES = {  # operator: module, function
    "mamba-ssm scan": ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
    "causal-conv1d": ("causal_conv1d", "causal_conv1d_fn"),
    "flash-attn": ("flash_attn", "flash_attn_func"),
}


def operators() -> dict[str, dict[str, float]]:
    """Microseconds of ours and theirs, and how far their outputs are apart."""
    makers = {"mamba-ssm scan": _scan, "causal-conv1d": _conv, "flash-attn": _attention}
    table: dict[str, dict[str, float]] = {}
    for name, (module, function) in SOURCES.items():
        try:
            theirs = getattr(import_module(module), function)
        except (ImportError, AttributeError) as error:
            print(f"  {name}: not installed here ({error})", flush=True)
            continue
        try:
            table[name] = row = _compared(*makers[name](theirs))
        except Exception as error:  # one operator must not cost the others
            print(f"  {name} failed: {type(error).__name__} {str(error)[:300]}", flush=True)
            continue
        print(f"  {name}: " + ", ".join(f"{what} {value:.3g}" for what, value in row.items()), flush=True)
        free()
    return table


def _compared(ours: Callable, theirs: Callable, leaves: list[Tensor]) -> dict[str, float]:
    """Each: leaves -> one tensor, of the same shape"""
    with torch.no_grad():
        a, b = (run(*leaves).float() for run in (ours, theirs))
    row = {"relative difference": float((a - b).norm() / b.norm())}
    dy = torch.randn_like(a).to(leaves[0].dtype)
    for side, run in (("ours", ours), ("theirs", theirs)):
        with torch.no_grad():
            row[f"{side}, us"] = 1e6 * timed(captured(lambda run=run: run(*leaves)), least=5, seconds=0.1)

        def both(run=run) -> None:
            torch.autograd.grad(run(*leaves), leaves, dy)

        row[f"{side}, both ways, us"] = 1e6 * timed(captured(both), least=5, seconds=0.1)
    return row


def _scan(theirs: Callable) -> tuple[Callable, Callable, list[Tensor]]:
    c = HymbaConfig.preset("1.5B")
    E, N = c.d_inner, c.d_state
    backend = ops.backend(torch.empty(1, device=GPU))
    u, dt, z = (normal(ROWS, LENGTH, E, dtype=torch.bfloat16) for _ in range(3))
    B, C = (normal(ROWS, LENGTH, N, dtype=torch.bfloat16) for _ in range(2))
    A = -torch.arange(1, N + 1, device=GPU).float().expand(E, N).contiguous()
    bias, D, state = normal(E) - 4, normal(E), torch.zeros(1, E, N, device=GPU)

    def mine(u: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        return backend.selective_scan(u, dt, bias, A, B, C, D, z, state)[0]

    def other(u: Tensor, dt: Tensor, z: Tensor) -> Tensor:
        u, dt, z, b, c = (x.transpose(1, 2) for x in (u, dt, z, B, C))
        return theirs(u, dt, A, b, c, D, z, bias, delta_softplus=True).transpose(1, 2)

    return mine, other, [x.requires_grad_() for x in (u, dt, z)]


def _conv(theirs: Callable) -> tuple[Callable, Callable, list[Tensor]]:
    E = HymbaConfig.preset("1.5B").d_inner
    backend = ops.backend(torch.empty(1, device=GPU))
    x, weight, bias = (normal(*shape, dtype=torch.bfloat16) for shape in ((ROWS, LENGTH, E), (E, 4), (E,)))
    state = torch.zeros(1, 3, E, device=GPU, dtype=torch.bfloat16)

    def other(x: Tensor) -> Tensor:
        return theirs(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)

    return lambda x: backend.causal_conv(x, weight, bias, state), other, [x.requires_grad_()]


def _attention(theirs: Callable) -> tuple[Callable, Callable, list[Tensor]]:
    c = HymbaConfig.preset("1.5B")
    backend = ops.backend(torch.empty(1, device=GPU))
    at = torch.arange(LENGTH, device=GPU)[None]
    q, k, v = (
        normal(ROWS, LENGTH, heads, c.d_key, dtype=torch.bfloat16) for heads in (c.n_heads, c.n_kv_heads, c.n_kv_heads)
    )

    def mine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return backend.attention(q, at, None, (KeyValue(k, v, at),), c.window, 0, c.d_key**-0.5)

    def other(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return theirs(q, k, v, causal=True, window_size=(c.window, 0)).flatten(2)

    return mine, other, [x.requires_grad_() for x in (q, k, v)]
