"""The attention heads: grouped queries, a window or none, and keys and values that layers may share.

B batch, T time, H query heads, G key/value heads, dk size of a query or key head, dv size of a value head: 2 dk in
Hymba, dk in a layer of attention heads alone
"""

import math

from torch import Tensor, nn

from hymba import ops
from hymba.config import HymbaConfig, LayerPlan
from hymba.model.cache import CachedLayer, LayerState
from hymba.model.layout import Layout
from hymba.model.norm import RMSNorm
from hymba.visibility import KeyValue

QK_NORM_EPS = 1e-6  # fixed in the released implementation, whatever the config's norm_eps


class Attention(nn.Module):
    """Attention heads between the input projection and the norm of their branch (paper, section 2.1)."""

    def __init__(self, config: HymbaConfig, plan: LayerPlan):
        super().__init__()
        self.heads, self.kv_heads = config.n_heads, config.n_kv_heads
        self.window, self.n_meta = plan.window, config.n_meta
        self.scale = 1 / math.sqrt(config.d_key)
        # a layer that reads another's keys owns a k_norm too, unused: released checkpoints have it
        self.q_norm = _head_norm(config, self.heads)
        self.k_norm = _head_norm(config, self.kv_heads)

    def sources(
        self,
        kv: list[Tensor],
        layout: Layout,
        past: LayerState | CachedLayer,
        shared: tuple[KeyValue, ...] | None,
    ) -> tuple[KeyValue, ...]:
        """All keys and values that the new tokens may see.

        kv: k (B, T, G dk) and v (B, T, G dv), or nothing in a layer that reads another's, which are `shared`
        """
        if not kv:
            return shared
        k, v = (ops.heads(x, self.kv_heads) for x in kv)
        k = ops.rotate(self.k_norm(k), layout.cos, layout.sin)
        return past.extend(KeyValue(k, v, layout.positions, layout.documents), layout.lengths)

    def forward(self, q: Tensor, layout: Layout, sources: tuple[KeyValue, ...]) -> Tensor:
        """q: (B, T, H dk), sources: as from `sources` -> (B, T, H dv)"""
        q = self.q_norm(ops.heads(q, self.heads))
        q = ops.rotate(q, layout.cos, layout.sin)
        return ops.attention(q, layout.positions, layout.documents, sources, self.window, self.n_meta, self.scale)


def _head_norm(config: HymbaConfig, heads: int) -> nn.Module:
    """Norm of every query or key head before RoPE: none, one weight for all heads, or one weight for each."""
    if config.qk_norm == "none":
        return nn.Identity()
    shape = (1, heads, 1, config.d_key) if config.qk_norm == "perhead-rms" else (config.d_key,)
    return RMSNorm(*shape, eps=QK_NORM_EPS)
