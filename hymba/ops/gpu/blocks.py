"""Which blocks of keys a block of queries must touch, and which of them without a mask: for attention of many queries.

`visibility.visible` is evaluated on positions, so a ring, a span and new tokens need no kernels of their own. What it
says about a block follows from the smallest and largest position and document in it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hymba.visibility import EMPTY

NO_WINDOW = 2**30
EVERYBODY = -1  # the document of keys that every document sees


class Places(NamedTuple):
    """Where queries and the keys of all sources stand: int32, contiguous. rows is 1 where all rows are alike."""

    q_at: Tensor  # (rows, T)
    k_at: Tensor  # (rows, S)
    q_doc: Tensor | None  # (rows, T)
    k_doc: Tensor | None  # (rows, S)


def places(
    positions: Tensor, where: Sequence[Tensor], documents: Tensor | None, owners: Sequence[Tensor | None] | None
) -> Places:
    """positions: (B or 1, T), documents: (B, T), and of each source of keys: (B or 1, S), (B, S) or None"""
    lengths = [x.shape[1] for x in where]
    rows = max(x.shape[0] for x in (positions, *where)) if documents is None else documents.shape[0]
    q_at = positions.to(torch.int32).expand(rows, -1).contiguous()
    k_at = torch.cat([x.to(torch.int32).expand(rows, -1) for x in where], dim=1)
    if documents is None:
        return Places(q_at, k_at, None, None)
    q_doc = documents.to(torch.int32).contiguous()
    shared = [q_doc.new_full((1, n), EVERYBODY) for n in lengths]
    k_doc = torch.cat(
        [(a if x is None else x.to(torch.int32)).expand(rows, -1) for a, x in zip(shared, owners, strict=True)], dim=1
    )
    return Places(q_at, k_at, q_doc, k_doc)


def touched(at: Places, window: int, n_meta: int, queries: int, keys: int) -> tuple[Tensor, Tensor]:
    """Blocks of so many queries and keys -> (rows, blocks of queries, blocks of keys) bool: those of which some pairs
    may be visible, and those of which all are. The first are more than the second and hold every visible pair."""

    def bounds(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return *(x.unsqueeze(-1) for x in _bounds(q, queries)), *(x.unsqueeze(-2) for x in _bounds(k, keys))

    T, S, device = at.q_at.shape[1], at.k_at.shape[1], at.q_at.device
    q_min, q_max, k_min, k_max = bounds(at.q_at, at.k_at)
    some = (k_min <= q_max) & (k_min != EMPTY) & ((q_min - k_max <= window) | (k_min < n_meta))
    full = (k_max <= q_min) & ((q_max - k_min <= window) | (k_max < n_meta))
    full = full & _whole(T, queries, device)[:, None] & _whole(S, keys, device)
    if at.q_doc is not None:
        q_min, q_max, k_min, k_max = bounds(at.q_doc, at.k_doc)
        some = some & ((k_min == EVERYBODY) | ((k_min <= q_max) & (q_min <= k_max)))
        full = full & ((k_max == EVERYBODY) | ((k_min == k_max) & (k_min == q_min) & (k_min == q_max)))
    return some, full & some


def chosen_first(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(..., n) bool -> how many (...), and the places of the chosen ones in order, before the others (..., n); int32"""
    chosen = chosen.to(torch.int32)
    order = torch.argsort(chosen, dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _bounds(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """x: (rows, S) -> least and greatest of every block, (rows, blocks) each"""
    blocks = -(-x.shape[1] // size)
    at = torch.arange(blocks * size, device=x.device).clamp(max=x.shape[1] - 1)
    x = x[:, at].unflatten(1, (blocks, size))
    return x.amin(-1), x.amax(-1)


def _whole(n: int, size: int, device: torch.device) -> Tensor:
    """Which of the blocks that n elements take are filled."""
    return (torch.arange(-(-n // size), device=device) + 1) * size <= n
