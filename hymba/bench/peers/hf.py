"""Peers in Hugging Face transformers: random bfloat16 weights, PyTorch's fused attention, caches filled directly."""

import inspect

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import Cache

from hymba.bench.peers.shapes import LLAMA_THETA, Shape
from hymba.bench.workloads import BLOCK, Workload, tiled

VERSION = transformers.__version__
PROMPT = 16  # tokens that are really read before a cache is stretched
# what a forward pass calls its cache, by version and model
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
DYNAMIC, STATIC = "dynamic cache", "static cache"


def settings(shape: Shape) -> tuple[str, ...]:
    """The caches that a user may choose from; where there are no keys, they are the same."""
    return (DYNAMIC, STATIC) if shape.n_kv_heads else ("",)


def config_of(shape: Shape) -> PreTrainedConfig:
    sizes = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "num_hidden_layers": shape.n_layers,
        "tie_word_embeddings": shape.tie_embeddings,
    }
    if shape.kind == "mamba":
        # its scan is a loop over time; the parallel one, with mambapy, does not run in bfloat16
        return transformers.MambaConfig(
            **sizes, intermediate_size=shape.d_inner, state_size=shape.d_state, time_step_rank=shape.dt_rank
        )
    sizes |= {
        "intermediate_size": shape.d_ff,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.d_head,
        "max_position_embeddings": 131072,
    }
    if shape.kind == "llama":
        return transformers.LlamaConfig(**sizes, rope_theta=LLAMA_THETA)
    return transformers.FalconH1Config(
        **sizes, mamba_d_ssm=shape.d_inner, mamba_n_heads=shape.ssm_heads, mamba_d_state=shape.d_state,
        mamba_d_head=shape.d_inner // shape.ssm_heads, mamba_n_groups=1, mamba_rms_norm=True,
        mamba_norm_before_gate=False, mamba_chunk_size=128,
    )  # fmt: skip


class Peer:
    """A model of `transformers` in bfloat16, loaded as a checkpoint is.

    So every buffer and state has the dtype that its users get. Falcon-H1 shows why that matters: cast by hand, its
    `mup_vector`, which is no parameter, stays float32 and makes every activation after it float32, while the states
    of the SSM are float32 on purpose and must stay so.
    """

    def __init__(self, shape: Shape, precision: str):
        """precision: bfloat16"""
        self.shape, self.precision = shape, precision
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        config = config_of(shape)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        block = torch.empty(BLOCK, dtype=torch.bfloat16).normal_(std=0.02)
        weights = {name: tiled(x.shape, block) for name, x in empty.state_dict().items()}
        for name in weights:
            if "norm" in name:
                weights[name].fill_(1)
        if shape.tie_embeddings:
            weights.pop("lm_head.weight")
        attention = "eager" if shape.kind == "mamba" else "sdpa"
        self.model = (
            type(empty)
            .from_pretrained(
                None, config=config, state_dict=weights, dtype=torch.bfloat16, attn_implementation=attention
            )
            .eval()
        )
        known = inspect.signature(self.model.forward).parameters
        self._cache = next(name for name in CACHE_NAMES if name in known)
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def forward(self, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        """(B, T) -> (B, V), the logits of the last token."""
        return self.model(input_ids=ids, use_cache=True, **{self._cache: cache}, **self._last).logits[:, -1]

    @torch.inference_mode()
    def filled_cache(self, setting: str, batch: int, context: int, room: int) -> Cache:
        """A cache of `context` tokens, and `room` for more: a short prompt is read, so that dtypes and states are the
        model's own choice, then keys and values become random ones."""
        config = self.model.config
        static = setting == STATIC
        cache = StaticCache(config=config, max_cache_len=context + room) if static else DynamicCache(config=config)
        self.forward(torch.randint(1, self.shape.vocab_size, (batch, min(PROMPT, context))), cache)
        for layer in cache.layers:
            for store in ("keys", "values"):
                if (x := getattr(layer, store, None)) is not None:
                    block = torch.empty(BLOCK, dtype=x.dtype).normal_()
                    length = x.shape[2] if static else context
                    setattr(layer, store, tiled((*x.shape[:2], length, x.shape[3]), block))
        rewind(cache, context)
        return cache

    def decoding(self, batch: int, context: int, steps: int, setting: str) -> Workload:
        """`steps` tokens for each of `batch` rows that hold `context` tokens."""
        cache = self.filled_cache(setting, batch, context, steps)
        ids = torch.arange(1, batch + 1)[:, None]

        @torch.inference_mode()
        def run() -> None:
            rewind(cache, context)
            for _ in range(steps):
                self.forward(ids, cache)

        return self.shape.decoding(run, self.precision, batch, context, steps)

    def prefill(self, length: int) -> Workload:
        """A prompt of `length` tokens."""
        ids = torch.randint(1, self.shape.vocab_size, (1, length))

        @torch.inference_mode()
        def run() -> None:
            self.forward(ids, DynamicCache(config=self.model.config))

        return self.shape.prefill(run, self.precision, length)


def rewind(cache: Cache, context: int) -> None:
    """Forget what came after the first `context` tokens; states of SSMs go on, which costs the same."""
    for layer in cache.layers:
        if isinstance(cache, DynamicCache) and hasattr(layer, "keys"):
            layer.keys, layer.values = layer.keys[:, :, :context], layer.values[:, :, :context]
        elif hasattr(layer, "cumulative_length"):
            layer.cumulative_length.fill_(context)


def kv_bytes(shape: Shape, context: int) -> int:
    """Bytes of the keys and values that `transformers` allocates for one sequence."""
    cache = DynamicCache(config=config_of(shape))
    empty = torch.zeros(1, shape.n_kv_heads, context, shape.d_head, dtype=torch.bfloat16)
    for layer in range(shape.n_layers):
        cache.update(empty, empty, layer)
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
