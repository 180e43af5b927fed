"""Kernels against the limits of the card."""

import time
from collections.abc import Callable

import torch

from hymba import HymbaConfig, ops
from hymba.bench.gpu.measure import GPU, captured, free, normal, timed
from hymba.visibility import KeyValue

# dtype, rows, tokens of the scan and its neighbours
SHAPES = (
    (torch.bfloat16, 8, 2048),
    (torch.float32, 8, 2048),
    (torch.float32, 32, 2048),
    (torch.bfloat16, 1, 8192),
    (torch.float32, 1, 8192),
)
ROWS, LENGTH = 8, 2048  # of attention


def kernels(limit: dict[str, float], deadline: float) -> dict[str, dict[str, float]]:
    """Seconds without launches, and the share of the floor: bytes at the speed of a copy, operations at that of a large
    product, exponentials at what the units for them can do."""
    table: dict[str, dict[str, float]] = {}

    def row(
        name: str, work: Callable[[], object], bytes_moved: float = 0, operations: float = 0, exps: float = 0
    ) -> None:
        seconds = timed(captured(work), least=5, seconds=0.1)
        floors = {
            "memory": bytes_moved / limit["copy"],
            "products": operations / limit["product"],
            "exponentials": exps / limit["exponentials"],
        }
        table[name] = {"us": seconds * 1e6, **{f"of {k}": v / seconds for k, v in floors.items() if v}}
        shares = ", ".join(f"{v / seconds:.0%} of the floor of {k}" for k, v in floors.items() if v)
        print(f"  {name:44} {seconds * 1e6:8.0f} us  {shares}", flush=True)

    works = [lambda shape=shape: _recurrence(row, *shape, neighbours=shape == SHAPES[0]) for shape in SHAPES]
    for work in (*works, lambda: _attention(row, ROWS, LENGTH)):
        if time.perf_counter() > deadline:
            print("  the rest is left out, the time is up")
            break
        try:
            work()
        except Exception as error:  # one kernel must not cost the others
            print(f"  failed: {type(error).__name__} {str(error)[:300]}", flush=True)
        free()
    return table


def _recurrence(row: Callable, dtype: torch.dtype, B: int, T: int, neighbours: bool) -> None:
    """The scan; with `neighbours`, also its gradient, and what stands around it."""
    c = HymbaConfig.preset("1.5B")
    E, N = c.d_inner, c.d_state
    backend = ops.backend(torch.empty(1, device=GPU))
    u, dt, z = (normal(B, T, E, dtype=dtype).requires_grad_() for _ in range(3))
    b, c_out = (normal(B, T, N, dtype=dtype) for _ in range(2))
    A = -torch.arange(1, N + 1, device=GPU).float().expand(E, N).contiguous()
    rest = (normal(E) - 4, A, b, c_out, normal(E), z, torch.zeros(1, E, N, device=GPU))
    tag = f"{str(dtype)[6:]}, {B} x {T}"
    with torch.no_grad():
        row(f"scan, {tag}", lambda: backend.selective_scan(u, dt, *rest), 4 * u.nbytes, 0, u.numel() * N)
    if not neighbours:
        return
    conv = (normal(E, 4, dtype=dtype), normal(E, dtype=dtype), torch.zeros(1, 3, E, device=GPU, dtype=dtype))
    w, dy = normal(E, dtype=dtype), normal(B, T, E, dtype=dtype)
    works = {  # forward, what has a gradient, tensors that each direction moves
        "scan": (lambda: backend.selective_scan(u, dt, *rest)[0], (u, dt, z), 4, 7),
        "conv": (lambda: backend.causal_conv(u, *conv), (u,), 2, 3),
        "mean of norms": (lambda: backend.mean_of_norms([u], [dt], w, w, 1e-6).view_as(u), (u, dt), 3, 5),
        "gated SiLU": (lambda: backend.gated_silu(u, dt), (u, dt), 3, 5),
    }
    for name, (forward, leaves, there, back) in works.items():
        if name != "scan":
            with torch.no_grad():
                row(f"{name}, {tag}", forward, there * u.nbytes)

        # the graph is made anew each time: a captured gradient cannot use one that lives outside
        def both(forward=forward, leaves=leaves) -> None:
            torch.autograd.grad(forward(), leaves, dy)

        row(f"{name}, both ways, {tag}", both, (there + back) * u.nbytes)


def _attention(row: Callable, rows: int, length: int) -> None:
    c = HymbaConfig.preset("1.5B")
    G, H, M = c.n_kv_heads, c.n_heads, c.n_meta
    backend = ops.backend(torch.empty(1, device=GPU))
    at = torch.arange(M + length, device=GPU)[None]
    q = normal(rows, length, H, c.d_key, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
    k, v = (normal(rows, G, length, d, dtype=torch.bfloat16).requires_grad_() for d in (c.d_key, c.d_value))
    meta = KeyValue(*(normal(1, G, M, d, dtype=torch.bfloat16) for d in (c.d_key, c.d_value)), at[:, :M])
    dy = normal(rows, length, H * c.d_value, dtype=torch.bfloat16)
    for window in (None, c.window):
        seen = sum((t + 1 if window is None else min(t, window) + 1) + M for t in range(length))
        work = 2.0 * rows * H * seen * (c.d_key + c.d_value)

        def attend(window=window):
            return backend.attention(q, at[:, M:], None, (meta, KeyValue(k, v, at[:, M:])), window, M, 0.125)

        def both(attend=attend) -> None:
            torch.autograd.grad(attend(), (q, k, v), dy)

        row(f"attention, window {window}", attend, 0, work)
        row(f"attention, both ways, window {window}", both, 0, 3.5 * work)
