"""Peers of similar size on the same machine in the same minutes: models of `transformers` with random weights.

Shapes of Llama-3.2-1B and 3B, Falcon-H1-1.5B (a hybrid) and Mamba-1.4B, from the published configs; bfloat16, eager,
as a user gets them. Caches are filled directly, not by a prefill.
"""

from collections.abc import Callable

import torch

from hymba.bench.workloads import BLOCK, Workload
from hymba.errors import UserError

PREFILL = 512
STEPS = 2


def workloads(
    names: tuple[str, ...], what: tuple[str, ...], batches: tuple[int, ...], contexts: tuple[int, ...]
) -> dict[str, Workload]:
    """Decoding and prefill of the named peers. Raises `UserError` if transformers is not installed."""
    try:
        import transformers
    except ImportError:
        raise UserError("hymba bench peers compares with transformers: pip install transformers") from None
    works = {}
    for name in names:
        model = _random(*PEERS[name](transformers))
        weights = sum(p.numel() for p in model.parameters()) - _embedding(model)
        if "decode" in what:
            for context in contexts:
                for batch in batches:
                    label = f"{name}, decode, batch {batch}, context {context}"
                    works[label] = _decoding(model, transformers, weights, batch, context)
        if "prefill" in what:
            works[f"{name}, prefill, {PREFILL} tokens"] = _prefill(model, weights)
    return works


def _llama(width: int, layers: int, heads: int, head_size: int) -> Callable:
    def make(transformers):
        config = transformers.LlamaConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, head_dim=head_size,
            num_key_value_heads=8, intermediate_size=8192, vocab_size=128256, max_position_embeddings=131072,
            rope_theta=500000.0, tie_word_embeddings=True,
        )  # fmt: skip
        return transformers.LlamaForCausalLM, config

    return make


def _falcon_h1(transformers):
    return transformers.FalconH1ForCausalLM, transformers.FalconH1Config(
        hidden_size=2048, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=2, head_dim=128,
        intermediate_size=4096, vocab_size=65537, mamba_d_ssm=3072, mamba_n_heads=48, mamba_d_head=64,
        mamba_n_groups=1, mamba_d_state=256, mamba_d_conv=4, mamba_chunk_size=128, mamba_rms_norm=False,
        tie_word_embeddings=False,
    )  # fmt: skip


def _mamba(transformers):
    return transformers.MambaForCausalLM, transformers.MambaConfig(
        hidden_size=2048, num_hidden_layers=48, state_size=16, vocab_size=50280, time_step_rank=128,
        intermediate_size=4096, use_mambapy=False,
    )  # fmt: skip


PEERS = {
    "Llama-3.2-1B": _llama(2048, 16, 32, 64),
    "Llama-3.2-3B": _llama(3072, 28, 24, 128),
    "Falcon-H1-1.5B": _falcon_h1,
    "Mamba-1.4B": _mamba,
}


def _random(kind: type, config) -> torch.nn.Module:
    """A bfloat16 model of random weights, made quickly."""
    with torch.device("meta"):
        model = kind(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    block = torch.empty(BLOCK, dtype=torch.bfloat16).normal_(std=0.02)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = parameter.view(-1)
            for first in range(0, flat.numel(), BLOCK):
                flat[first : first + BLOCK] = block[: flat.numel() - first]
            if "norm" in name:
                parameter.fill_(1)
            if name.endswith("A_log"):
                parameter.fill_(1)
        for buffer in model.buffers():
            buffer.fill_(1)
        for module in model.modules():  # buffers that are computed, not stored
            if type(module).__name__.endswith("RotaryEmbedding"):
                module.__init__(config)
    model.tie_weights()
    return model.requires_grad_(False).eval()


def _embedding(model: torch.nn.Module) -> int:
    """Weights that are looked up, not multiplied: an embedding that is not the LM head as well."""
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return 0 if tied else model.get_input_embeddings().weight.numel()


def _decoding(model, transformers, weights: int, batch: int, context: int) -> Workload:
    """`STEPS` tokens for each row, from a cache that holds `context` tokens."""
    c = model.config
    ids = torch.randint(3, 1000, (batch, 1))
    with torch.inference_mode():
        out = model(input_ids=ids.expand(batch, 2), use_cache=True)
    recurrent = getattr(out, "cache_params", None) is not None
    cache = out.cache_params if recurrent else out.past_key_values
    key = "cache_params" if recurrent else "past_key_values"
    kv = 0
    if not recurrent:
        for layer in cache.layers:
            if getattr(layer, "keys", None) is None or layer.keys.dim() != 4:
                continue
            shape = (batch, c.num_key_value_heads, context, layer.keys.shape[-1])
            layer.keys, layer.values = (torch.randn(shape).to(torch.bfloat16) for _ in range(2))
            kv += layer.keys.nbytes + layer.values.nbytes

    @torch.inference_mode()
    def run() -> None:
        for step in range(STEPS):
            position = torch.tensor([context + step])
            model(input_ids=ids, use_cache=True, **{key: cache}, **({"cache_position": position} if recurrent else {}))
        if not recurrent:
            for layer in cache.layers:  # back to where it was
                if getattr(layer, "keys", None) is not None and layer.keys.dim() == 4:
                    layer.keys, layer.values = layer.keys[:, :, :context], layer.values[:, :, :context]

    operations = STEPS * batch * 2.0 * weights
    return Workload(run, batch * STEPS, STEPS * (2.0 * weights + kv), operations, "bfloat16")


def _prefill(model, weights: int) -> Workload:
    ids = torch.randint(3, 1000, (1, PREFILL))

    @torch.inference_mode()
    def run() -> None:
        hidden = model.get_decoder()(input_ids=ids, use_cache=True).last_hidden_state
        model.get_output_embeddings()(hidden[:, -1:])

    head = model.get_output_embeddings().weight.numel()
    return Workload(run, PREFILL, 2.0 * weights, 2.0 * PREFILL * (weights - head), "bfloat16")
