"""Llama of `transformers` on the same card: random bfloat16 weights, a filled static cache, torch.compile with CUDA
graphs, which is the fastest setting that library has without packages that are compiled from source."""

import time

import torch

from hymba.bench.gpu.measure import GPU, free, largest, shown, timed
from hymba.bench.gpu.models import CONTEXT, STEPS


def configs() -> dict[str, object]:
    """Shapes from the released configs."""
    import transformers as tf

    llama = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 16384,
             "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "intermediate_size": 8192}  # fmt: skip
    return {
        "Llama-3.2-3B": tf.LlamaConfig(
            hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128, **llama
        ),
        "Llama-3.2-1B": tf.LlamaConfig(
            hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, head_dim=64, **llama
        ),
    }


@torch.no_grad()
def peers(batches: list[int], deadline: float) -> dict[str, list[dict]]:
    """Decoding at a context of 8K, for every batch that fits."""
    try:
        import transformers as tf
    except ImportError:
        print("  transformers is not installed: no peers")
        return {}
    tables: dict[str, list[dict]] = {}
    for name, config in configs().items():
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

            seconds = timed(run, least=3) / STEPS
            return {"tokens/s": batch / seconds, "ms a step": seconds * 1e3, "cache MB a row": stored / batch / 1e6}

        tables[name] = []
        for batch in sorted(batches, reverse=True):  # the largest decides, and time may run out
            if time.perf_counter() > deadline:
                print(f"  {name}, batch {batch}: left out, the time is up")
                continue
            if tables[name] and tables[name][-1]["batch"] <= batch:
                continue  # that is what a larger one was halved to
            row = largest(batch, measure)
            print(f"  {name}, decode at 8K: {shown(row)}", flush=True)
            tables[name].append(row)
            free()
        del model, measure
        free()
    return tables
