"""The architecture of Dong et al., "Hymba: A Hybrid-head Architecture for Small Language Models" (arXiv 2411.13676).

From small to large: hybrid heads, block, whole model with meta tokens. What Hymba is compared with has other heads in
the same blocks (`mixers.py`). Legend:

    B batch, T time, D model width, E inner width, A width of the attention output
    H query heads, G key/value heads, dk, dv head sizes, N SSM state per channel, K conv width
    M meta tokens, V vocabulary, R = M + B T tokens of a pass

Meta tokens stand in front of every input but depend on none, so they are read once for a whole batch, and what they
leave in each layer (keys, values, conv and SSM state) is where every row, and every document of a packed row, begins:
the "learned initialisation" of cache and state that the paper describes (section 2.3). They and the text go through a
layer together, as two parts of one list of tokens: only heads take them one after the other.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hymba import ops
from hymba.config import HymbaConfig, LayerPlan
from hymba.errors import UserError
from hymba.model.attention import Attention
from hymba.model.cache import KINDS, CachedLayer, HymbaCache, LayerState, fingerprint
from hymba.model.layout import Layout, Rope
from hymba.model.loss import IGNORED_LABEL, head_cross_entropy
from hymba.model.mamba import Mamba, Mamba2
from hymba.model.mixers import AttentionHeads, Heads, Mamba2Heads, MambaHeads
from hymba.model.norm import RMSNorm
from hymba.model.plain import is_plain
from hymba.visibility import KeyValue


class HybridHeads(Heads):
    """Attention heads and Mamba heads read the same token side by side (paper, section 2.1)."""

    def __init__(self, config: HymbaConfig, plan: LayerPlan):
        super().__init__()
        D, E = config.d_model, config.d_inner
        kv = (config.n_kv_heads * config.d_key, config.n_kv_heads * config.d_value) if plan.produces_kv else ()
        self.widths = (config.n_heads * config.d_key, *kv, E, E)
        self.in_proj = nn.Linear(D, sum(self.widths), bias=False)
        self.attention = Attention(config, plan)
        self.mamba = Mamba(config)
        A = config.n_heads * config.d_value
        self.concat = config.fusion == "concat"
        # a mean takes an attention output that is narrower than E (`d_head`) as often as it fits; in Hymba A is E
        self.repeats = 1 if self.concat else E // A
        self.attn_norm = RMSNorm(A * self.repeats, eps=config.norm_eps)
        self.ssm_norm = RMSNorm(E, eps=config.norm_eps)
        self.out_proj = nn.Linear(A + E if self.concat else E, D, bias=False)

    def inputs(self, q, *others):
        *kv, u, gate = others  # one projection feeds both
        return q, kv, (u, gate)

    def fuse(self, attn, ssm):
        # the branches live on different scales, so each gets its norm before the mean
        if self.concat:
            return torch.cat([self.attn_norm(ops.rows_of(attn)), self.ssm_norm(ops.rows_of(ssm))], dim=-1)  # (R, A + E)
        if self.repeats > 1:
            attn = [x.repeat(1, 1, self.repeats) for x in attn]  # (B, T, E)
        return ops.mean_of_norms(attn, ssm, self.attn_norm.weight, self.ssm_norm.weight, self.attn_norm.eps)


# what a layer mixes tokens with, by its name in `HymbaConfig.mixers`
MIXERS = {"hybrid": HybridHeads, "attention": AttentionHeads, "mamba": MambaHeads, "mamba2": Mamba2Heads}


class MLP(nn.Module):
    """Gated feed-forward layer (SwiGLU; Shazeer, arXiv 2002.05202), or squared ReLU without a gate."""

    def __init__(self, config: HymbaConfig):
        super().__init__()
        self.gated = config.mlp_activation == "silu"
        if self.gated:
            self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.down_proj(F.relu(self.up_proj(x)).square())
        if is_plain(self.gate_proj) and is_plain(self.up_proj):
            return self.down_proj(ops.gated_linear(x, self.gate_proj.weight, self.up_proj.weight))
        return self.down_proj(ops.gated_silu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """Hybrid heads (or those of one kind), then the MLP if there is one, each behind a norm and beside a residual."""

    def __init__(self, config: HymbaConfig, plan: LayerPlan):
        super().__init__()
        self.heads_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.heads = MIXERS[plan.mixer](config, plan)
        self.has_mlp = config.d_ff > 0
        if self.has_mlp:
            self.mlp_norm = RMSNorm(config.d_model, eps=config.norm_eps)
            self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        added: Tensor | None,
        layouts: Sequence[Layout],
        past: LayerState | CachedLayer,
        shared: Sequence[tuple[KeyValue, ...]] | None,
        dropout: float = 0.0,
    ) -> tuple[Tensor, Tensor, list[tuple[KeyValue, ...]], Tensor | None, Tensor | None]:
        """The others are as in `Heads.forward`.

        x, added: (R, D) each; the residual stream is their sum, which the next norm takes on its way; added is None
        where there is nothing to add
        dropout: share of both branches' outputs that is dropped, of the text, which is the last part

        -> x and added of the next block, and what the heads return
        """
        text = math.prod(layouts[-1].shape)
        normed, x = self.heads_norm.branch(x, added)
        y, *found = self.heads(normed, layouts, past, shared)
        if self.has_mlp:
            normed, x = self.mlp_norm.branch(x, _drop_last(y, text, dropout))
            y = self.mlp(normed)
        return x, _drop_last(y, text, dropout), *found


def _drop_last(x: Tensor, count: int, dropout: float) -> Tensor:
    """x: (R, D) -> the last `count` tokens with dropout"""
    if not dropout:
        return x
    return torch.cat([x[:-count], F.dropout(x[-count:], dropout)])


class Hymba(nn.Module):
    """The whole model: meta tokens, embedding, blocks, norm, LM head.

    Set `checkpoint_blocks = True` to recompute activations in the backward pass instead of keeping them, and `dropout`
    to the share of embeddings and branch outputs that is dropped in training mode (of text: meta tokens keep theirs).
    """

    def __init__(self, config: HymbaConfig):
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False
        self.dropout = 0.0
        self.meta_tokens = nn.Parameter(torch.empty(config.n_meta, config.d_model))
        # as in the released model, the padding id's embedding gets no gradient from the input side
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.pad_token_id)
        self.rope = Rope(config)
        self.blocks = nn.ModuleList(Block(config, plan) for plan in config.layers)
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight
        if not self.meta_tokens.is_meta:
            self.init_weights()

    def init_weights(self) -> None:
        """Fresh weights: normal with `init_std`, but for the parts that Mamba initialises in its own way."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.init_std)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, Mamba | Mamba2):
                module.init_weights()
        nn.init.normal_(self.meta_tokens, std=self.config.init_std)

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: HymbaCache | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Logits of every token, or the loss if `labels` are given.

        input_ids: (B, T) int; attention_mask: (B, T), nonzero where a token counts: padding may stand on either side
        and changes nothing; document_ids: (B, T), rows that are packed of several documents: equal and neighbouring
        ids are one document, which sees the meta tokens and itself only; cache: continue its rows and advance them,
        without gradients;
        labels: (B, T), usually the input ids: they are shifted here, and -100 is left out
        -> logits (B, T, V), or the mean loss in nats, a float32 scalar

        Raises `UserError` for shapes that do not fit, rows that outgrow the cache, or a combination without meaning.
        """
        hidden = self.hidden(input_ids, attention_mask=attention_mask, document_ids=document_ids, cache=cache)
        if labels is None:
            return self.lm_head(hidden)
        if labels.shape != input_ids.shape:
            raise UserError(f"labels {tuple(labels.shape)} must have the shape of input_ids {tuple(input_ids.shape)}")
        targets = labels[:, 1:]
        if attention_mask is not None:
            targets = targets.where((attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0), IGNORED_LABEL)
        if document_ids is not None:  # the first token of a document is nobody's to predict
            targets = targets.where(document_ids[:, 1:] == document_ids[:, :-1], IGNORED_LABEL)
        return self.loss(hidden[:, :-1], targets)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in float32, a chunk of tokens at a time: logits of a long text are never held at once.

        hidden: (B, T, D) as from `hidden`, targets: (B, T), -100 where there is none -> scalar, nats per target
        """
        total = head_cross_entropy(self.lm_head, hidden.flatten(0, 1), targets.flatten())
        return total / (targets != IGNORED_LABEL).sum().clamp(min=1)

    def hidden(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: HymbaCache | None = None,
    ) -> Tensor:
        """What the LM head reads, for callers who do not need the logits of every token. As `forward` -> (B, T, D)"""
        self._check(input_ids, attention_mask, document_ids, cache)
        order = lengths = None
        if attention_mask is not None:
            counts = attention_mask != 0
            lengths = counts.sum(1)
            order = counts.to(torch.int8).argsort(dim=1, descending=True, stable=True)  # left-align every row
            input_ids = input_ids.gather(1, order)
            document_ids = None if document_ids is None else document_ids.gather(1, order)
        # what a cache is given stays there, and would keep the graph of every step alive
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            for x, added, _ in self._layers(input_ids, document_ids, lengths, cache):  # noqa: B007
                pass
            x = self.norm.branch(x, added)[0][-input_ids.numel() :].view(*input_ids.shape, -1)
        if order is not None:
            x = torch.empty_like(x).scatter(1, order[..., None].expand_as(x), x)
        return x

    def layer_outputs(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        cache: HymbaCache | None = None,
    ) -> Iterator[tuple[Tensor, LayerState | CachedLayer | None]]:
        """Run the blocks over left-aligned rows and yield after each, first of all the embeddings.

        input_ids, document_ids: (B, T), lengths: (B,) tokens that count, None: all
        -> (B, T, D) the residual stream, and the state of the layer after the last token (None for the embeddings)
        """
        for x, added, state in self._layers(input_ids, document_ids, lengths, cache):
            x = x if added is None else x + added
            yield x[-input_ids.numel() :].view(*input_ids.shape, -1), state

    def _layers(
        self, input_ids: Tensor, document_ids: Tensor | None, lengths: Tensor | None, cache: HymbaCache | None
    ) -> Iterator[tuple[Tensor, Tensor | None, LayerState | CachedLayer | None]]:
        """As `layer_outputs` -> (R, D) twice, the residual stream of all parts as `Block` returns it; the state"""
        B, T = input_ids.shape
        M, device = self.config.n_meta, input_ids.device
        dropout = self.dropout if self.training else 0.0
        layouts, x = [], []
        if cache is None:
            before = torch.zeros(1, dtype=torch.int64, device=device)
            after = before + T if lengths is None else lengths
            past = self._nothing()
            if M:
                layouts.append(self._meta_layout(M + after))
                x.append(self._meta_rows(layouts[0]))
        else:
            used = int(cache.lengths.max())
            before = cache.lengths.to(device)
            after = before + (T if lengths is None else lengths)
            past = cache.layers(before, used)
        positions = before[:, None] + torch.arange(T, device=device)
        starts = None
        if document_ids is not None:
            starts = torch.ones_like(document_ids, dtype=torch.bool)
            starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
            document_ids = starts.cumsum(1)  # ids may come back: neighbours decide
            positions = positions - torch.where(starts, positions, 0).cummax(dim=1).values
        positions = positions + M
        layouts.append(Layout((B, T), positions, *self.rope(positions, M + after), document_ids, starts, lengths))
        x.append(F.dropout(self.embedding(input_ids), dropout).flatten(0, 1))
        yield from self._run(x[0] if len(x) == 1 else torch.cat(x), layouts, past, dropout)
        if cache is not None:
            cache.lengths.add_(T if lengths is None else lengths.to(cache.lengths.device))

    def meta_states(self, lengths: Tensor) -> list[LayerState]:
        """What the meta tokens leave in every layer: where a text begins.

        lengths: (B or 1,) of the rows with meta tokens, which only matter to rope='dynamic_ntk' -> states of batch 1,
        or of batch B under dynamic_ntk
        """
        if self.config.n_meta == 0:
            return self._nothing()
        layout = self._meta_layout(lengths)
        _, *layers = self._run(self._meta_rows(layout), [layout], self._nothing())
        return [state for *_, state in layers]

    def _nothing(self) -> list[LayerState]:
        """What stands in front of everything."""
        c, like = self.config, self.meta_tokens
        conv = like.new_zeros(1, c.d_conv - 1, c.d_conv_inputs)
        ssm = torch.zeros(1, c.d_inner, c.d_state, device=like.device)
        return [LayerState(conv, ssm, None) if plan.recurs else LayerState(None, None, None) for plan in c.layers]

    def _meta_layout(self, lengths: Tensor) -> Layout:
        """lengths: as in `meta_states`"""
        if self.config.rope != "dynamic_ntk":
            lengths = lengths[:1]
        positions = torch.arange(self.config.n_meta, device=self.meta_tokens.device)[None]
        return Layout((lengths.shape[0], self.config.n_meta), positions, *self.rope(positions, lengths))

    def _meta_rows(self, layout: Layout) -> Tensor:
        return self.meta_tokens.repeat(layout.shape[0], 1)

    def _run(
        self, x: Tensor, layouts: Sequence[Layout], past: list[LayerState] | list[CachedLayer], dropout: float = 0.0
    ) -> Iterator[tuple[Tensor, Tensor | None, LayerState | CachedLayer | None]]:
        """All blocks; x: (R, D), past: of the first part -> as `_layers`"""
        added = None
        yield x, added, None
        shared: dict[int, Sequence[tuple[KeyValue, ...]]] = {}  # of the layers that make keys and values
        for plan, block, state in zip(self.config.layers, self.blocks, past, strict=True):
            arguments = (x, added, layouts, state, shared.get(plan.producer), dropout)
            if self.checkpoint_blocks and torch.is_grad_enabled():
                # only dropout draws random numbers, whose state a CUDA graph that is being recorded does not tell
                x, added, sources, conv, ssm = checkpoint(
                    block, *arguments, use_reentrant=False, preserve_rng_state=dropout > 0
                )
            else:
                x, added, sources, conv, ssm = block(*arguments)
            shared[plan.index] = sources
            if isinstance(state, CachedLayer):
                if plan.recurs:
                    state.conv.copy_(conv)
                    state.ssm.copy_(ssm)
                yield x, added, state
            else:
                yield x, added, LayerState(conv, ssm, sources[-1][-1] if plan.produces_kv else None)

    def _check(self, input_ids, attention_mask, document_ids, cache) -> None:
        if input_ids.dim() != 2 or input_ids.shape[1] == 0 or input_ids.is_floating_point():
            raise UserError(f"input_ids must be integers of shape (B, T) with T >= 1, not {tuple(input_ids.shape)}")
        for name, x in (("attention_mask", attention_mask), ("document_ids", document_ids)):
            if x is not None and x.shape != input_ids.shape:
                raise UserError(f"{name} {tuple(x.shape)} must have the shape of input_ids {tuple(input_ids.shape)}")
        if document_ids is not None and cache is not None:
            raise UserError("document_ids and cache exclude each other: a cache row holds one document")
        if document_ids is not None and self.config.rope == "dynamic_ntk":
            raise UserError("rope='dynamic_ntk' rotates by the length of the text, so documents cannot be packed")
        if cache is not None:
            if cache.batch_size != input_ids.shape[0]:
                raise UserError(
                    f"the cache has {cache.batch_size} rows, input_ids {input_ids.shape[0]}; use cache.rows"
                )
            counts = input_ids.shape[1] if attention_mask is None else (attention_mask != 0).sum(1).cpu()
            cache.require_room(counts)

    @torch.no_grad()
    def new_cache(self, batch_size: int = 1, max_length: int | None = None, kind: str | None = None) -> HymbaCache:
        """An empty cache of `batch_size` rows of `max_length` tokens (default: the context length).

        kind: None keeps keys and values in the model's dtype, "int8" in 8 bits, see `hymba.model.cache`.
        Reads the meta tokens once, so make it after the weights are final. Raises `UserError` for lengths beyond the
        context: meta tokens are not counted.
        """
        c = self.config
        if kind not in KINDS:
            raise UserError(f"unknown kind of cache {kind!r}; int8 stores keys and values in 8 bits, None as computed")
        max_length = c.max_length if max_length is None else max_length
        if batch_size < 1 or not 1 <= max_length <= c.max_length:
            raise UserError(
                f"a cache needs batch_size >= 1 and max_length from 1 to {c.max_length}, the model's context length; "
                f"got {batch_size} and {max_length}"
            )
        if c.rope == "dynamic_ntk" and c.n_meta + max_length > c.rope_original_length:
            raise UserError(
                f"rope='dynamic_ntk' rotates every key anew once a row is longer than {c.rope_original_length}, so a "
                f"cache is exact up to max_length={c.rope_original_length - c.n_meta} only; ask for that"
            )
        meta = self.meta_states(torch.zeros(1, dtype=torch.int64, device=self.meta_tokens.device))
        name = fingerprint(c, [parameter.flatten()[:64] for parameter in self.parameters()])
        return HymbaCache(c, meta, batch_size, max_length, self.meta_tokens, name, kind)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | str = "auto"
    ) -> "Hymba":
        """Load a checkpoint in the official layout from a folder or the Hugging Face hub; see `hymba.convert`."""
        from hymba.convert import load_model

        return load_model(path, device=device, dtype=dtype)

    def save_pretrained(self, directory: str | Path, *, max_shard_bytes: int | None = None) -> None:
        """Save in the official layout, so that the released modeling code could read it; see `hymba.convert`."""
        from hymba.convert import save_model

        save_model(self, directory, max_shard_bytes=max_shard_bytes)
