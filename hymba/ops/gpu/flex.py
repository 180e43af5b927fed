"""Attention of many queries by FlexAttention, PyTorch's compiled kernel (Dong et al., arXiv 2412.05496), both ways:
in float32, of large heads, and inside `torch.compile`. `flash` takes the others.

`visibility.visible` becomes its mask, evaluated on positions, so a ring, a span and new tokens need no kernels of their
own. Keys from several places are joined first: a copy of what a call reads anyway, less than a hundredth of its time.
Which blocks of keys a block of queries must touch, and which of them without a mask, follows from the smallest and
largest position and document of every block; what lies outside is never read.

float32: scores, softmax and accumulators. Products of matrices are in the type of the inputs; for float32 inputs
without TF32.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hymba.ops.gpu.blocks import EVERYBODY, NO_WINDOW, chosen_first, places, touched
from hymba.ops.gpu.common import needs_grad
from hymba.ops.gpu.join import joined
from hymba.visibility import KeyValue

LEAST = 16  # width of a head that the compiled kernel takes
BLOCK = 128  # queries and keys in a block


def attention(
    q: Tensor,
    positions: Tensor,
    documents: Tensor | None,
    sources: Sequence[KeyValue],
    window: int | None,
    n_meta: int,
    scale: float,
) -> Tensor:
    B, H = q.shape[:2]
    compiling = torch.compiler.is_compiling()
    k, v = joined(sources, B, q.dtype)
    # the same for all layers with this window: made once, unless the compiler sees to that
    make = block_mask.__wrapped__ if compiling else block_mask
    where = tuple(source.positions for source in sources)
    owners = None if documents is None else tuple(source.documents for source in sources)
    mask = make(positions, where, documents, owners, NO_WINDOW if window is None else window, n_meta)
    dv = v.shape[3]
    q, k, v = (x if x.shape[3] >= LEAST else F.pad(x, (0, LEAST - x.shape[3])) for x in (q, k, v))
    # training has one shape, prompts have any
    flex = _joined_heads if compiling else _compiled(dynamic=not needs_grad(q, k, v))
    return flex(q, k, v, mask, scale, k.shape[1] != H, dv)


def _joined_heads(q, k, v, mask, scale, grouped, dv):
    """-> (B, T, H dv). Part of what is compiled: a gradient that comes in this layout is not copied to another then."""
    y = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
    return y[..., :dv].transpose(1, 2).flatten(2)


@lru_cache
def _compiled(dynamic: bool):
    return torch.compile(_joined_heads, dynamic=dynamic)


@lru_cache(maxsize=8)  # tensors are keys by identity; nobody writes to a call's positions
def block_mask(
    positions: Tensor, where: tuple[Tensor, ...], documents: Tensor | None, owners: tuple[Tensor | None, ...] | None,
    window: int, n_meta: int,
) -> BlockMask:  # fmt: skip
    """positions: (B or 1, T), documents: (B, T), and of each source of keys: (B or 1, S), (B, S) or None"""
    at = places(positions, where, documents, owners)
    q_at, k_at, q_doc, k_doc = at
    rows = q_at.shape[0]

    def allowed(b, h, i, j):
        row = b if rows > 1 else 0
        q, k = q_at[row, i], k_at[row, j]
        see = (k <= q) & ((q - k <= window) | (k < n_meta))
        if q_doc is not None:
            see = see & ((q_doc[row, i] == k_doc[row, j]) | (k_doc[row, j] == EVERYBODY))
        return see

    some, full = (x[:, None] for x in touched(at, window, n_meta, BLOCK, BLOCK))
    return BlockMask.from_kv_blocks(
        *chosen_first(some & ~full), *chosen_first(full),
        BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(q_at.shape[1], k_at.shape[1]),
    )  # fmt: skip
