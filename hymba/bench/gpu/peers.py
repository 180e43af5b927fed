"""Peers of `transformers` on the same card: random bfloat16 weights made there, filled caches.

Each gets the fastest setting that library has: Llama its static cache under `torch.compile` with CUDA graphs. A step
of Falcon-H1 and Mamba is captured in a CUDA graph as it is, which spares them the launches, and which `generate` does
not do. It takes the operators of mamba-ssm and causal-conv1d where they are installed, or else plain PyTorch
operations; so do their prompts.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version

import torch
from torch import Tensor, nn

from hymba.bench.gpu.measure import GPU, apart, by_importance, captured, free, largest, shown, timed
from hymba.bench.gpu.models import CONTEXT, STEPS
from hymba.bench.peers.shapes import SHAPES, Shape

# the last one's operators are tuned for minutes when they are first called
PEERS = ("llama-3b", "llama-1b", "mamba", "falcon-h1")
# tokens of Mamba's prompt where it falls back to a loop over time, whose cost a token does not depend on the length
LOOPED = 256
OPERATORS = ("mamba_ssm", "causal_conv1d")
STATES = ("conv_states", "recurrent_states")


def peers(batches: list[int], deadline: float) -> dict[str, dict]:
    """Decoding at a context of 8K for every batch that fits, and one prompt, for each peer."""
    try:
        import transformers
    except ImportError:
        print("  transformers is not installed: no peers")
        return {}
    print(f"  transformers {transformers.__version__}, Falcon-H1 and Mamba with " + " and ".join(
        f"{name} {version(name)}" if _installed(name) else f"plain operations instead of {name}" for name in OPERATORS
    ), flush=True)  # fmt: skip
    tables: dict[str, dict] = {}
    for i, key in enumerate(PEERS):
        # the time left is divided among those that are left
        left = deadline - time.perf_counter()
        share, shape = left / (len(PEERS) - i), SHAPES[key]
        table = tables[shape.name] = {"decode": [], "prefill": None}
        try:
            for what, row in apart(min(left, 2 * share), _peer, shape, batches, share):
                if what == "decode":
                    table["decode"].append(row)
                else:
                    table["prefill"] = row
        except Exception as error:  # one peer must not cost the others
            print(f"  {shape.name} ended: {error}", flush=True)
    return tables


def _installed(name: str) -> bool:
    try:
        import_module(name)
    except ImportError:
        return False
    return True


@torch.no_grad()
def _peer(shape: Shape, batches: list[int], seconds: float) -> Iterator[tuple[str, dict]]:
    """After `seconds` nothing new is begun."""
    import transformers

    deadline = time.perf_counter() + seconds
    transformers.logging.set_verbosity_error()
    model = _model(shape)
    fits, done = max(batches), set()
    for i, batch in enumerate(by_importance(batches)):
        if batch > fits or batch in done:
            continue  # a larger one was halved to this, or to less
        if i > 0 and time.perf_counter() > deadline:
            print(f"  {shape.name}, batch {batch}: left out, its time is up")
            continue
        row = largest(batch, lambda batch: _decode(shape, model, batch))
        fits = fits if row["batch"] == batch else row["batch"]
        print(f"  {shape.name}, decode at 8K: {shown(row)}", flush=True)
        done.add(row["batch"])
        yield "decode", row
        free()
        if i == 0 and (row := _prefill(shape, model)):  # what decides came first
            yield "prefill", row
        free()


def _model(shape: Shape) -> nn.Module:
    from transformers import AutoModelForCausalLM

    from hymba.bench.peers.hf import config_of

    attention = {} if shape.kind == "mamba" else {"attn_implementation": "sdpa"}
    with GPU:
        model = AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.bfloat16, **attention).eval()
    for module in model.modules():
        if type(module).__name__ == "FalconH1RMSNormGated":
            # 5.17 drops the time axis of a single token here, and then mixes the rows of a batch into one another
            module.register_forward_hook(lambda _, given, y: y.view(given[0].shape))
    return model


def _cache_name(model: nn.Module) -> str:
    import inspect

    from hymba.bench.peers.hf import CACHE_NAMES

    return next(name for name in CACHE_NAMES if name in inspect.signature(model.forward).parameters)


def _prefill(shape: Shape, model: nn.Module) -> dict | None:
    length = LOOPED if shape.kind == "mamba" and not _installed("mamba_ssm") else CONTEXT
    ids = torch.randint(1, 32000, (1, length), device=GPU)
    try:
        seconds = timed(lambda: model(ids, use_cache=True, logits_to_keep=1), least=1, seconds=0.0, warm=1)
    except Exception as error:
        print(f"  {shape.name}, prefill of {length}: {type(error).__name__} {str(error)[:200]}", flush=True)
        return None
    row = {"tokens": length, "batch": 1, "tokens/s": length / seconds}
    print(f"  {shape.name}, prefill: {shown(row)}", flush=True)
    return row


def _decode(shape: Shape, model: nn.Module, batch: int) -> dict:
    from transformers import StaticCache

    cache, name = StaticCache(config=model.config, max_cache_len=CONTEXT), _cache_name(model)
    before = CONTEXT - STEPS - 8
    ids = torch.ones(batch, 1, dtype=torch.int64, device=GPU)
    # a short prompt is read, so that types and states are the model's own choice; then the cache is filled. Scans of
    # plain operations take gigabytes for each row, so there one row is read and repeated.
    read = batch if shape.kind == "llama" else 1
    model(torch.ones(read, 4, dtype=torch.int64, device=GPU), use_cache=True, **{name: cache})
    for layer in cache.layers if read < batch else ():
        _repeat(layer, batch)
    stores = [x for layer in cache.layers for x in (getattr(layer, n, None) for n in ("keys", "values"))]
    stores = [x for x in stores if x is not None]
    for x in stores:
        x.normal_()
    held = stores + [x for layer in cache.layers for n in STATES for x in getattr(layer, n, {}).values()]
    positions = torch.full((batch, 1), before, device=GPU)
    places = {} if shape.kind == "mamba" else {"position_ids": positions}

    def step(forward: Callable = model) -> Tensor:
        return forward(ids, use_cache=True, **{name: cache}, **places).logits

    if shape.kind == "llama":
        forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        advance, setting = (lambda: step(forward)), "static cache, compiled, CUDA graphs"
    else:
        advance, setting = _without_launches(step)

    def rewind() -> None:
        positions.fill_(before)
        for layer in cache.layers:
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(before)

    rewind()
    steps = STEPS if timed(advance, least=1, seconds=0.0, warm=4) < 0.05 else 2

    def run() -> None:
        rewind()
        for _ in range(steps):
            advance()
            positions.add_(1)

    seconds = timed(run, least=3, seconds=0.0, warm=1) / steps
    return {
        "tokens/s": batch / seconds, "ms a step": seconds * 1e3,
        "cache MB a row": sum(x.nbytes for x in held) / batch / 1e6,
        "KV MB a row": sum(x.nbytes for x in stores) / batch / 1e6, "setting": f"{setting}, {steps} steps",
    }  # fmt: skip


def _repeat(layer: object, batch: int) -> None:
    """Make `batch` rows of a cache's one."""
    for name in ("keys", "values"):
        if isinstance(x := getattr(layer, name, None), Tensor):
            setattr(layer, name, x.repeat(batch, *[1] * (x.dim() - 1)))
    for name in STATES:
        states = getattr(layer, name, {})
        for i, x in states.items():
            states[i] = x.repeat(batch, *[1] * (x.dim() - 1))


def _without_launches(step: Callable[[], Tensor]) -> tuple[Callable[[], object], str]:
    with suppress(RuntimeError):  # it may wait for the card somewhere, which a graph cannot
        return captured(step), "static cache, a CUDA graph"
    torch.cuda.synchronize()
    return step, "static cache"
