"""The architectures that Hymba is compared with, and the least that each must read and compute.

One set of words for both engines: `transformers` gets a config from it, llama.cpp a GGUF file.
"""

from collections.abc import Callable
from dataclasses import dataclass

from hymba.bench.workloads import Workload
from hymba.cost import LLAMA_3B

# bytes of a weight; int8 and int4 as llama.cpp's Q8_0 and Q4_0, with a scale of two bytes for 32 of them
WEIGHT_BYTES = {"bfloat16": 2, "int8": 34 / 32, "int4": 18 / 32}
# whose arithmetic peak counts; 4 bits are widened to 8
KINDS = {"bfloat16": "bfloat16", "int8": "int8", "int4": "int8"}


@dataclass(frozen=True)
class Shape:
    """A published decoder. Zero means that it has no such part."""

    name: str
    kind: str  # llama, falcon_h1 or mamba
    vocab_size: int
    d_model: int
    n_layers: int
    tie_embeddings: bool
    d_ff: int = 0
    n_heads: int = 0
    n_kv_heads: int = 0
    d_head: int = 0
    d_inner: int = 0  # width of the SSM
    d_state: int = 0
    ssm_heads: int = 0  # Mamba-2; Mamba-1 has a step of rank dt_rank for each channel instead
    dt_rank: int = 0

    @property
    def ssm_in(self) -> int:
        """Width of the SSM's first projection: x and gate, for Mamba-2 also B, C (one group) and the step."""
        return 2 * self.d_inner + (2 * self.d_state + self.ssm_heads if self.ssm_heads else 0)

    @property
    def block_weights(self) -> int:
        """Weights of all matrices in the blocks: what multiplies every token of a prompt."""
        D, E = self.d_model, self.d_inner
        attention = 2 * D * self.d_head * (self.n_heads + self.n_kv_heads)
        ssm = D * self.ssm_in + E * D
        if self.dt_rank:
            ssm += E * (self.dt_rank + 2 * self.d_state) + self.dt_rank * E
        return self.n_layers * (attention + ssm + 3 * D * self.d_ff)

    @property
    def weights(self) -> int:
        """Weights of all matrices that a decoded token passes through: blocks and LM head."""
        return self.block_weights + self.vocab_size * self.d_model

    @property
    def state_bytes(self) -> int:
        """Bytes of the SSM states of one sequence, float32 in every engine."""
        return 4 * self.n_layers * self.d_inner * self.d_state

    def kv_bytes(self, context: int) -> int:
        """Bytes of keys and values of one sequence, two each."""
        return 2 * 2 * self.n_layers * self.n_kv_heads * self.d_head * context

    def attention_operations(self, pairs: int) -> float:
        """Multiplications and additions for `pairs` of a token and one that it sees."""
        return 4.0 * self.n_layers * self.n_heads * self.d_head * pairs

    def decoding(self, run: Callable[[], object], precision: str, batch: int, context: int, steps: int) -> Workload:
        """`run` makes `steps` tokens for each of `batch` rows of `context` tokens."""
        return Workload(
            run,
            tokens=batch * steps,
            bytes_read=steps * (
                self.weights * WEIGHT_BYTES[precision] + batch * (self.kv_bytes(context) + self.state_bytes)
            ),
            operations=steps * batch * (2.0 * self.weights + self.attention_operations(context + 1)),
            kind=KINDS[precision],
        )  # fmt: skip

    def prefill(self, run: Callable[[], object], precision: str, length: int) -> Workload:
        """`run` reads a prompt of `length` tokens."""
        operations = 2.0 * length * self.block_weights + self.attention_operations(length * (length + 1) // 2)
        return Workload(run, length, self.weights * WEIGHT_BYTES[precision], operations, KINDS[precision])


# vocabulary and sizes of Meta's config files
LLAMA_VOCAB, LLAMA_FF, LLAMA_THETA = 128256, 8192, 500000.0
SHAPES = {
    "llama-1b": Shape(
        "Llama-3.2-1B", "llama", LLAMA_VOCAB, d_model=2048, n_layers=16, tie_embeddings=True, d_ff=LLAMA_FF,
        n_heads=32, n_kv_heads=8, d_head=64,
    ),
    "llama-3b": Shape(
        LLAMA_3B.name, "llama", LLAMA_VOCAB, d_model=3072, n_layers=LLAMA_3B.layers, tie_embeddings=True,
        d_ff=LLAMA_FF, n_heads=24, n_kv_heads=LLAMA_3B.kv_heads, d_head=LLAMA_3B.head_size,
    ),
    # depth, width, heads and states from the table in the Falcon-H1 documentation; the published 1,554,859,392
    # parameters then leave only this: feed-forward of 4608, gated norm in the SSM, untied vocabulary of 65536
    "falcon-h1": Shape(
        "Falcon-H1-1.5B", "falcon_h1", 65536, d_model=2048, n_layers=24, tie_embeddings=False, d_ff=4608,
        n_heads=8, n_kv_heads=2, d_head=128, d_inner=3072, d_state=256, ssm_heads=48,
    ),
    "mamba": Shape(
        "Mamba-1.4B", "mamba", 50280, d_model=2048, n_layers=48, tie_embeddings=True, d_inner=4096, d_state=16,
        dt_rank=128,
    ),
}  # fmt: skip
