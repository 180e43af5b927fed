"""Time of a training step, forward and backward, next to a `transformers` Llama of the same parameter count.

    python benchmarks/training.py
    python benchmarks/training.py --shape 10M --precision float32 --batch 16 --length 512 --repeats 9

Needs `transformers`. Both models get random weights, the same tokens, and float32 parameters (bfloat16: under
autocast); Llama runs with scaled dot product attention, and as deep, wide and with as many heads as ours; its MLP is as
wide as it takes to have as many parameters. Steps alternate in one process, so that both see the same machine; ratios
are medians of neighbouring steps. Ends with one JSON line.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor

from hymba import HymbaConfig, cost
from hymba.bench.suite import machine
from hymba.bench.workloads import random_model
from hymba.config import share_kv_in_pairs

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


def llama(c: HymbaConfig) -> torch.nn.Module:
    """A Llama of as many parameters, to the width of its MLP."""
    kv = c.n_kv_heads * c.d_key
    rest = c.vocab_size * c.d_model + c.n_layers * (2 * c.d_model * (c.d_model + kv) + 2 * c.d_model)
    d_ff = round((sum(cost.parameters(c).values()) - rest) / (c.n_layers * 3 * c.d_model))
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=d_ff, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, tie_word_embeddings=True,
        max_position_embeddings=c.max_length, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def step(model: torch.nn.Module, loss: Callable[[Tensor], Tensor], ids: Tensor, precision: str) -> float:
    """-> seconds of one forward and backward pass"""
    model.zero_grad(set_to_none=True)
    began = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        value = loss(ids)
    value.backward()
    return time.perf_counter() - began


def compare(shape: str, precision: str, batch: int, length: int, repeats: int) -> dict[str, object]:
    config = SHAPES[shape]
    torch.manual_seed(0)
    ours, theirs = random_model(config, "float32").requires_grad_(True).train(), llama(config)
    ids = torch.randint(1, config.vocab_size, (batch, length))
    runs = {
        "hymba": (ours, lambda ids: ours(ids, labels=ids)),
        "llama": (theirs, lambda ids: theirs(input_ids=ids, labels=ids).loss),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, (model, loss) in runs.items():
            seconds = step(model, loss, ids, precision)
            if repeat:
                times[name].append(seconds)
    ratios = [h / t for h, t in zip(times["hymba"], times["llama"], strict=True)]
    return {
        "shape": shape, "precision": precision, "batch": batch, "length": length,
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, (model, _) in runs.items()},
        **{f"{name}_ms": round(1e3 * statistics.median(t), 1) for name, t in times.items()},
        "ratio": round(statistics.median(ratios), 3), "ratio_from_to": [round(min(ratios), 3), round(max(ratios), 3)],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), action="append")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    a = parser.parse_args()
    rows = []
    for shape in a.shape or SHAPES:
        for precision in a.precision or ("bfloat16", "float32"):
            rows.append(compare(shape, precision, a.batch, a.length, a.repeats))
            r = rows[-1]
            print(
                f"{shape} {precision}, {a.batch} x {a.length} tokens: "
                f"hymba {r['hymba_ms']} ms, llama {r['llama_ms']} ms, "
                f"ratio {r['ratio']} ({r['ratio_from_to'][0]}-{r['ratio_from_to'][1]})",
                flush=True,
            )
    print(json.dumps({"machine": machine(), "transformers": transformers.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
