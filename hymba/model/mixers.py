"""What all heads of a layer have in common, and what Hymba is compared with (paper, tables 1 and 3): attention heads
alone, Mamba heads alone, Mamba-2.

Those stand in the place of `HybridHeads`. What belongs to the fusion of two branches, the norm of each, they do not
have.

    R tokens of all parts of a call, B batch, T time, D model width, E inner width, H query heads, G key/value heads
    dk head size, N SSM state
    C = E + 2 N channels of Mamba-2's convolution, S heads of Mamba-2
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from hymba import ops
from hymba.config import HymbaConfig, LayerPlan
from hymba.model import beside
from hymba.model.attention import Attention
from hymba.model.cache import CachedLayer, LayerState
from hymba.model.layout import Layout
from hymba.model.mamba import Mamba, Mamba2
from hymba.visibility import KeyValue


class Heads(nn.Module, ABC):
    """Heads between two projections: `attention`, `mamba`, or both.

    What a layer does to each token by itself it does to all of them at once, those of meta tokens and text. Heads read
    one part after another, and each begins where the one before it ended.
    """

    widths: tuple[int, ...]  # of what `inputs` takes, side by side in the input projection's output
    in_proj: nn.Module
    out_proj: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.attention: Attention | None = None
        self.mamba: Mamba | Mamba2 | None = None

    def forward(
        self,
        x: Tensor,
        layouts: Sequence[Layout],
        past: LayerState | CachedLayer,
        shared: Sequence[tuple[KeyValue, ...]] | None,
    ) -> tuple[Tensor, list[tuple[KeyValue, ...]], Tensor | None, Tensor | None]:
        """x: (R, D), rows of the parts that `layouts` describes, one part behind the other; past: of the first part;
        shared: the producer's keys and values for each part, in a layer that makes none

        -> (R, D), the keys and values that each part read, conv state and SSM state after the last part; empty or None
        for what heads of one kind do not have
        """
        parts = [
            self.inputs(*slices)
            for slices in ops.split(self.in_proj(x), self.widths, [layout.shape for layout in layouts])
        ]
        read, before = [], past
        if self.attention is not None:
            for i, (layout, (_, kv, _)) in enumerate(zip(layouts, parts, strict=True)):
                read.append(self.attention.sources(kv, layout, before, shared[i] if shared else None))
                before = LayerState(None, None, read[-1][-1])
        attn, ssm, conv_state, ssm_state = [], [], past.conv, past.ssm
        # meta tokens leave most of a card free
        keys = [source.k for sources in read[:-1] for source in sources]
        stream = beside.fork(x, *keys) if len(parts) > 1 else None
        for i, (layout, (q, _, inputs)) in enumerate(zip(layouts, parts, strict=True)):
            last = i == len(parts) - 1
            with beside.on(None if last else stream):
                if self.attention is not None:
                    attn.append(self.attention(q, layout, read[i]))
                if last:
                    beside.join(stream, *attn[:-1], *ssm, conv_state, ssm_state)
                if self.mamba is not None:
                    y, conv_state, ssm_state = self.mamba(*inputs, layout, conv_state, ssm_state)
                    ssm.append(y)
        return self.out_proj(self.fuse(attn, ssm)), read, conv_state, ssm_state

    @abstractmethod
    def inputs(self, *slices: Tensor) -> tuple[Tensor | None, Sequence[Tensor], Sequence[Tensor]]:
        """slices: (B, T, width) each -> queries, keys and values if the layer makes them, what `mamba` takes"""

    def fuse(self, attn: Sequence[Tensor], ssm: Sequence[Tensor]) -> Tensor:
        """attn: (B, T, A), ssm: (B, T, E) of each part -> (R, width of the output projection)"""
        return ops.rows_of(attn or ssm)


class AttentionHeads(Heads):
    """Attention heads alone, as in Llama (Touvron et al., arXiv 2302.13971): value heads are as large as key heads."""

    def __init__(self, config: HymbaConfig, plan: LayerPlan):
        super().__init__()
        query, kv = config.n_heads * config.d_key, config.n_kv_heads * config.d_key
        self.widths = (query, kv, kv) if plan.produces_kv else (query,)
        self.in_proj = nn.Linear(config.d_model, sum(self.widths), bias=False)
        self.attention = Attention(config, plan)
        self.out_proj = nn.Linear(query, config.d_model, bias=False)

    def inputs(self, q, *kv):
        return q, kv, ()


class MambaHeads(Heads):
    """Mamba heads alone: the block of Gu and Dao (arXiv 2312.00752) with the SSM of Hymba, whose dt, B and C are normed
    (so are those of Jamba, arXiv 2403.19887, whose Mamba layer this is)."""

    def __init__(self, config: HymbaConfig, plan: LayerPlan):
        super().__init__()
        self.widths = (config.d_inner, config.d_inner)
        self.in_proj = nn.Linear(config.d_model, sum(self.widths), bias=False)
        self.mamba = Mamba(config)
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)

    def inputs(self, u, gate):
        return None, (), (u, gate)


class Mamba2Heads(Heads):
    """The Mamba-2 block (Dao and Gu, arXiv 2405.21060, section 7), with one group of heads: all share B and C."""

    def __init__(self, config: HymbaConfig, plan: LayerPlan):
        super().__init__()
        self.widths = (config.d_inner, config.d_conv_inputs, config.n_ssm_heads)
        self.in_proj = nn.Linear(config.d_model, sum(self.widths), bias=False)
        self.mamba = Mamba2(config)
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)

    def inputs(self, gate, u, dt):
        return None, (), (u, dt, gate)
