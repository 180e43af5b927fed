"""Before anything is timed: every operation, and a step of the graph decoder, against the reference.

Each check runs in a process of its own, several at a time: nearly all of their time goes into compiling kernels, on one
core each.
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import Tensor

from hymba import Hymba, HymbaConfig, ops
from hymba.bench.gpu.measure import GPU, normal
from hymba.engine.decoder import make_decoder
from hymba.errors import UserError
from hymba.ops import reference
from hymba.visibility import KeyValue

# rounding of the reference in float32 against ours: sums in another order; bfloat16: 8 bits of the output
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
# through four layers
STEP_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
WORKERS = 14


def with_gradients(function: Callable, inputs: list[Tensor]) -> list[Tensor]:
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.manual_seed(1)
    sum((y.float() * torch.randn(y.shape, device=GPU)).sum() for y in outputs).backward()
    return [*(y.detach() for y in outputs), *(x.grad for x in inputs)]


def operations(T: int = 129) -> dict[str, tuple[Callable, list[Tensor]]]:
    """Every operation as a function of a backend and tensors, at odd sizes."""
    E, N, B, H, G, M = 200, 16, 2, 10, 2, 20
    starts = torch.zeros(B, T, dtype=torch.bool, device=GPU)
    starts[:, 0] = starts[0, 5] = starts[1, 1] = starts[0, 60:62] = True
    documents = starts.cumsum(1)
    lengths = torch.tensor([63, T], device=GPU)
    A = -normal(E, N).exp()
    wide = normal(3200, N).exp()
    scan = [normal(B, T, E), normal(B, T, E), normal(E), normal(B, T, N), normal(B, T, N), normal(E), normal(B, T, E)]

    def attention_inputs(B, T, M):
        return [normal(B, H, T, 64), *(normal(B, G, T, d) for d in (64, 128)), *(normal(1, G, M, d) for d in (64, 128))]

    kv = attention_inputs(B, T, M)

    def run_scan(starts, lengths, rows):
        state = normal(rows, E, N)
        return lambda b, u, dt, bias, B, C, D, z: b.selective_scan(u, dt, bias, A, B, C, D, z, state, starts, lengths)

    def run_attention(window, documents):
        def run(b, q, k, v, mk, mv):
            M, T = mk.shape[2], k.shape[2]
            at = torch.arange(M + T, device=GPU)[None]
            sources = (KeyValue(mk, mv, at[:, :M]), KeyValue(k, v, at[:, M:], documents))
            return b.attention(q, at[:, M:], documents, sources, window, M, 0.125)

        return run

    return {
        "rms_norm": (lambda b, x, w: b.rms_norm(x, w, 1e-6), [normal(B, T, E), normal(E)]),
        "mean_of_norms": (
            lambda b, x, y, v, w: b.mean_of_norms([x[:1, :5], x], [y[:1, :5], y], v, w, 1e-6),
            [*(normal(B, T, E) for _ in "xy"), normal(E), normal(E)]
        ),
        "selection": (
            lambda b, x, w, dt, *norms: b.selection(x, w, dt, norms, 1e-6),
            [normal(B, T, E), 0.1 * normal(21 + 2 * N, E), 0.1 * normal(E, 21), normal(21), normal(N), normal(N)],
        ),
        "conv": (lambda b, *x: b.causal_conv(*x), [normal(B, T, E), normal(E, 4), normal(E), normal(1, 3, E)]),
        "conv, documents": (
            lambda b, *x: b.causal_conv(*x, starts), [normal(B, T, E), normal(E, 4), normal(E), normal(1, 3, E)]
        ),
        "scan": (run_scan(None, None, 1), scan),
        "scan, long": (run_scan(None, None, 1), [x.repeat(1, 9, 1) if x.dim() == 3 else x for x in scan]),
        # segments of time, drawn by all of a card: 1.5B's width
        "scan, wide": (
            lambda b, u, dt, bias, B, C, D, z: b.selective_scan(u, dt, bias, -wide, B, C, D, z, 0 * wide[None]),
            [normal(3, 300, 3200), normal(3, 300, 3200), normal(3200), normal(3, 300, N), normal(3, 300, N),
             normal(3200), normal(3, 300, 3200)],
        ),
        "scan, documents": (run_scan(starts, None, 1), scan),
        "scan, lengths": (run_scan(None, lengths, B), scan),
        "scan, both": (run_scan(starts, lengths, B), scan),
        "scan, one step": (run_scan(None, None, B), [x[:, :1] if x.dim() == 3 else x for x in scan]),
        "attention": (run_attention(None, None), kv),
        "attention, window": (run_attention(40, None), kv),
        "attention, documents": (run_attention(40, documents), kv),
        # whole blocks, enough of them for kernels that have a multiprocessor for each program
        "attention, large": (run_attention(200, None), attention_inputs(8, 384, 128)),
    }  # fmt: skip


def _take_kernels_of_large_sizes(attention: bool = True) -> None:
    from hymba.ops import gpu
    from hymba.ops.gpu import scan_cuda, slices

    scan_cuda.LEAST = slices.LEAST = 0
    if attention:
        gpu.FEW = 0


def operation_error(dtype: str, name: str) -> float:
    """Largest relative error of outputs and gradients of one operation."""
    _take_kernels_of_large_sizes()
    torch.manual_seed(0)
    backend = ops.backend(torch.empty(1, device=GPU))
    function, inputs = operations()[name]
    inputs = [x.to(getattr(torch, dtype)) for x in inputs]
    ours = with_gradients(lambda *x: function(backend, *x), inputs)
    right = with_gradients(lambda *x: function(reference, *x), [x.float() for x in inputs])
    # a comparison with NaN is false, and a maximum may lose it
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(ours, right, strict=True)]
    return max(errors) if all(error == error for error in errors) else float("nan")


def small_config() -> HymbaConfig:
    """A few layers, with all that layers have."""
    return HymbaConfig(
        vocab_size=1000, d_model=320, n_layers=4, n_heads=5, n_kv_heads=1, d_ff=512, dt_rank=20, n_meta=16, window=64,
        global_layers=(0, 3), kv_groups=((1, 2),), max_length=512, rope="default", rope_original_length=None,
    )  # fmt: skip


def step_error(dtype: str) -> float:
    """Loss and gradients of a training step, all of them as one vector. In float32 attention is plain PyTorch's at this
    size: compiling FlexAttention takes longer than all other checks."""
    _take_kernels_of_large_sizes(attention=False)
    torch.manual_seed(0)
    with GPU:
        model = Hymba(small_config())
        ids = torch.randint(1, 1000, (2, 150))

    def gradients(type: torch.dtype) -> list[Tensor]:
        model.zero_grad()
        loss = model.to(type)(ids, labels=ids)
        loss.backward()
        return [loss.detach().float(), *(p.grad.float().clone() for p in model.parameters())]

    model.to(getattr(torch, dtype))  # the rounded weights are those of both
    ours = gradients(getattr(torch, dtype))
    with ops.use_backend("reference"):
        right = gradients(torch.float32)
    ours, right = (torch.cat([x.flatten() for x in xs]) for xs in (ours, right))
    return float((ours - right).norm() / right.norm())


@torch.no_grad()
def decoder_error(rows: int) -> float:
    """A prompt that has crossed the window, then tokens one at a time, in float32."""
    torch.manual_seed(0)
    with GPU:
        model = Hymba(small_config()).eval()
        ids = torch.randint(1, 1000, (rows, 90))
    with ops.use_backend("reference"):
        right = model(ids)
    cache = model.new_cache(rows, 128)
    parts = [model(ids[:, :80], cache=cache)]
    decode = make_decoder(model, rows)
    parts += [decode(ids[:, t], cache)[:, None] for t in range(80, ids.shape[1])]
    return float((torch.cat(parts, dim=1) - right).norm() / right.norm())


def _one_compiler() -> None:
    """PyTorch would start one for each core, in every process."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1


def check() -> dict[str, float]:
    """Relative errors by name. Raises `UserError` for one that rounding does not explain."""
    jobs = {
        f"{name}, {dtype}": (bound, operation_error, dtype, name)
        for dtype, bound in TOLERANCE.items()
        for name in operations()
    }
    jobs |= {f"training step, {dtype}": (bound, step_error, dtype) for dtype, bound in STEP_TOLERANCE.items()}
    jobs |= {f"graph decoder, {rows} rows": (STEP_TOLERANCE["float32"], decoder_error, rows) for rows in (1, 3)}
    workers = max(1, min(WORKERS, (os.cpu_count() or 1) - 1))
    errors = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_compiler) as pool:
        running = {name: (bound, pool.submit(*job)) for name, (bound, *job) in jobs.items()}
        for name, (bound, job) in running.items():
            error = errors[name] = job.result()
            print(f"  {name:36} {error:.1e}", flush=True)
            if not error < bound:
                pool.shutdown(cancel_futures=True)
                raise UserError(f"{name} is wrong on this GPU: relative error {error:.1e}; please report this")
    return errors
