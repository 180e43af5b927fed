"""A GGUF file of random weights with the shape of a published model, as llama.cpp's converter would lay it out."""

import math
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from hymba.bench.peers.shapes import LLAMA_THETA, Shape

TYPES = {"bfloat16": Type.BF16, "int8": Type.Q8_0, "int4": Type.Q4_0}
BLOCK = 1 << 20  # random weights that fill every matrix, again and again
CONV = 4
ARCHITECTURES = {"llama": "llama", "falcon_h1": "falcon-h1"}


def write(shape: Shape, precision: str, path: Path) -> None:
    """Write the file. Matrices have the type of `precision`, the rest is float32; there is no tokenizer."""
    writer = gguf.GGUFWriter(path, ARCHITECTURES[shape.kind])
    writer.add_context_length(131072)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_embedding_length(shape.d_model)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(shape.d_ff)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_key_length(shape.d_head)
    writer.add_value_length(shape.d_head)
    writer.add_rope_dimension_count(shape.d_head)
    writer.add_rope_freq_base(LLAMA_THETA)
    writer.add_layer_norm_rms_eps(1e-5)
    if shape.d_inner:
        writer.add_ssm_conv_kernel(CONV)
        writer.add_ssm_inner_size(shape.d_inner)
        writer.add_ssm_state_size(shape.d_state)
        writer.add_ssm_time_step_rank(shape.ssm_heads)
        writer.add_ssm_group_count(1)

    kind = TYPES[precision]
    random = np.random.default_rng(0).standard_normal(BLOCK, dtype=np.float32) * np.float32(0.02)
    block = gguf.quants.quantize(random, kind).view(np.uint8)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    for name, dims, value in _tensors(shape):
        if value is None:
            stored = (dims[0], dims[1] // elements * size)
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), stored[0] * stored[1], raw_dtype=kind)
        else:
            writer.add_tensor_info(name, dims, np.dtype(np.float32), 4 * math.prod(dims))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, dims, value in _tensors(shape):  # one at a time, so that memory never holds the model
        if value is None:
            writer.write_tensor_data(np.resize(block, (dims[0], dims[1] // elements * size)))
        else:
            writer.write_tensor_data(np.full(dims, value, np.float32))
    writer.close()


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], float | None]]:
    """Name, dimensions (rows first) and value of every tensor; a matrix has no value."""
    D, V = shape.d_model, shape.vocab_size
    queries, keys = shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head
    yield "token_embd.weight", (V, D), None
    yield "output_norm.weight", (D,), 1.0
    if not shape.tie_embeddings:
        yield "output.weight", (V, D), None
    for layer in range(shape.n_layers):
        parts = [
            ("attn_norm.weight", (D,), 1.0),
            ("attn_q.weight", (queries, D), None),
            ("attn_k.weight", (keys, D), None),
            ("attn_v.weight", (keys, D), None),
            ("attn_output.weight", (D, queries), None),
            ("ffn_norm" if shape.kind == "falcon_h1" else "ffn_norm.weight", (D,), 1.0),
            ("ffn_gate.weight", (shape.d_ff, D), None),
            ("ffn_up.weight", (shape.d_ff, D), None),
            ("ffn_down.weight", (D, shape.d_ff), None),
        ]
        if shape.d_inner:
            E, conv = shape.d_inner, shape.d_inner + 2 * shape.d_state
            parts += [
                ("ssm_in.weight", (shape.ssm_in, D), None),
                ("ssm_conv1d.weight", (conv, CONV), 0.25),
                ("ssm_conv1d.bias", (conv,), 0.0),
                ("ssm_dt.bias", (shape.ssm_heads,), 0.0),
                ("ssm_a", (shape.ssm_heads, 1), -1.0),
                ("ssm_d", (shape.ssm_heads, 1), 1.0),
                ("ssm_norm.weight", (1, E), 1.0),
                ("ssm_out.weight", (D, E), None),
            ]
        for name, dims, value in parts:
            yield f"blk.{layer}.{name}", dims, value
