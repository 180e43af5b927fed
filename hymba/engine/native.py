"""Decoding on a CPU: one call into the native library per token, with all layers inside (`hymba/csrc/decode.cpp`).

It computes what `model(ids, cache=cache)` computes for one new token in every row, on the same cache, which it advances
in the same way; the two may take turns. Matrices are read where the model keeps them. Small parameters are copied, some
in a form that suits the kernel, so make a decoder after the weights are final.
"""

import ctypes
import math
import struct
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hymba.config import LayerPlan
from hymba.errors import UserError
from hymba.model.attention import QK_NORM_EPS
from hymba.model.cache import HymbaCache
from hymba.model.hymba import Block, Hymba
from hymba.model.quant import Matrix, matrix
from hymba.ops import library


def supports(model: Hymba) -> str | None:
    """Why this model cannot be decoded natively, in one sentence; None if it can."""
    loaded = library.load()
    if isinstance(loaded, str):
        return loaded
    if model.norm.weight.device.type != "cpu":
        return f"the native decoder runs on the CPU, the model is on {model.norm.weight.device}"
    if not model.config.is_hymba:
        return "the native decoder knows Hymba's own layers only: hybrid heads of full width, fused by mean, and an MLP"
    if model.norm.weight.dtype not in library.DTYPES:
        return f"the native decoder computes in float32 or bfloat16, the model is in {model.norm.weight.dtype}"
    return None


class NativeDecoder:
    """Decodes up to `max_batch` rows at a time. Raises `UserError` if the model or the machine does not allow it."""

    def __init__(self, model: Hymba, max_batch: int):
        reason = supports(model)
        if reason:
            raise UserError(reason)
        self.config, self.dtype, self.max_batch = model.config, model.norm.weight.dtype, max_batch
        self._kept: list[Tensor | ctypes.Array] = []  # what the structs point to
        self._model = self._describe_model(model)
        self._caches: WeakKeyDictionary[HymbaCache, tuple[ctypes.Array, ...]] = WeakKeyDictionary()
        self._workspace, self._threads = torch.empty(0), 0

    def step(self, ids: Tensor, cache: HymbaCache, *, logits: bool = True) -> Tensor | None:
        """Read one token in every row of the cache, and advance it.

        ids: (B,) -> logits of the next token (B, V) float32, or None if they are not wanted. Raises `UserError` for ids
        that do not fit the cache or the vocabulary, and for a full row.
        """
        B, c = cache.batch_size, self.config
        if ids.shape != (B,) or ids.is_floating_point():
            raise UserError(
                f"ids must be integers of shape ({B},), one for each row of the cache; got {tuple(ids.shape)}"
            )
        if self.max_batch < B:
            raise UserError(f"this decoder was made for {self.max_batch} rows, the cache has {B}; make a larger one")
        if cache.conv.dtype != self.dtype or cache.config != c:
            raise UserError("the cache was made by another model; make one with model.new_cache")
        ids = ids.to("cpu", torch.int64).contiguous()
        if not all(0 <= i < c.vocab_size for i in ids.tolist()):
            raise UserError(f"token ids must be from 0 to {c.vocab_size - 1}, got {ids.tolist()}")
        cache.require_room()
        threads = library.threads()
        if threads != self._threads:
            self._make_workspace(threads)
        described = self._caches.get(cache)
        if described is None:
            described = self._caches[cache] = _describe_cache(cache)
        out = torch.empty(B, c.vocab_size) if logits else None
        library.call(
            "decode_step", self._model, ctypes.addressof(described[0]), ids.data_ptr(), cache.lengths.data_ptr(), B,
            library.pointer(out), self._workspace.data_ptr(), threads,
        )  # fmt: skip
        cache.lengths += 1
        return out

    def _make_workspace(self, threads: int) -> None:
        size = ctypes.c_int64()
        library.call("decode_workspace", self._model, threads, ctypes.addressof(size))
        self._workspace, self._threads = torch.empty(size.value, dtype=torch.uint8), threads

    # -- the structs of csrc/decode.h, field by field

    def _describe_model(self, model: Hymba) -> int:
        c = model.config
        layers = [x for plan, block in zip(c.layers, model.blocks, strict=True) for x in self._layer(plan, block)]
        cos = sin = None
        if c.rope != "none":
            # dynamic_ntk rotates like plain RoPE as far as a cache may reach
            cos, sin = model.rope(torch.arange(c.n_meta + c.max_length)[None], torch.ones(1, dtype=torch.int64))
            cos, sin = cos[0, 0, :, : c.d_key // 2], sin[0, 0, :, : c.d_key // 2]
        fields = (
            library.DTYPES[self.dtype], c.vocab_size, c.d_model, c.d_inner, c.n_heads, c.n_kv_heads, c.d_key, c.d_value,
            c.d_ff, c.d_state, c.d_conv, c.dt_rank, c.n_meta, c.n_layers, float(c.norm_eps), float(QK_NORM_EPS),
            *self._matrix(model.embedding), *self._matrix(model.lm_head), self._floats(model.norm.weight),
            self._floats(cos), self._floats(sin), self._keep(_packed(layers)), self.max_batch,
        )  # fmt: skip
        return self._keep(_packed(fields))

    def _layer(self, plan: LayerPlan, block: Block) -> tuple[int, ...]:
        heads, mamba, mlp, floats = block.heads, block.heads.mamba, block.mlp, self._floats
        gate = self._matrix(mlp.gate_proj) if mlp.gated else Matrix(0, 0, 0, 0, 0)
        log2e = 1 / math.log(2)
        return (
            *self._matrix(heads.in_proj), *self._matrix(mamba.x_proj), *self._matrix(mamba.dt_weight),
            *self._matrix(heads.out_proj), *gate, *self._matrix(mlp.up_proj), *self._matrix(mlp.down_proj),
            floats(block.heads_norm.weight),
            self._head_norm(heads.attention.q_norm, self.config.n_heads),
            self._head_norm(heads.attention.k_norm, self.config.n_kv_heads),
            floats(mamba.conv_weight.T), floats(mamba.conv_bias),
            floats(mamba.dt_norm.weight), floats(mamba.B_norm.weight), floats(mamba.C_norm.weight),
            floats(mamba.dt_bias),
            floats(-log2e * torch.exp(mamba.A_log.float())), floats(mamba.D),
            floats(heads.attn_norm.weight), floats(heads.ssm_norm.weight), floats(block.mlp_norm.weight),
            plan.producer, -1 if plan.window is None else plan.window,
        )  # fmt: skip

    def _head_norm(self, norm: nn.Module, heads: int) -> int:
        """One weight for each head, whether the model has one for each or one for all."""
        if isinstance(norm, nn.Identity):
            return 0
        return self._floats(norm.weight.reshape(-1, self.config.d_key).expand(heads, -1))

    def _matrix(self, owner: nn.Module | nn.Parameter) -> Matrix:
        fields, tensors = matrix(owner)
        self._kept += tensors
        return fields

    def _floats(self, x: Tensor | None) -> int:
        """-> address of a float32 copy"""
        if x is None:
            return 0
        copy = torch.empty(x.shape)
        copy.copy_(x.detach())
        self._kept.append(copy)
        return copy.data_ptr()

    def _keep(self, buffer: ctypes.Array) -> int:
        self._kept.append(buffer)
        return ctypes.addressof(buffer)


def _describe_cache(cache: HymbaCache) -> tuple[ctypes.Array, ...]:
    """-> CacheArgs, and what it points to. A cache never replaces its tensors, so this is done once for each."""
    stores: list[int] = []
    for plan in cache.config.layers:
        if not plan.produces_kv:
            stores += [0] * 14
            continue
        k, v, meta = cache.k[plan.index], cache.v[plan.index], cache.meta[plan.index].meta
        stores += [k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0), k.shape[2]]
        k_scale, v_scale = cache.k_scale.get(plan.index), cache.v_scale.get(plan.index)
        scale_row = 0 if k_scale is None else k_scale.stride(0)
        stores += [library.pointer(k_scale), library.pointer(v_scale), scale_row]
        if meta is None:  # a model without meta tokens
            stores += [0] * 6
        else:
            stores += [meta.k.data_ptr(), meta.v.data_ptr(), *meta.k.stride()[1:3], *meta.v.stride()[1:3]]
    kept = _packed(stores)
    conv, ssm = cache.conv, cache.ssm
    fields = (
        ctypes.addressof(kept), conv.data_ptr(), *conv.stride()[:2], ssm.data_ptr(), *ssm.stride()[:2],
    )  # fmt: skip
    return _packed(fields), kept


def _packed(fields) -> ctypes.Array:
    layout = "".join("d" if isinstance(value, float) else "q" for value in fields)
    return ctypes.create_string_buffer(struct.pack(layout, *fields))
