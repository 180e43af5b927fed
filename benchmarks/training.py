"""Throughput of a training step next to a `transformers` Llama of the same parameter count, and where it stands.

    python benchmarks/training.py
    python benchmarks/training.py --shape 10M --precision float32 --batch 16 --length 512 --repeats 9
    python benchmarks/training.py --memory

With --memory instead the peak memory of forward and backward of our model alone, at 512, 1024, 2048 and 4096 tokens,
each in a process of its own.

Throughput needs `transformers`. Both models get random weights, the same tokens, float32 parameters (bfloat16: under
autocast) and the trainer's optimiser, AdamW, with clipping; Llama runs with scaled dot product attention, and as deep,
wide and with as many heads as ours; its MLP is as wide as it takes to have as many parameters. Steps alternate in one
process, so that both see the same machine; ratios are medians of neighbouring steps. The share of the peak is
operations (matrix products and visible attention pairs, forward and twice that backward) over time and over what a
large product of the same precision does just before the step. Ends with one JSON line.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from hymba import HymbaConfig, cost
from hymba.bench.suite import machine
from hymba.bench.workloads import random_model
from hymba.config import share_kv_in_pairs
from hymba.train.config import Optimizer
from hymba.train.optim import make_optimizers
from hymba.train.speed import peak_operations

SHAPES = {
    "10M": HymbaConfig(
        vocab_size=8192, d_model=256, n_layers=8, n_heads=4, n_kv_heads=2, d_ff=704, dt_rank=16, n_meta=32, window=256,
        global_layers=(0, 3, 7), kv_groups=share_kv_in_pairs(8, (0, 3, 7)), max_length=2048, rope="default",
    ),
    "100M": HymbaConfig(
        vocab_size=16384, d_model=640, n_layers=14, n_heads=10, n_kv_heads=5, d_ff=1728, dt_rank=40, n_meta=64,
        window=512, global_layers=(0, 6, 13), kv_groups=share_kv_in_pairs(14, (0, 6, 13)), max_length=2048,
        rope="default",
    ),
}  # fmt: skip


LENGTHS = (512, 1024, 2048, 4096)  # of --memory


def llama(c: HymbaConfig) -> torch.nn.Module:
    """A Llama of as many parameters, to the width of its MLP."""
    import transformers

    kv = c.n_kv_heads * c.d_key
    rest = c.vocab_size * c.d_model + c.n_layers * (2 * c.d_model * (c.d_model + kv) + 2 * c.d_model)
    d_ff = round((sum(cost.parameters(c).values()) - rest) / (c.n_layers * 3 * c.d_model))
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=d_ff, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, tie_word_embeddings=True,
        max_position_embeddings=c.max_length, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


class Contestant:
    """A model, its optimiser, and what its steps took."""

    def __init__(self, model: torch.nn.Module, loss: Callable[[Tensor], Tensor], operations: float):
        """operations: of a step, forward and backward"""
        self.model, self.loss, self.operations = model, loss, operations
        self.optimizer = make_optimizers(model, Optimizer())[0]
        self.passes: list[float] = []  # seconds of forward and backward
        self.steps: list[float] = []  # with clipping and the optimiser
        self.shares: list[float] = []  # of the matrix product's peak

    def step(self, ids: Tensor, precision: str) -> None:
        peak = peak_operations(ids.device, precision)
        self.model.zero_grad(set_to_none=True)
        began = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            value = self.loss(ids)
        value.backward()
        self.passes.append(time.perf_counter() - began)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.steps.append(time.perf_counter() - began)
        self.shares.append(self.operations / self.steps[-1] / peak)

    def forget(self) -> None:
        for times in (self.passes, self.steps, self.shares):
            times.clear()


def compare(shape: str, precision: str, batch: int, length: int, repeats: int) -> dict[str, object]:
    config, tokens = SHAPES[shape], batch * length
    torch.manual_seed(0)
    ours, theirs = random_model(config, "float32").requires_grad_(True).train(), llama(config)
    ids = torch.randint(1, config.vocab_size, (batch, length))
    parameters = {"hymba": sum(p.numel() for p in ours.parameters()), "llama": theirs.num_parameters()}
    # every weight multiplies every token, the tied embedding as LM head; a query sees (length + 1) / 2 keys
    llama_operations = 3 * tokens * (2 * parameters["llama"] + 2 * config.n_layers * config.d_model * (length + 1))
    hymba_operations = tokens * cost.training_operations(config, length)
    runs = {
        "hymba": Contestant(ours, lambda ids: ours(ids, labels=ids), hymba_operations),
        "llama": Contestant(theirs, lambda ids: theirs(input_ids=ids, labels=ids).loss, llama_operations),
    }
    for repeat in range(repeats + 1):
        for run in runs.values():
            run.step(ids, precision)
            if not repeat:
                run.forget()

    def ratio(kind: str) -> dict[str, float]:
        pairs = [h / t for h, t in zip(getattr(runs["hymba"], kind), getattr(runs["llama"], kind), strict=True)]
        return {"median": round(statistics.median(pairs), 3), "from": round(min(pairs), 3), "to": round(max(pairs), 3)}

    return {
        "shape": shape, "precision": precision, "batch": batch, "length": length, "parameters": parameters,
        **{
            name: {
                "forward_backward_ms": round(1e3 * statistics.median(run.passes), 1),
                "tokens_per_s": round(tokens / statistics.median(run.steps)),
                "share_of_peak": round(statistics.median(run.shares), 3),
            }
            for name, run in runs.items()
        },
        "forward_backward_ratio": ratio("passes"), "step_ratio": ratio("steps"),
    }  # fmt: skip


def line(r: dict) -> str:
    parts = [f"{r['shape']} {r['precision']}, {r['batch']} x {r['length']} tokens"]
    for name in ("hymba", "llama"):
        x = r[name]
        parts.append(
            f"{name} {x['forward_backward_ms']} ms, {x['tokens_per_s']} tokens/s, {x['share_of_peak']:.0%} of the peak"
        )
    for name in ("forward_backward_ratio", "step_ratio"):
        x = r[name]
        parts.append(f"{name.replace('_', ' ')} {x['median']} ({x['from']}-{x['to']})")
    return "; ".join(parts)


def memory(shape: str, precision: str, batch: int, length: int) -> dict[str, object]:
    """Peak memory of forward and backward, to be run in a process that has done nothing else."""
    model = random_model(replace(SHAPES[shape], max_length=max(LENGTHS)), "float32").requires_grad_(True).train()

    def peak(ids: Tensor) -> int:
        """-> most bytes that this process has held so far, this pass included"""
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            value = model(ids, labels=ids)
        value.backward()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    least = peak(torch.ones(1, 16, dtype=torch.int64))  # weights, gradients, and what libraries keep
    most = peak(torch.randint(1, SHAPES[shape].vocab_size, (batch, length)))
    grown = most - least
    return {
        "shape": shape, "precision": precision, "batch": batch, "length": length, "peak_mb": round(most / 1e6),
        "beyond_16_tokens_mb": round(grown / 1e6), "kb_per_token": round(grown / batch / length / 1e3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), action="append")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="peak memory by length instead of throughput")
    a = parser.parse_args()
    rows = []
    if a.memory:
        cases = [
            (shape, precision, a.batch, length)
            for shape in a.shape or SHAPES for precision in a.precision or ("bfloat16",) for length in LENGTHS
        ]  # fmt: skip
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for case in cases:
                rows.append(pool.apply(memory, case))
                print(*(f"{name} {value}" for name, value in rows[-1].items()), sep=", ", flush=True)
        print(json.dumps({"machine": machine(), "rows": rows}))
        return
    import transformers

    for shape in a.shape or SHAPES:
        for precision in a.precision or ("bfloat16", "float32"):
            rows.append(compare(shape, precision, a.batch, a.length, a.repeats))
            print(line(rows[-1]), flush=True)
    print(json.dumps({"machine": machine(), "transformers": transformers.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
