"""Hymba itself: decoding, prefill and training steps of random weights."""

import time
from dataclasses import replace

import torch

from hymba import Hymba, HymbaConfig
from hymba.bench.gpu.measure import GPU, by_importance, captured, free, largest, shown, timed
from hymba.bench.workloads import cache_bytes_read
from hymba.cost import attention_operations, matmul_weights, training_operations
from hymba.engine.decoder import make_decoder
from hymba.model.cache import HymbaCache

CONTEXT, STEPS = 8192, 16
PROMPTS = ((1, 8192), (8, 2048))  # rows, tokens that are read at once
# rows of a training step, halved until they fit
TRAINED = {"1.5B": 8, "350M": 16, "125M": 32}


def random_model(config: HymbaConfig, dtype: torch.dtype = torch.bfloat16) -> Hymba:
    with GPU:
        model = Hymba(config)
    rates = [block.heads.mamba.A_log.detach().clone() for block in model.blocks]
    model = model.to(dtype).eval()
    for block, rate in zip(model.blocks, rates, strict=True):
        block.heads.mamba.A_log.data = rate
    return model


@torch.no_grad()
def decode(batches: list[int], limit: dict[str, float], deadline: float) -> list[dict]:
    """From filled caches of 8K tokens."""
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
            "of all bytes": moved / limit["copy"] / seconds, **_row_megabytes(cache),
        }  # fmt: skip

    for batch in by_importance(batches):
        if time.perf_counter() > deadline:
            print(f"  batch {batch}: left out, the time is up")
            continue
        row = largest(batch, measure)
        print(f"  Hymba-1.5B, decode at 8K: {shown(row)}", flush=True)
        table.append(row)
        free()
    return table


def _row_megabytes(cache: HymbaCache) -> dict[str, float]:
    """As allocated for each row: all of it, and keys and values alone."""
    size = {name: value / cache.batch_size / 1e6 for name, value in cache.bytes().items()}
    return {"cache MB a row": size["kv"] + size["conv"] + size["ssm"], "KV MB a row": size["kv"]}


@torch.no_grad()
def prefill(limit: dict[str, float], deadline: float) -> list[dict]:
    """Prompts of 8K tokens into an empty cache: one at once, several in pieces."""
    model, table = random_model(HymbaConfig.preset("1.5B")), []
    for batch, chunk in PROMPTS:
        if time.perf_counter() > deadline:
            print(f"  batch {batch}: left out, the time is up")
            continue
        ids = torch.randint(1, 32000, (batch, CONTEXT), device=GPU)
        cache = model.new_cache(batch, CONTEXT)

        def run(ids=ids, cache=cache, chunk=chunk) -> None:
            cache.lengths.zero_()
            for piece in ids.split(chunk, dim=1):
                hidden = model.hidden(piece, cache=cache)
            model.lm_head(hidden[:, -1])

        seconds = timed(run, least=3)
        work = batch * (2.0 * CONTEXT * matmul_weights(model.config) + attention_operations(model.config, 0, CONTEXT))
        row = {"batch": batch, "tokens/s": batch * CONTEXT / seconds, "share of peak": work / seconds / limit["peak"]}
        print(f"  Hymba-1.5B, prefill of {CONTEXT} in pieces of {chunk}: {shown(row)}", flush=True)
        table.append(row)
    return table


def train(limit: dict[str, float], deadline: float, length: int = 2048) -> dict[str, dict]:
    """Forward and backward of one batch in bfloat16, captured in a CUDA graph that writes gradients, as the trainer's
    does (`hymba.train.graph`): tokens a second and model FLOPs."""
    table = {}
    for name, batch in TRAINED.items():
        if time.perf_counter() > deadline:
            print(f"  {name}: left out, the time is up")
            continue
        config = replace(HymbaConfig.preset(name), max_length=8192)
        model = random_model(config).train()

        def measure(batch: int, model=model, config=config) -> dict:
            torch.cuda.reset_peak_memory_stats()
            ids = torch.randint(1, config.vocab_size, (batch, length), device=GPU)

            def step() -> None:
                model.zero_grad()  # to None: the pass writes them, and does not add to them
                model(ids, labels=ids).backward()

            seconds = timed(captured(step), least=3, seconds=1.0)
            work = batch * length * training_operations(config, length)
            return {
                "tokens/s": batch * length / seconds, "MFU": work / seconds / limit["peak"],
                "GB": torch.cuda.max_memory_allocated() / 1e9,
            }  # fmt: skip

        table[name] = largest(batch, measure)
        print(f"  train {name} at {length}: {shown(table[name])}", flush=True)
        del model, measure
        free()
    return table
