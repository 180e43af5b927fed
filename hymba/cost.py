"""What a model costs: parameters by part and bytes of a cache, as formulas. Needs no weights."""

from dataclasses import dataclass

from hymba.config import HymbaConfig
from hymba.visibility import ring_slots

SSM_STATE_BYTES = 4  # the SSM state is float32 whatever the model's dtype


def parameters(config: HymbaConfig) -> dict[str, int]:
    """Parameters by part; they add up to the model's, a tied embedding counted once."""
    c = config
    D, E, F, N, rank = c.d_model, c.d_inner, c.d_ff, c.d_state, c.dt_rank
    kv = c.n_kv_heads * (c.d_key + c.d_value)
    producers = sum(plan.produces_kv for plan in c.layers)
    qk_norm = {"none": 0, "rms": 2 * c.d_key, "perhead-rms": (c.n_heads + c.n_kv_heads) * c.d_key}[c.qk_norm]
    embedding = c.vocab_size * D
    parts = {
        "embedding": embedding,
        "meta tokens": c.n_meta * D,
        "attention projections": c.n_layers * D * D + producers * D * kv + c.n_layers * qk_norm,
        "Mamba projections": c.n_layers * (2 * D * E + E * (rank + 2 * N) + rank * E),
        "Mamba conv, A, D, bias": c.n_layers * E * (c.d_conv + 1 + N + 1 + 1),
        "output projections": c.n_layers * E * D,
        "MLP": c.n_layers * D * F * (3 if c.mlp_activation == "silu" else 2),
        "norms": c.n_layers * (2 * D + 2 * E + rank + 2 * N) + D,
    }
    if not c.tie_embeddings:
        parts["LM head"] = embedding
    return parts


def cache_bytes(config: HymbaConfig, batch_size: int, max_length: int, element_size: int) -> dict[str, int]:
    """Bytes of a `HymbaCache` by part: rows, and the meta tokens' share, which exists once.

    element_size: bytes of the model's dtype, 2 for bfloat16
    """
    c = config
    kv_width = c.n_kv_heads * (c.d_key + c.d_value)
    producers = [plan for plan in c.layers if plan.produces_kv]
    slots = sum(ring_slots(None if plan.spans_context else c.window, max_length) for plan in producers)
    conv = c.n_layers * (c.d_conv - 1) * c.d_inner * element_size
    ssm = c.n_layers * c.d_inner * c.d_state * SSM_STATE_BYTES
    meta_kv = len(producers) * c.n_meta * kv_width * element_size
    return {
        "kv": batch_size * slots * kv_width * element_size,
        "conv": batch_size * conv,
        "ssm": batch_size * ssm,
        "meta": meta_kv + conv + ssm,
    }


@dataclass(frozen=True)
class Transformer:
    """A plain transformer to compare with: every layer keeps keys and values of the whole context."""

    name: str
    layers: int
    kv_heads: int
    head_size: int

    def kv_bytes(self, batch_size: int, length: int, element_size: int) -> int:
        return 2 * batch_size * length * self.layers * self.kv_heads * self.head_size * element_size


# the paper's comparison (table 2): 3.2 B parameters
LLAMA_3B = Transformer("Llama-3.2-3B", layers=28, kv_heads=8, head_size=128)
