"""Attention of many queries by FlexAttention, PyTorch's compiled kernel (Dong et al., arXiv 2412.05496), both ways.

`visibility.visible` becomes its mask, evaluated on positions, so a ring, a span and new tokens need no kernels of their
own. Keys from several places are joined first: a copy of what a call reads anyway, less than a hundredth of its time.
Which blocks of keys a block of queries must touch, and which of them without a mask, follows from the smallest and
largest position and document of every block; what lies outside is never read.

float32: scores, softmax and accumulators. Products of matrices are in the type of the inputs; for float32 inputs
without TF32.
"""

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hymba.ops import chunked
from hymba.ops.gpu.common import needs_grad
from hymba.ops.gpu.join import Join
from hymba.visibility import EMPTY, KeyValue

LEAST = 16  # width of a head that the compiled kernel takes
BLOCK = 128  # queries and keys in a block
NO_WINDOW = 2**30
# tiles for heads of 64 and 128 on an H100, where the compiler's own choice takes twice the time forward
HOPPER = {
    "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3,
    "bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64, "bwd_num_warps": 4,
    "bwd_num_stages": 2,
}  # fmt: skip
EVERYBODY = -1  # the document of keys that every document sees
# pairs of a query and a key, of all rows, up to which plain PyTorch does: a short prompt shall not wait for a compiler
FEW = 2**20
# the same for rows of so few keys that blocks leave out little
SHORT, MANY = 640, 16


def attention(
    q: Tensor,
    positions: Tensor,
    documents: Tensor | None,
    sources: Sequence[KeyValue],
    window: int | None,
    n_meta: int,
    scale: float,
) -> Tensor:
    (B, H, T, _), S = q.shape, sum(source.k.shape[2] for source in sources)
    compiling = torch.compiler.is_compiling()
    pairs, few = B * T * S, FEW * MANY if S <= SHORT else FEW
    if not compiling and pairs <= few:
        return chunked.attention(q, positions, documents, sources, window, n_meta, scale)
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
    options = None
    if not compiling and T >= BLOCK and q.dtype.itemsize == 2 and torch.cuda.get_device_capability(q.device)[0] == 9:
        options = HOPPER
    return flex(q, k, v, mask, scale, k.shape[1] != H, options, dv)


def joined(sources: Sequence[KeyValue], rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of all sources -> (rows, G, S, dk), (rows, G, S, dv)"""
    keys, values = ([source[i].to(dtype) for source in sources] for i in (0, 1))
    if len(sources) == 2 and keys[1].shape[0] == rows and not torch.compiler.is_compiling():  # meta tokens and a text
        return Join.apply(keys[0], values[0], keys[1], values[1])
    return tuple(torch.cat([x.expand(rows, -1, -1, -1) for x in parts], dim=2) for parts in (keys, values))


def _joined_heads(q, k, v, mask, scale, grouped, options, dv):
    """-> (B, T, H dv). Part of what is compiled: a gradient that comes in this layout is not copied to another then."""
    y = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped, kernel_options=options)
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
    T, lengths = positions.shape[1], [x.shape[1] for x in where]
    S = sum(lengths)
    rows = max(x.shape[0] for x in (positions, *where) if x is not None) if documents is None else documents.shape[0]
    q_at = positions.to(torch.int32)
    k_at = torch.cat([x.to(torch.int32).expand(rows, -1) for x in where], dim=1)
    q_doc = k_doc = None
    if documents is not None:
        q_doc = documents.to(torch.int32)
        shared = [q_doc.new_full((1, n), EVERYBODY) for n in lengths]
        k_doc = torch.cat(
            [(a if x is None else x.to(torch.int32)).expand(rows, -1) for a, x in zip(shared, owners, strict=True)],
            dim=1,
        )
    q_at = q_at.expand(rows, -1).contiguous()

    def allowed(b, h, i, j):
        row = b if rows > 1 else 0
        q, k = q_at[row, i], k_at[row, j]
        see = (k <= q) & ((q - k <= window) | (k < n_meta))
        if q_doc is not None:
            see = see & ((q_doc[row, i] == k_doc[row, j]) | (k_doc[row, j] == EVERYBODY))
        return see

    # by block: least and greatest position, (rows, blocks of queries, 1) and (rows, 1, blocks of keys)
    (q_min, q_max), (k_min, k_max) = (x.unsqueeze(-1) for x in _bounds(q_at)), (x.unsqueeze(-2) for x in _bounds(k_at))
    some = (k_min <= q_max) & (k_min != EMPTY) & ((q_min - k_max <= window) | (k_min < n_meta))
    full = (k_max <= q_min) & ((q_max - k_min <= window) | (k_max < n_meta))
    full = full & _whole(T, q_at.device)[:, None] & _whole(S, q_at.device)
    if q_doc is not None:
        (q_min, q_max), (k_min, k_max) = (
            (x.unsqueeze(-1) for x in _bounds(q_doc)),
            (x.unsqueeze(-2) for x in _bounds(k_doc)),
        )
        some = some & ((k_min == EVERYBODY) | ((k_min <= q_max) & (q_min <= k_max)))
        full = full & ((k_max == EVERYBODY) | ((k_min == k_max) & (k_min == q_min) & (k_min == q_max)))
    full = full & some
    ordered = partial(torch.argsort, dim=-1, descending=True, stable=True)
    some, full = (x[:, None].to(torch.int32) for x in (some & ~full, full))
    return BlockMask.from_kv_blocks(
        some.sum(-1, dtype=torch.int32), ordered(some).to(torch.int32),
        full.sum(-1, dtype=torch.int32), ordered(full).to(torch.int32),
        BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(T, S),
    )  # fmt: skip


def _bounds(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: (rows, S) -> least and greatest of every block, (rows, blocks) each"""
    blocks = -(-x.shape[1] // BLOCK)
    at = torch.arange(blocks * BLOCK, device=x.device).clamp(max=x.shape[1] - 1)
    x = x[:, at].unflatten(1, (blocks, BLOCK))
    return x.amin(-1), x.amax(-1)


def _whole(n: int, device: torch.device) -> Tensor:
    """Which of the blocks that n elements take are filled."""
    return (torch.arange(-(-n // BLOCK), device=device) + 1) * BLOCK <= n
