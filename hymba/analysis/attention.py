"""What the attention heads look at: mass by category, entropy, and the share of every meta token.

H query heads, G key/value heads, M meta tokens, T queries, S keys, d size of a key head
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hymba.visibility import KeyValue, visible

CATEGORIES = ("meta", "bos", "self", "cross")
# queries whose probabilities are held at once, (H, QUERIES, S) floats
QUERIES = 128


def probabilities(
    q: Tensor, positions: Tensor, sources: Sequence[KeyValue], window: int | None, n_meta: int, scale: float
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The attention probabilities of one row, a few queries at a time; arguments as of `ops.attention`.

    -> positions of the queries (t,), positions of the keys that any of them sees (s,), which query sees which (t, s),
    probabilities (H, t, s) in float32
    """
    k = torch.cat([source.k[0] for source in sources], dim=1).float()  # (G, S, d)
    keys = torch.cat([source.positions[0] for source in sources])
    for queries, at in zip(q[0].float().split(QUERIES, dim=1), positions[0].split(QUERIES), strict=True):
        see = visible(at, keys, window, n_meta)
        used = see.any(dim=0)  # a window leaves most of a long text aside
        see = see[:, used]
        grouped = queries.unflatten(0, (k.shape[0], -1))  # (G, H / G, t, d)
        scores = torch.einsum("grtd,gsd->grts", grouped, k[:, used]) * scale
        yield at, keys[used], see, scores.masked_fill(~see, -torch.inf).softmax(-1).flatten(0, 1)


class AttentionMeter:
    """Listens to the attention of every layer, and averages over the text tokens after the first.

    The first token of a text (BOS, where the tokenizer has one) is left out as a query: it sees nothing but itself and
    the meta tokens.
    """

    def __init__(self) -> None:
        self._sums: dict[int, dict[str, Tensor]] = {}

    def __call__(self, layer: int, name: str, arguments: dict[str, Any], output: Any) -> None:
        if name != "attention":
            return
        arguments = {key: value for key, value in arguments.items() if key != "documents"}
        M = arguments["n_meta"]
        for at, keys, see, p in probabilities(**arguments):
            asks = at > M
            at, see, p = at[asks], see[asks], p[:, asks]
            is_self = keys == at[:, None]  # (t, s)
            meta, first = p[..., keys < M], keys == M
            others = (keys > M) & ~is_self
            mass = (meta.sum(-1), p[..., first].sum(-1), (p * is_self).sum(-1), (p * others).sum(-1))
            sums = {
                "queries": asks.sum().double(),
                "mass": torch.stack([x.sum(1) for x in mass], dim=1).double(),  # (H, 4)
                "entropy": torch.special.entr(p).sum((1, 2)).double(),  # (H,)
                "uniform": see.sum(1).double().log().sum(),
                "meta": meta.sum(1).double(),  # (H, M): every query sees all meta tokens
            }
            known = self._sums.setdefault(layer, {})
            for key, value in sums.items():
                known[key] = known[key] + value if key in known else value

    @property
    def layers(self) -> list[int]:
        """The layers that have attention."""
        return sorted(self._sums)

    def _mean(self, key: str) -> Tensor:
        return torch.stack([self._sums[layer][key] / self._sums[layer]["queries"] for layer in self.layers])

    def mass(self) -> Tensor:
        """(L, H, 4), in the order of `CATEGORIES`: the probability that a head gives to the meta tokens, the first
        token, the query itself, and all other tokens. They add up to 1."""
        return self._mean("mass")

    def entropy(self) -> Tensor:
        """(L, H), nats: mean of -sum p log p over all keys that a query sees, meta tokens included."""
        return self._mean("entropy")

    def uniform_entropy(self) -> Tensor:
        """(L,), nats: the largest entropy there could be, the mean of log(keys that a query sees)."""
        return self._mean("uniform")

    def meta_tokens(self) -> Tensor:
        """(L, H, M): the probability that each meta token gets."""
        return self._mean("meta")
