"""What Hymba is compared with (paper, tables 1 and 3): attention heads alone, Mamba heads alone, Mamba-2.

They stand in the place of `HybridHeads`, with the same parts and the same arguments and results. What belongs to the
fusion of two branches, the norm of each, they do not have.

    B batch, T time, D model width, E inner width, H query heads, G key/value heads, dk head size, N SSM state
    C = E + 2 N channels of Mamba-2's convolution, S heads of Mamba-2
"""

from torch import Tensor, nn

from hymba import ops
from hymba.config import HymbaConfig, LayerPlan
from hymba.model.attention import Attention
from hymba.model.cache import CachedLayer, LayerState
from hymba.model.layout import Layout
from hymba.model.mamba import Mamba, Mamba2
from hymba.visibility import KeyValue


class AttentionHeads(nn.Module):
    """Attention heads alone, as in Llama (Touvron et al., arXiv 2302.13971): value heads are as large as key heads."""

    def __init__(self, config: HymbaConfig, plan: LayerPlan):
        super().__init__()
        query, kv = config.n_heads * config.d_key, config.n_kv_heads * config.d_key
        self.widths = (query, kv, kv) if plan.produces_kv else (query,)
        self.in_proj = nn.Linear(config.d_model, sum(self.widths), bias=False)
        self.attention = Attention(config, plan)
        self.out_proj = nn.Linear(query, config.d_model, bias=False)

    def forward(
        self, x: Tensor, layout: Layout, past: LayerState | CachedLayer, shared: tuple[KeyValue, ...] | None
    ) -> tuple[Tensor, tuple[KeyValue, ...], None, None]:
        q, *kv = self.in_proj(x).split(self.widths, dim=-1)
        sources = self.attention.sources(kv, layout, past, shared)
        return self.out_proj(self.attention(q, layout, sources)), sources, None, None


class MambaHeads(nn.Module):
    """Mamba heads alone: the block of Gu and Dao (arXiv 2312.00752) with the SSM of Hymba, whose dt, B and C are normed
    (so are those of Jamba, arXiv 2403.19887, whose Mamba layer this is)."""

    def __init__(self, config: HymbaConfig, plan: LayerPlan):
        super().__init__()
        self.widths = (config.d_inner, config.d_inner)
        self.in_proj = nn.Linear(config.d_model, sum(self.widths), bias=False)
        self.mamba = Mamba(config)
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)

    def forward(
        self, x: Tensor, layout: Layout, past: LayerState | CachedLayer, shared: None
    ) -> tuple[Tensor, None, Tensor, Tensor]:
        u, gate = ops.split(self.in_proj(x), self.widths)  # (B, T, E) each
        y, conv_state, ssm_state = self.mamba(u, gate, layout, past.conv, past.ssm)
        return self.out_proj(y), None, conv_state, ssm_state


class Mamba2Heads(nn.Module):
    """The Mamba-2 block (Dao and Gu, arXiv 2405.21060, section 7), with one group of heads: all share B and C."""

    def __init__(self, config: HymbaConfig, plan: LayerPlan):
        super().__init__()
        self.widths = (config.d_inner, config.d_conv_inputs, config.n_ssm_heads)
        self.in_proj = nn.Linear(config.d_model, sum(self.widths), bias=False)
        self.mamba = Mamba2(config)
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)

    def forward(
        self, x: Tensor, layout: Layout, past: LayerState | CachedLayer, shared: None
    ) -> tuple[Tensor, None, Tensor, Tensor]:
        gate, u, dt = self.in_proj(x).split(self.widths, dim=-1)  # (B, T, E), (B, T, C), (B, T, S)
        y, conv_state, ssm_state = self.mamba(u, dt, gate, layout, past.conv, past.ssm)
        return self.out_proj(y), None, conv_state, ssm_state
