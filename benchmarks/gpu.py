"""Hymba on one GPU: kernels against the limits of the card, decoding and prefill against its peers, training.

    python benchmarks/gpu.py [--only check kernels decode prefill peers train] [--batches 1 8 32 128] [--seconds 500]

First every operation, and a step of the graph decoder, is compared with the reference. Weights are random. Peers are
the implementations of `transformers`, if it is installed, at the shapes of Llama-3.2-3B and Llama-3.2-1B, which decode
in a static cache under torch.compile with CUDA graphs. Caches are filled directly, with 8K tokens; a batch that does
not fit is halved. Times are medians of CUDA events. Sections that would begin after `--seconds` are left out. The last
line is one JSON line.
"""

import argparse
import gc
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from hymba import Hymba, HymbaConfig, ops
from hymba.bench.workloads import attention_operations, cache_bytes_read, matmul_weights
from hymba.engine.decoder import make_decoder
from hymba.ops import reference
from hymba.ops.gpu import flex
from hymba.visibility import KeyValue

CONTEXT, STEPS = 8192, 16
SECTIONS = ("check", "kernels", "decode", "prefill", "peers", "train")
# rounding of the reference in float32 against ours: sums in another order; bfloat16: 8 bits of the output
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
PEAK_BF16 = 989e12  # dense, H100 and H200, data sheet; MFU is a share of this
EXPONENTIALS_PER_CLOCK = 16  # of one multiprocessor
GPU = torch.device("cuda")


def timed(work: Callable[[], object], least: int = 10, seconds: float = 0.3) -> float:
    """Median seconds of one call, the L2 cache cold of its output at least."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    spans, began = [], time.perf_counter()
    while len(spans) < least or time.perf_counter() - began < seconds:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        spans.append(start.elapsed_time(end) / 1e3)
    return statistics.median(spans)


def limits() -> dict[str, float]:
    x = torch.randn(1 << 29, device=GPU, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy = 2 * x.nbytes / timed(lambda: y.copy_(x))
    read = x.nbytes / timed(lambda: x.view(torch.int32).sum())
    a = torch.randn(8192, 8192, device=GPU, dtype=torch.bfloat16)
    product = 2 * 8192**3 / timed(lambda: a @ a)
    properties = torch.cuda.get_device_properties(GPU)
    clock = 1.755e9 if not hasattr(properties, "clock_rate") else properties.clock_rate * 1e3
    return {
        "copy": copy, "read": read, "product": product,
        "exponentials": properties.multi_processor_count * EXPONENTIALS_PER_CLOCK * clock,
    }  # fmt: skip


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=GPU).to(dtype)


# ---- correctness


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
    A, at = -normal(E, N).exp(), torch.arange(M + T, device=GPU)[None]
    scan = [normal(B, T, E), normal(B, T, E), normal(E), normal(B, T, N), normal(B, T, N), normal(E), normal(B, T, E)]
    kv = [normal(B, H, T, 64), normal(B, G, T, 64), normal(B, G, T, 128), normal(1, G, M, 64), normal(1, G, M, 128)]

    def run_scan(starts, lengths, rows):
        state = normal(rows, E, N)
        return lambda b, u, dt, bias, B, C, D, z: b.selective_scan(u, dt, bias, A, B, C, D, z, state, starts, lengths)

    def run_attention(window, documents):
        def run(b, q, k, v, mk, mv):
            sources = (KeyValue(mk, mv, at[:, :M]), KeyValue(k, v, at[:, M:], documents))
            return b.attention(q, at[:, M:], documents, sources, window, M, 0.125)

        return run

    return {
        "rms_norm": (lambda b, x, w: b.rms_norm(x, w, 1e-6), [normal(B, T, E), normal(E)]),
        "mean_of_norms": (
            lambda b, x, y, v, w: b.mean_of_norms(x, y, v, w, 1e-6), [*(normal(B, T, E) for _ in "xy"), normal(E),
            normal(E)]
        ),
        "conv": (lambda b, *x: b.causal_conv(*x), [normal(B, T, E), normal(E, 4), normal(E), normal(1, 3, E)]),
        "conv, documents": (
            lambda b, *x: b.causal_conv(*x, starts), [normal(B, T, E), normal(E, 4), normal(E), normal(1, 3, E)]
        ),
        "scan": (run_scan(None, None, 1), scan),
        "scan, long": (run_scan(None, None, 1), [x.repeat(1, 9, 1) if x.dim() == 3 else x for x in scan]),
        "scan, documents": (run_scan(starts, None, 1), scan),
        "scan, lengths": (run_scan(None, lengths, B), scan),
        "scan, both": (run_scan(starts, lengths, B), scan),
        "scan, one step": (run_scan(None, None, B), [x[:, :1] if x.dim() == 3 else x for x in scan]),
        "attention": (run_attention(None, None), kv),
        "attention, window": (run_attention(40, None), kv),
        "attention, documents": (run_attention(40, documents), kv),
    }  # fmt: skip


def check() -> dict[str, float]:
    """Largest relative error of outputs and gradients, by dtype. Stops the benchmark if rounding does not explain
    one."""
    worst = {}
    flex.FEW = 0  # small sizes, too, by the kernel of large ones
    backend = ops.backend(torch.empty(1, device=GPU))
    for dtype, tolerance in TOLERANCE.items():
        torch.manual_seed(0)
        for name, (function, inputs) in operations().items():
            inputs = [x.to(dtype) for x in inputs]
            ours = with_gradients(lambda *x, f=function: f(backend, *x), inputs)
            right = with_gradients(lambda *x, f=function: f(reference, *x), [x.float() for x in inputs])
            error = max(float((a.float() - b).norm() / b.norm()) for a, b in zip(ours, right, strict=True))
            print(f"  {str(dtype)[6:]:9} {name:22} {error:.1e}", flush=True)
            if not error < tolerance:
                raise SystemExit(f"{name} is wrong in {dtype}: relative error {error:.1e}")
            worst[str(dtype)[6:]] = max(error, worst.get(str(dtype)[6:], 0))
    for rows in (1, 3):
        worst[f"graph decoder, {rows} rows"] = check_decoder(rows)
    return worst


@torch.no_grad()
def check_decoder(rows: int) -> float:
    """A few layers, a prompt that has crossed the window, then tokens one at a time, in float32."""
    config = HymbaConfig(
        vocab_size=1000, d_model=320, n_layers=4, n_heads=5, n_kv_heads=1, d_ff=512, dt_rank=20, n_meta=16, window=64,
        global_layers=(0, 3), kv_groups=((1, 2),), max_length=512, rope="default", rope_original_length=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with GPU:
        model = Hymba(config).eval()
        ids = torch.randint(1, config.vocab_size, (rows, 90))
    with ops.use_backend("reference"):
        right = model(ids)
    cache = model.new_cache(rows, 128)
    parts = [model(ids[:, :80], cache=cache)]
    decode = make_decoder(model, rows)
    parts += [decode(ids[:, t], cache)[:, None] for t in range(80, ids.shape[1])]
    error = float((torch.cat(parts, dim=1) - right).norm() / right.norm())
    print(f"  graph decoder, {rows} rows: {error:.1e} ({decode.__qualname__})", flush=True)
    if not error < 1e-4:  # float32 through four layers
        raise SystemExit(f"decoding is wrong: relative error {error:.1e}")
    return error


# ---- kernels against the card


def kernels(limit: dict[str, float]) -> dict[str, dict[str, float]]:
    """Seconds, and the share of the floor: bytes at the speed of a copy, or operations at that of a large product."""
    c = HymbaConfig.preset("1.5B")
    E, N, G, H, M = c.d_inner, c.d_state, c.n_kv_heads, c.n_heads, c.n_meta
    backend, table = ops.backend(torch.empty(1, device=GPU)), {}

    def row(
        name: str, work: Callable[[], object], bytes_moved: float = 0, operations: float = 0, exps: float = 0
    ) -> None:
        seconds = timed(work)
        floors = {"memory": bytes_moved / limit["copy"], "products": operations / limit["product"]}
        if exps:
            floors["exponentials"] = exps / limit["exponentials"]
        table[name] = {"us": seconds * 1e6, **{f"of {k}": v / seconds for k, v in floors.items() if v}}
        shares = ", ".join(f"{v / seconds:.0%} of the floor of {k}" for k, v in floors.items() if v)
        print(f"  {name:44} {seconds * 1e6:8.0f} us  {shares}", flush=True)

    for dtype, B, T in ((torch.bfloat16, 1, 8192), (torch.float32, 1, 8192), (torch.bfloat16, 8, 2048)):
        u, dt, z = (normal(B, T, E, dtype=dtype).requires_grad_() for _ in range(3))
        b, c_out = (normal(B, T, N, dtype=dtype) for _ in range(2))
        A = -torch.arange(1, N + 1, device=GPU).float().expand(E, N).contiguous()
        rest = (normal(E) - 4, A, b, c_out, normal(E), z, torch.zeros(1, E, N, device=GPU))
        tag = f"{str(dtype)[6:]}, {B} x {T}"
        with torch.no_grad():
            row(f"scan, {tag}", lambda: backend.selective_scan(u, dt, *rest), 4 * u.nbytes, 0, u.numel() * N)
        y, _ = backend.selective_scan(u, dt, *rest)
        dy = torch.randn_like(y)
        row(f"scan backward, {tag}", lambda: torch.autograd.grad(y, (u, dt, z), dy, retain_graph=True), 7 * u.nbytes)
        conv = (normal(E, 4, dtype=dtype), normal(E, dtype=dtype), torch.zeros(1, 3, E, device=GPU, dtype=dtype))
        with torch.no_grad():
            row(f"conv, {tag}", lambda: backend.causal_conv(u, *conv), 2 * u.nbytes)
            w = normal(E, dtype=dtype)
            row(f"mean of norms, {tag}", lambda: backend.mean_of_norms(u, dt, w, w, 1e-6), 3 * u.nbytes)
        y = backend.causal_conv(u, *conv)
        row(f"conv backward, {tag}", lambda: torch.autograd.grad(y, u, dy, retain_graph=True), 3 * u.nbytes)
        y = backend.mean_of_norms(u, dt, w, w, 1e-6)
        row(
            f"mean of norms backward, {tag}",
            lambda: torch.autograd.grad(y, (u, dt), dy, retain_graph=True),
            5 * u.nbytes,
        )
    B, T = 8, 2048
    at = torch.arange(M + T, device=GPU)[None]
    q = normal(B, H, T, c.d_key, dtype=torch.bfloat16).requires_grad_()
    k, v = (normal(B, G, T, d, dtype=torch.bfloat16).requires_grad_() for d in (c.d_key, c.d_value))
    meta = KeyValue(*(normal(1, G, M, d, dtype=torch.bfloat16) for d in (c.d_key, c.d_value)), at[:, :M])
    for window in (None, c.window):
        seen = sum((t + 1 if window is None else min(t, window) + 1) + M for t in range(T))
        work = 2.0 * B * H * seen * (c.d_key + c.d_value)

        def attend(window=window):
            return backend.attention(q, at[:, M:], None, (meta, KeyValue(k, v, at[:, M:])), window, M, 0.125)

        with torch.no_grad():
            row(f"attention, window {window}", attend, 0, work)
        y = attend()
        dy = torch.randn_like(y)
        row(f"attention backward, window {window}",
            lambda y=y, dy=dy: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True), 0, 2.5 * work)  # fmt: skip
        flex = flex_attention(q, k, v, meta, window)
        if flex is not None:
            with torch.no_grad():
                row(f"FlexAttention, window {window}", flex, 0, work)
            y = flex()
            dy = torch.randn_like(y)
            row(f"FlexAttention backward, window {window}",
                lambda y=y, dy=dy: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True), 0, 2.5 * work)  # fmt: skip
    return table


def flex_attention(q: Tensor, k: Tensor, v: Tensor, meta: KeyValue, window: int | None) -> Callable[[], Tensor] | None:
    """The same attention by PyTorch's compiler, its block mask made beforehand."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask
        from torch.nn.attention.flex_attention import flex_attention as flex

        M, T, B = meta.k.shape[2], q.shape[2], q.shape[0]

        def allowed(b, h, i, j):
            causal = j <= i + M
            return causal if window is None else causal & ((i + M - j <= window) | (j < M))

        mask = create_block_mask(allowed, None, None, T, M + T, device=q.device)
        compiled = torch.compile(flex)

        def run():
            keys = torch.cat([meta.k.expand(B, -1, -1, -1), k], dim=2)
            values = torch.cat([meta.v.expand(B, -1, -1, -1), v], dim=2)
            return compiled(q, keys, values, block_mask=mask, scale=0.125, enable_gqa=True)

        run()
        return run
    except Exception as error:  # not of this version, or not for these head sizes
        print(f"  FlexAttention does not take this: {type(error).__name__} {str(error)[:150]}")
        return None


# ---- decoding and prefill


def random_model(config: HymbaConfig, dtype: torch.dtype = torch.bfloat16) -> Hymba:
    with GPU:
        model = Hymba(config)
    rates = [block.heads.mamba.A_log.detach().clone() for block in model.blocks]
    model = model.to(dtype).eval()
    for block, rate in zip(model.blocks, rates, strict=True):
        block.heads.mamba.A_log.data = rate
    return model


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def largest(batch: int, measure: Callable[[int], dict]) -> dict:
    """`measure`, with the batch halved until it fits."""
    while True:
        try:
            return {"batch": batch, **measure(batch)}
        except torch.OutOfMemoryError:
            free()
            if batch == 1:
                return {"batch": 0}
            batch //= 2


@torch.no_grad()
def decode(batches: list[int], limit: dict[str, float]) -> list[dict]:
    model, table = random_model(HymbaConfig.preset("1.5B")), []
    weights = sum(p.nbytes for p in model.parameters())

    def measure(batch: int) -> dict:
        cache = model.new_cache(batch, CONTEXT)
        for store in (*cache.k.values(), *cache.v.values()):
            store.normal_()
        before = CONTEXT - STEPS - 4
        ids, step = torch.ones(batch, dtype=torch.int64, device=GPU), make_decoder(model, batch)

        def run() -> None:
            cache.lengths.fill_(before)
            for _ in range(STEPS):
                step(ids, cache)

        seconds = timed(run, least=5) / STEPS
        # states are read and written, keys and values read
        moved = weights + cache_bytes_read(cache, before) + cache.ssm.nbytes + cache.conv.nbytes
        return {
            "tokens/s": batch / seconds, "ms a step": seconds * 1e3,
            "of weight reading": weights / limit["copy"] / seconds,
            "of all bytes": moved / limit["copy"] / seconds, "cache MB a row": _row_bytes(cache) / 1e6,
        }  # fmt: skip

    for batch in batches:
        row = largest(batch, measure)
        print(f"  Hymba-1.5B, decode at 8K: {_format(row)}", flush=True)
        table.append(row)
        free()
    return table


def _row_bytes(cache) -> float:
    return sum(value for name, value in cache.bytes().items() if name != "meta") / cache.batch_size


def _format(row: dict) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
    )


@torch.no_grad()
def prefill(length: int = CONTEXT, chunk: int = 2048) -> list[dict]:
    model, table = random_model(HymbaConfig.preset("1.5B")), []
    for batch in (1, 8):
        ids = torch.randint(1, 32000, (batch, length), device=GPU)

        def run(batch=batch, ids=ids) -> None:
            cache.lengths.zero_()
            for piece in ids.split(chunk, dim=1):
                hidden = model.hidden(piece, cache=cache)
            model.lm_head(hidden[:, -1])

        cache = model.new_cache(batch, length)
        seconds = timed(run, least=3)
        work = batch * (2.0 * length * matmul_weights(model) + attention_operations(model.config, 0, length))
        row = {"batch": batch, "tokens/s": batch * length / seconds, "share of peak": work / seconds / PEAK_BF16}
        print(f"  Hymba-1.5B, prefill of {length} in pieces of {chunk}: {_format(row)}", flush=True)
        table.append(row)
    return table


# ---- peers


def peer_configs() -> dict[str, object]:
    """Shapes from the released configs."""
    import transformers as tf

    llama = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 16384,
             "tie_word_embeddings": True, "rms_norm_eps": 1e-5}  # fmt: skip
    return {
        "Llama-3.2-3B": tf.LlamaConfig(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128,
                                       intermediate_size=8192, **llama),
        "Llama-3.2-1B": tf.LlamaConfig(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, head_dim=64,
                                       intermediate_size=8192, **llama),
    }  # fmt: skip


@torch.no_grad()
def peers(batches: list[int], deadline: float) -> dict[str, list[dict]]:
    try:
        import transformers as tf
    except ImportError:
        print("  transformers is not installed: no peers")
        return {}
    tables: dict[str, list[dict]] = {}
    for name, config in peer_configs().items():
        config._attn_implementation = "sdpa"
        with GPU:
            torch.set_default_dtype(torch.bfloat16)
            model = tf.LlamaForCausalLM(config).eval()
            torch.set_default_dtype(torch.float32)

        def measure(batch: int, model=model, config=config) -> dict:
            torch._dynamo.reset()
            cache = tf.StaticCache(config=config, max_cache_len=CONTEXT)
            heads, size = config.num_key_value_heads, config.head_dim
            cache.early_initialization(
                batch_size=batch, num_heads=heads, head_dim=size, dtype=torch.bfloat16, device=GPU
            )
            for layer in cache.layers:
                layer.keys.normal_()
                layer.values.normal_()
            stored = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
            ids = torch.ones(batch, 1, dtype=torch.int64, device=GPU)
            before = CONTEXT - STEPS - 4
            step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

            def run() -> None:
                for layer in cache.layers:
                    layer.cumulative_length.fill_(before)
                positions = torch.full((batch, 1), before, device=GPU)
                for _ in range(STEPS):
                    step(ids, past_key_values=cache, position_ids=positions, use_cache=True)
                    positions = positions + 1

            seconds = timed(run, least=5) / STEPS
            return {"tokens/s": batch / seconds, "ms a step": seconds * 1e3, "cache MB a row": stored / batch / 1e6}

        tables[name] = []
        for batch in batches:
            if time.perf_counter() > deadline:
                print(f"  {name}, batch {batch}: left out, the time is up")
                continue
            if tables[name] and tables[name][-1]["batch"] < batch // 2:
                continue  # a smaller one did not fit
            try:
                row = largest(batch, measure)
            except Exception as error:
                print(f"  {name}, batch {batch}: {type(error).__name__} {str(error)[:300]}")
                continue
            print(f"  {name}, decode at 8K: {_format(row)}", flush=True)
            tables[name].append(row)
            free()
        del model
        free()
    return tables


# ---- training


def train(deadline: float, length: int = 2048) -> dict[str, dict]:
    """Forward and backward of one batch under torch.compile: bfloat16 weights, tokens a second and model FLOPs."""
    table = {}
    torch._dynamo.config.cache_size_limit = 64  # a block has a handful of forms: with keys or without, window or none
    for name, batch in (("1.5B", 8), ("350M", 16), ("125M", 32)):
        if time.perf_counter() > deadline:
            print(f"  {name}: left out, the time is up")
            continue
        config = replace(HymbaConfig.preset(name), max_length=8192)
        model = random_model(config).train()
        for compiled in (False, True):

            def measure(batch: int, model=model, compiled=compiled) -> dict:
                torch._dynamo.reset()
                ids = torch.randint(1, 32000, (batch, length), device=GPU)
                if compiled:
                    for block in model.blocks:
                        block.compile()

                def run() -> None:
                    model.zero_grad(set_to_none=True)
                    model(ids, labels=ids).backward()

                seconds = timed(run, least=3, seconds=1.0)
                weights = matmul_weights(model) + config.vocab_size * config.d_model
                work = 3 * batch * (2.0 * length * weights + attention_operations(config, 0, length))
                return {
                    "tokens/s": batch * length / seconds, "MFU": work / seconds / PEAK_BF16,
                    "GB": torch.cuda.max_memory_allocated() / 1e9,
                }  # fmt: skip

            torch.cuda.reset_peak_memory_stats()
            try:
                row = largest(batch, measure)
            except Exception as error:
                print(f"  {name}, compiled {compiled}: {type(error).__name__} {str(error)[:500]}")
                continue
            table[f"{name}{', compiled' if compiled else ''}"] = row
            print(f"  train {name} at {length}{', compiled' if compiled else ''}: {_format(row)}", flush=True)
        del model
        free()
    return table


def commit() -> str:
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--seconds", type=float, default=3600.0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a CUDA GPU")
    deadline = time.perf_counter() + arguments.seconds
    report: dict[str, object] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit()}
    report["limits"] = limit = limits()
    print(f"{report['gpu']}, PyTorch {torch.__version__}: copy {limit['copy'] / 1e12:.2f} TB/s, read "
          f"{limit['read'] / 1e12:.2f} TB/s, bfloat16 product {limit['product'] / 1e12:.0f} TFLOP/s",
          flush=True)  # fmt: skip
    sections = {
        "check": check, "kernels": lambda: kernels(limit), "decode": lambda: decode(arguments.batches, limit),
        "prefill": prefill, "peers": lambda: peers(arguments.batches, deadline), "train": lambda: train(deadline),
    }  # fmt: skip
    for name, run in sections.items():
        if name not in arguments.only:
            continue
        if time.perf_counter() > deadline:
            print(f"{name}: left out, the time is up")
            continue
        print(name, flush=True)
        try:
            report[name] = run()
        except Exception as error:  # one section must not cost the others
            report[name] = f"{type(error).__name__}: {error}"
            print(f"  failed: {type(error).__name__} {str(error)[:1500]}", flush=True)
        free()
    if isinstance(report.get("decode"), list) and isinstance(report.get("peers"), dict):
        for name, rows in report["peers"].items():
            if rows and report["decode"]:
                ours, theirs = report["decode"][-1], max(rows, key=lambda row: row["tokens/s"])
                report[f"against {name}"] = {
                    "throughput": max(row["tokens/s"] for row in report["decode"]) / theirs["tokens/s"],
                    "cache": theirs["cache MB a row"] / ours["cache MB a row"],
                }  # fmt: skip
                print(f"against {name}: {_format(report[f'against {name}'])}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
