"""What is timed: decoding, prefill and training steps of random weights, and what each must cost at least."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hymba import cost, ops
from hymba.config import HymbaConfig
from hymba.cost import attention_operations, matmul_weights
from hymba.engine.decoder import make_decoder
from hymba.model.cache import HymbaCache, quantise
from hymba.model.hymba import Hymba
from hymba.model.mamba import Mamba, Mamba2
from hymba.model.quant import quantize_

# elements of the random block that fills large weights: real spread, but no minute of drawing numbers
BLOCK = 1 << 22


@dataclass(frozen=True)
class Workload:
    """Something to run, and the least that it must read and compute."""

    run: Callable[[], object]
    tokens: int
    bytes_read: float
    operations: float
    kind: str  # whose arithmetic peak counts: float32, bfloat16, int8


def tiled(shape: tuple[int, ...], block: Tensor) -> Tensor:
    """A new tensor of `shape`, filled with copies of the flat `block`."""
    data = torch.empty(shape, dtype=block.dtype)
    flat = data.view(-1)
    for first in range(0, flat.numel(), block.numel()):
        flat[first : first + block.numel()] = block[: flat.numel() - first]
    return data


def random_model(config: HymbaConfig, precision: str) -> Hymba:
    """A model of random weights, made quickly; the precisions int8 and int4 are quantised bfloat16."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    with torch.device("meta"):
        model = Hymba(config)
    model.to_empty(device="cpu")
    block = torch.empty(BLOCK, dtype=dtype).normal_(std=config.init_std)
    for name, parameter in model.named_parameters():
        parameter.data = tiled(parameter.shape, block.float() if name.endswith("A_log") else block)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith(".D"):
            parameter.data.fill_(1)
    for module in model.modules():
        if isinstance(module, Mamba | Mamba2):
            module.init_weights()
    if config.tie_embeddings:
        model.lm_head.weight = model.embedding.weight
    model.requires_grad_(False).eval()
    if precision in ("int8", "int4"):
        quantize_(model, precision)
    return model


def weight_bytes(model: Hymba) -> int:
    """Bytes of all weights that a token passes through: everything, the embedding only as the LM head."""
    tensors = {id(x): x for x in (*model.parameters(), *model.buffers())}
    if not model.config.tie_embeddings:
        for x in (*model.embedding.parameters(), *model.embedding.buffers()):
            tensors.pop(id(x))
    return sum(x.numel() * x.element_size() for x in tensors.values())


def cache_bytes_read(cache: HymbaCache, context: int) -> int:
    """Bytes that a decoding step must read of a cache: the visible keys and values of every group once, the states."""
    rows = cost.cache_bytes(cache.config, cache.batch_size, context + 1, cache.conv.element_size(), cache.kind)
    meta = [x for state in cache.meta if state.meta for x in (state.meta.k, state.meta.v)]
    return rows["kv"] + rows["conv"] + rows["ssm"] + sum(x.nbytes for x in meta)


def filled_cache(model: Hymba, batch: int, context: int, room: int, kind: str | None = None) -> HymbaCache:
    """A cache whose rows hold `context` random tokens, as if they had been read."""
    cache = model.new_cache(batch, min(context + room, model.config.max_length), kind)
    for stores, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        for layer, store in stores.items():
            x = torch.randn(store.shape[1:])
            if kind is not None:
                x, scale = quantise(x)
                scales[layer].copy_(scale)
            store.copy_(x)
    cache.lengths.fill_(context)
    return cache


def decoding(model: Hymba, precision: str, batch: int, context: int, steps: int, kind: str | None = None) -> Workload:
    """`steps` tokens for each of `batch` rows that hold `context` tokens."""
    context = min(context, model.config.max_length - steps)
    cache = filled_cache(model, batch, context, steps, kind)
    decode = make_decoder(model, batch, kind)
    ids = torch.arange(1, batch + 1)

    def run() -> None:
        cache.lengths.fill_(context)
        with torch.inference_mode():
            for _ in range(steps):
                decode(ids, cache)

    weights = matmul_weights(model.config) + model.config.vocab_size * model.config.d_model
    return Workload(
        run,
        tokens=batch * steps,
        bytes_read=steps * (weight_bytes(model) + cache_bytes_read(cache, context)),
        operations=steps * batch * (2.0 * weights + attention_operations(model.config, context, 1)),
        kind={"int4": "int8"}.get(precision, precision),
    )


def prefill(model: Hymba, precision: str, length: int, chunk: int, kind: str | None = None) -> Workload:
    """Read a prompt of `length` tokens in pieces of `chunk`, and compute the logits of its last token."""
    cache = model.new_cache(1, length, kind)
    ids = torch.randint(1, model.config.vocab_size, (1, length))

    @torch.inference_mode()
    def run() -> Tensor:
        cache.reset(0)
        for piece in ids.split(chunk, dim=1):
            hidden = model.hidden(piece, cache=cache)
        return model.lm_head(hidden[:, -1])

    operations = 2.0 * length * matmul_weights(model.config) + attention_operations(model.config, 0, length)
    return Workload(run, length, weight_bytes(model), operations, "float32" if precision == "float32" else "bfloat16")


def scans(model: Hymba, length: int, chunk: int) -> Workload | None:
    """The selective scans of a prefill alone; None in a model without Mamba-1 heads."""
    c, dtype = model.config, model.norm.weight.dtype
    mambas = [module for module in model.modules() if isinstance(module, Mamba)]
    if not mambas:
        return None
    T, E, N = min(chunk, length), c.d_inner, c.d_state
    u, dt, gate = (torch.randn(1, T, E).to(dtype) for _ in range(3))
    B, C = (torch.randn(1, T, N).to(dtype) for _ in range(2))
    mamba, state = mambas[0], torch.zeros(1, E, N)
    A = -torch.exp(mamba.A_log.float())

    @torch.inference_mode()
    def run() -> None:
        for _ in range(len(mambas) * -(-length // T)):
            ops.selective_scan(u, dt, mamba.dt_bias, A, B, C, mamba.D, gate, state)

    element = u.element_size()
    return Workload(run, length, len(mambas) * length * (4 * E + 2 * N) * element, 0, "float32")


def training(config: HymbaConfig, batch: int, length: int, dtype: torch.dtype) -> Workload:
    """Forward and backward of one batch, float32 weights, under autocast if the dtype is bfloat16."""
    model = random_model(config, "float32").requires_grad_(True).train()
    ids = torch.randint(1, config.vocab_size, (batch, length))

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = model(ids, labels=ids)
        loss.backward()

    tokens = batch * length
    operations = tokens * cost.training_operations(config, length)
    return Workload(run, tokens, 0, operations, str(dtype).removeprefix("torch."))
