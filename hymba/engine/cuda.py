"""Decoding on a GPU: a step of all layers as one CUDA graph, so that no time is lost between kernels.

It computes what `model(ids, cache=cache)` computes for one new token in every row, on the same cache, which it advances
in the same way; the two may take turns. A graph is captured for each batch of cache rows, with the addresses of weights
and cache in it: make a decoder after the weights are final. The lengths, which a cache keeps on the CPU, have a copy on
the device, written anew when somebody else moved them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hymba.errors import UserError
from hymba.model.attention import QK_NORM_EPS
from hymba.model.cache import HymbaCache
from hymba.model.hymba import Block, Hymba
from hymba.model.plain import is_plain
from hymba.visibility import KeyValue


def supports(model: Hymba, kind: str | None = None) -> str | None:
    """Why this model's decoding on a cache of that kind cannot be captured, in one sentence; None if it can."""
    if kind is not None:
        return "keys and values of 8 bits are decoded step by step"
    weight = model.norm.weight
    if not weight.is_cuda:
        return f"CUDA graphs need a model on a GPU, this one is on {weight.device}"
    if not model.config.is_hymba:
        return "CUDA graphs know Hymba's own layers only: hybrid heads of full width, fused by mean, and an MLP"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "the GPU kernels need the package `triton`"
    if not all(is_plain(module) for module in model.modules() if isinstance(module, nn.Linear)):
        return "quantised or adapted weights, and such with hooks, are decoded step by step"
    return None


class GraphDecoder:
    """Decodes up to `max_batch` rows at a time. Raises `UserError` if the model or the machine does not allow it."""

    def __init__(self, model: Hymba, max_batch: int):
        reason = supports(model)
        if reason:
            raise UserError(reason)
        self.model, self.config, self.max_batch = model, model.config, max_batch
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        c, device = model.config, model.norm.weight.device
        # dynamic_ntk rotates like plain RoPE as far as a cache may reach
        positions = c.n_meta + torch.arange(c.max_length, device=device)[None]
        cos, sin = model.rope(positions, torch.ones(1, dtype=torch.int64, device=device))
        half = c.d_key // 2
        dtype = model.norm.weight.dtype
        # rounded as `rotate` rounds them
        self.cos, self.sin = (x[0, 0, :, :half].to(dtype).float().contiguous() for x in (cos, sin))
        self.rates = [-torch.exp(block.heads.mamba.A_log.detach().float()) for block in model.blocks]
        self.head_norms = [
            tuple(_head_norm(norm, heads, c.d_key) for norm, heads in
                  ((block.heads.attention.q_norm, c.n_heads), (block.heads.attention.k_norm, c.n_kv_heads)))
            for block in model.blocks
        ]  # fmt: skip

    def step(self, ids: Tensor, cache: HymbaCache) -> Tensor:
        """Read one token in every row of the cache, and advance it.

        ids: (B,) -> logits of the next token (B, V) float32. Raises `UserError` for ids that do not fit the cache, and
        for a full row.
        """
        B = cache.batch_size
        if ids.shape != (B,) or ids.is_floating_point():
            raise UserError(
                f"ids must be integers of shape ({B},), one for each row of the cache; got {tuple(ids.shape)}"
            )
        if self.max_batch < B:
            raise UserError(f"this decoder was made for {self.max_batch} rows, the cache has {B}; make a larger one")
        if cache.kind is not None:
            raise UserError(f"{supports(self.model, cache.kind)}; make_decoder of hymba.engine.decoder does that")
        cache.require_room()
        key = (B, cache.conv.data_ptr(), cache.ssm.data_ptr())
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = _Graph(self, cache)
        return graph.replay(ids, cache)


def _head_norm(norm: nn.Module, heads: int, size: int) -> Tensor | None:
    """One weight for each head, whether the model has one for each or one for all."""
    if isinstance(norm, nn.Identity):
        return None
    return norm.weight.detach().reshape(-1, size).expand(heads, -1).contiguous()


class _Graph:
    """A captured step for the rows of one cache."""

    def __init__(self, decoder: GraphDecoder, cache: HymbaCache):
        self._allocate(decoder, cache)
        device = self.ids.device
        self.side = torch.cuda.Stream(device)
        # the warm-up compiles kernels, and must not move the cache
        kept = [x.clone() for x in (cache.conv, cache.ssm, self.lengths)]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.inference_mode():
            self._step()
            self._restore(kept)
            self.graph = torch.cuda.CUDAGraph()
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        with torch.cuda.graph(self.graph, stream=stream), torch.inference_mode():
            self.logits = self._step()

    def _allocate(self, decoder: GraphDecoder, cache: HymbaCache) -> None:
        model, B = decoder.model, cache.batch_size
        self.decoder, self.cache = decoder, cache
        device = model.norm.weight.device
        self.ids = torch.zeros(B, dtype=torch.int64, device=device)
        self.lengths = cache.lengths.to(device, torch.int32, copy=True)
        self.expected = cache.lengths.clone()
        slots = {x.shape[2] for x in cache.k.values()}
        self.positions = {n: torch.empty(B, n, dtype=torch.int32, device=device) for n in slots}
        self.tokens = torch.empty_like(self.lengths)
        self.now = torch.empty(B, 1, dtype=torch.int32, device=device)
        self.meta = [
            state.meta and state.meta._replace(positions=state.meta.positions.to(device, torch.int32))
            for state in cache.meta
        ]

    def _restore(self, kept: list[Tensor]) -> None:
        for x, before in zip((self.cache.conv, self.cache.ssm, self.lengths), kept, strict=True):
            x.copy_(before)

    def replay(self, ids: Tensor, cache: HymbaCache) -> Tensor:
        self.ids.copy_(ids, non_blocking=True)
        if not torch.equal(self.expected, cache.lengths):
            self.lengths.copy_(cache.lengths)
            self.expected.copy_(cache.lengths)
        self.graph.replay()
        self.expected += 1
        cache.lengths += 1
        return self.logits.clone()

    def _step(self) -> Tensor:
        from hymba.ops.gpu import step

        model, c = self.decoder.model, self.decoder.config
        x = step.begin(
            self.ids, model.embedding.weight, self.lengths, self.tokens, self.now, list(self.positions.values()),
            c.n_meta,
        )  # fmt: skip
        sources: dict[int, tuple[KeyValue, ...]] = {}
        for plan, block in zip(c.layers, model.blocks, strict=True):
            if plan.produces_kv:
                k, v = self.cache.k[plan.index], self.cache.v[plan.index]
                stored = KeyValue(k, v, self.positions[k.shape[2]])
                meta = self.meta[plan.index]
                sources[plan.index] = (stored,) if meta is None else (meta, stored)
            x = self._layer(x, block, plan, sources[plan.producer])
        return self._linear(x, model.lm_head.weight, norm=model.norm.weight, eps=c.norm_eps, dtype=torch.float32)

    def _layer(self, x: Tensor, block: Block, plan, sources: tuple[KeyValue, ...]) -> Tensor:
        from hymba.ops.gpu import step

        c, i, B = self.decoder.config, plan.index, x.shape[0]
        heads, mamba, attention = block.heads, block.heads.mamba, block.heads.attention
        E = c.d_inner
        # attention looks at lengths and positions before it waits: `begin` has to be over by then
        proj = self._linear(x, heads.in_proj.weight, norm=block.heads_norm.weight, eps=c.norm_eps, early=i > 0)
        norms = *self.decoder.head_norms[i], QK_NORM_EPS
        angles = self.decoder.cos, self.decoder.sin
        conv = mamba.conv_weight, mamba.conv_bias, self.cache.conv[i]
        keys = self.now, sources, attention.window, c.n_meta, attention.scale
        recurrence = (
            mamba.dt_norm.weight, mamba.dt_weight, mamba.dt_bias, self.decoder.rates[i],
            mamba.B_norm.weight, mamba.C_norm.weight, mamba.D,
        )  # fmt: skip
        if B == 1:
            attn, ssm, squares = step.branches(
                proj, self.tokens, *angles, *norms, plan.produces_kv, c.n_heads, *keys, *conv, mamba.x_proj.weight,
                *recurrence, self.cache.ssm[i], c.norm_eps, heads.attn_norm.weight, heads.ssm_norm.weight,
            )  # fmt: skip
            return self._finish_one(x, block, attn, ssm, squares)
        q, u = x.new_empty(B, c.n_heads, 1, c.d_key), x.new_empty(B, E)
        step.prepare(
            proj, self.tokens, *angles, *norms, self.cache.k.get(i), self.cache.v.get(i), *conv, q, u,
            proj.shape[1] - 2 * E, c.n_kv_heads, c.d_value,
        )  # fmt: skip
        gate = proj[:, proj.shape[1] - E :]
        return self._finish_many(x, block, (q, *keys), u, (*recurrence, gate, self.cache.ssm[i], c.norm_eps))

    def _finish_one(self, x: Tensor, block: Block, attn: Tensor, ssm: Tensor, squares: Tensor) -> Tensor:
        """The rest of a layer for a batch of one: a chain of kernels that overlap."""
        from hymba.ops.gpu import step

        c, heads, mlp = self.decoder.config, block.heads, block.mlp
        y, hidden, out = torch.empty_like(x), x.new_empty(1, c.d_ff), torch.empty_like(x)
        step.gemv(
            attn[0], heads.out_proj.weight, y[0], mean_with=(ssm[0], squares, c.n_heads), eps=c.norm_eps, residual=x[0]
        )
        first, up = (mlp.gate_proj.weight, mlp.up_proj.weight) if mlp.gated else (mlp.up_proj.weight, None)
        step.gemv(y[0], first, hidden[0], norm=block.mlp_norm.weight, eps=c.norm_eps, up=up, squared_relu=up is None)
        step.gemv(hidden[0], mlp.down_proj.weight, out[0], residual=y[0])
        return out

    def _finish_many(self, x: Tensor, block: Block, keys: tuple, u: Tensor, recurrence: tuple) -> Tensor:
        from hymba.ops import gpu
        from hymba.ops.gpu import step
        from hymba.ops.gpu.decode import decode_attention

        c, heads, mamba = self.decoder.config, block.heads, block.heads.mamba
        # the branches side by side
        main = torch.cuda.current_stream()
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            attn = decode_attention(*keys)[:, 0]
        low, ssm = self._linear(u, mamba.x_proj.weight), torch.empty_like(u)
        dt = F.linear(gpu.rms_norm(low[:, : c.dt_rank], mamba.dt_norm.weight, c.norm_eps), mamba.dt_weight)
        step.scan_step(low, u, dt, *recurrence, ssm)
        main.wait_stream(self.side)
        mean = gpu.mean_of_norms([attn], [ssm], heads.attn_norm.weight, heads.ssm_norm.weight, c.norm_eps)
        x = x + F.linear(mean, heads.out_proj.weight)
        return x + block.mlp(gpu.rms_norm(x, block.mlp_norm.weight, c.norm_eps))

    def _linear(
        self, x: Tensor, weight: Tensor, norm: Tensor | None = None, eps: float = 0.0, dtype: torch.dtype | None = None,
        early: bool = True,
    ) -> Tensor:  # fmt: skip
        """x: (B, K) -> (B, rows); a batch of one by our own kernel, with the norm in it; early: as in `step.gemv`"""
        from hymba.ops import gpu
        from hymba.ops.gpu import step

        if x.shape[0] == 1:
            y = torch.empty(1, weight.shape[0], dtype=dtype or x.dtype, device=x.device)
            step.gemv(x[0], weight, y[0], norm=norm, eps=eps, early=early)
            return y
        y = F.linear(x if norm is None else gpu.rms_norm(x, norm, eps), weight)
        return y if dtype is None else y.to(dtype)
