"""Before anything is timed: the fast path computes what the reference computes, on the same inputs."""

import torch

from hymba import ops
from hymba.bench.workloads import random_model
from hymba.config import HymbaConfig
from hymba.engine.decoder import make_decoder
from hymba.errors import UserError

# float32: rounding of sums in another order. bfloat16: 8 bits, through the few layers of the model that is checked
TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2}
# with keys and values of 8 bits: one that falls between two steps may go either way, 1 / 127 of the largest of a head;
# rounding them at all moves logits by 4e-3
INT8_TOLERANCE = 1e-3
PROMPT, STEPS = 200, 8


def fast_against_reference(config: HymbaConfig, kind: str | None = None) -> dict[str, float]:
    """Largest difference of logits relative to the largest logit, by dtype, for a prompt and the tokens after it by way
    of a cache, from the reference in one pass; int8 caches, which round, from the reference by way of such a cache.

    The model has the heads of `config` in a few layers. Raises `UserError` if the fast path is off by more than
    rounding explains.
    """
    small = HymbaConfig(
        n_layers=max(4, len(config.mixers)), global_layers=(0, 3), kv_groups=((1, 2),), rope="default"
    ).with_mixers(
        *config.mixers, vocab_size=1000, d_model=config.d_model, n_heads=config.n_heads, n_kv_heads=config.n_kv_heads,
        d_ff=min(config.d_ff, 512), d_state=config.d_state, dt_rank=config.dt_rank, n_meta=16, window=64,
        max_length=512, fusion=config.fusion, d_head=config.d_head, d_ssm_head=config.d_ssm_head,
    )  # fmt: skip
    errors = {}
    ids = torch.randint(1, small.vocab_size, (2, PROMPT + STEPS))
    for dtype, tolerance in TOLERANCE.items():
        tolerance = tolerance if kind is None else max(tolerance, INT8_TOLERANCE)
        torch.manual_seed(0)
        model = random_model(small, dtype)
        with torch.inference_mode():
            with ops.use_backend("reference"):
                by_way_of = None if kind is None else model.new_cache(2, ids.shape[1], kind)
                expected = model(ids, cache=by_way_of).float()
            cache = model.new_cache(2, ids.shape[1], kind)
            parts = [model(ids[:, :PROMPT], cache=cache).float()]
            decode = make_decoder(model, 2, kind)
            parts += [decode(ids[:, t], cache)[:, None] for t in range(PROMPT, ids.shape[1])]
        errors[dtype] = float((torch.cat(parts, dim=1) - expected).abs().max() / expected.abs().max())
        if not errors[dtype] <= tolerance:
            raise UserError(
                f"the fast path is wrong in {dtype}: relative error {errors[dtype]:.1e}; please report this"
            )
    return errors
