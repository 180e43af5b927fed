"""Which token may see which: the one place where the window, the meta tokens and the cache's ring are defined.

Positions count the meta tokens: they stand at 0 .. n_meta - 1, token i of a text (or of a packed document) at
n_meta + i. Keys stay where they were written; nothing is renumbered when the window moves on.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# the position of a slot that holds nothing: later than any query, so that causality hides it
EMPTY = 2**31 - 1


class KeyValue(NamedTuple):
    """Keys and values that lie in one place, and where in the text they stand."""

    k: Tensor  # (B or 1, G, S, dk), rotated
    v: Tensor  # (B or 1, G, S, dv)
    positions: Tensor  # (B or 1, S)
    documents: Tensor | None = None  # (B, S) in a packed row; None: every document sees them


def visible(q: Tensor, k: Tensor, window: int | None, n_meta: int) -> Tensor:
    """May a query at position q see a key at position k?

    allowed(q, k) = k <= q and (q - k <= window or k < n_meta)         (released implementation; paper, figure 2)

    The window counts the tokens *before* the query, so a token sees `window` + 1 tokens with itself. `window` None is
    full attention. q: (..., T), k: (..., S) -> (..., T, S) bool.
    """
    q, k = q[..., :, None], k[..., None, :]
    causal = k <= q
    return causal if window is None else causal & ((q - k <= window) | (k < n_meta))


def same_document(q: Tensor, k: Tensor) -> Tensor:
    """Packed rows: a document sees itself only. q: (..., T), k: (..., S) document ids -> (..., T, S) bool."""
    return q[..., :, None] == k[..., None, :]


def ring_slots(window: int | None, max_length: int) -> int:
    """How many text positions a layer's store must hold: what `visible` allows at most, and never more than a text."""
    return max_length if window is None else min(window + 1, max_length)


def stored_positions(lengths: Tensor, slots: int, n_meta: int) -> Tensor:
    """Which position lies in each slot of a ring, after `lengths` tokens were written to slot (token % slots).

    lengths: (B,) -> (B, slots), `EMPTY` where nothing was written yet. A span that never wraps is a ring as well.
    """
    last = lengths[:, None] - 1
    token = last - (last - torch.arange(slots, device=lengths.device)) % slots
    return torch.where(token >= 0, token + n_meta, EMPTY)
