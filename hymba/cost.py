"""What a model costs: parameters by part and bytes of a cache, as formulas. Needs no weights."""

from dataclasses import dataclass
from functools import lru_cache

from hymba.config import HymbaConfig
from hymba.visibility import ring_slots

SSM_STATE_BYTES = 4  # the SSM state is float32 whatever the model's dtype
SCALE_BYTES = 4  # of a key or value in 8 bits


def parameters(config: HymbaConfig) -> dict[str, int]:
    """Parameters by part; they add up to the model's, a tied embedding counted once."""
    c = config
    D, E, N, S, rank = c.d_model, c.d_inner, c.d_state, c.n_ssm_heads, c.dt_rank
    qk_norm = {"none": 0, "rms": 2 * c.d_key, "perhead-rms": (c.n_heads + c.n_kv_heads) * c.d_key}[c.qk_norm]
    conv = c.d_conv_inputs * (c.d_conv + 1)
    embedding = c.vocab_size * D
    parts = {
        "embedding": embedding,
        "meta tokens": c.n_meta * D,
        "attention projections": 0,
        "Mamba projections": 0,
        "Mamba conv, A, D, bias": 0,
        "output projections": 0,
        "MLP": c.n_layers * D * c.d_ff * (3 if c.mlp_activation == "silu" else 2),
        "norms": D,
    }
    for plan in c.layers:
        output = 0  # width of what the output projection reads
        norms = 2 * D if c.d_ff else D
        if plan.attends:
            output = c.n_heads * plan.d_value
            kv = c.n_kv_heads * (c.d_key + plan.d_value) if plan.produces_kv else 0
            parts["attention projections"] += D * (c.n_heads * c.d_key + kv) + qk_norm
        if plan.mixer == "hybrid":
            norms += E + (output if c.fusion == "concat" else E)
            output = output if c.fusion == "concat" else 0  # a mean is as wide as the Mamba heads
        if plan.mixer == "mamba2":
            parts["Mamba projections"] += D * (E + c.d_conv_inputs + S)
            parts["Mamba conv, A, D, bias"] += conv + 3 * S
            norms += E
        elif plan.recurs:
            parts["Mamba projections"] += 2 * D * E + E * (rank + 2 * N) + rank * E
            parts["Mamba conv, A, D, bias"] += conv + E * (N + 1 + 1)
            norms += rank + 2 * N
        parts["output projections"] += (output + E * plan.recurs) * D
        parts["norms"] += norms
    if not c.tie_embeddings:
        parts["LM head"] = embedding
    return parts


def matmul_weights(config: HymbaConfig) -> int:
    """Weights that multiply every token of a prefill: all matrices of the blocks."""
    parts = parameters(config)
    return sum(parts[name] for name in ("attention projections", "Mamba projections", "output projections", "MLP"))


def attention_operations(config: HymbaConfig, first: int, count: int) -> float:
    """Multiplications and additions of attention for tokens first .. first + count - 1 of a row."""
    c, total = config, 0
    for plan in c.layers:
        if plan.attends:
            for t in range(first, first + count):
                seen = t + 1 if plan.window is None else min(t, plan.window) + 1
                total += (seen + c.n_meta) * (c.d_key + plan.d_value)
    return 2.0 * total * c.n_heads


@lru_cache
def training_operations(config: HymbaConfig, length: int) -> float:
    """Multiplications and additions of a training step, a token: forward, and twice that backward (recomputation in
    checkpointed blocks is not counted). The scan and the convolution, a few percent, are left out.

    length: tokens in a row, all taken as one document
    """
    weights = matmul_weights(config) + config.vocab_size * config.d_model
    return 3 * (2.0 * weights + attention_operations(config, 0, length) / length)


def cache_bytes(
    config: HymbaConfig, batch_size: int, max_length: int, element_size: int, kind: str | None = None
) -> dict[str, int]:
    """Bytes of a `HymbaCache` by part: rows, and the meta tokens' share, which exists once.

    element_size: bytes of the model's dtype, 2 for bfloat16; kind: "int8" for keys and values of 8 bits
    """
    c = config
    kv = meta_kv = 0
    for plan in c.layers:
        if plan.produces_kv:
            numbers = c.n_kv_heads * (c.d_key + plan.d_value)
            token = numbers * element_size if kind is None else numbers + 2 * c.n_kv_heads * SCALE_BYTES
            kv += ring_slots(None if plan.spans_context else c.window, max_length) * token
            meta_kv += c.n_meta * numbers * element_size
    recurrent = sum(plan.recurs for plan in c.layers)
    conv = recurrent * (c.d_conv - 1) * c.d_conv_inputs * element_size
    ssm = recurrent * c.d_inner * c.d_state * SSM_STATE_BYTES
    return {
        "kv": batch_size * kv,
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
