"""The state of decoding: one object, allocated once, of fixed shapes.

What the meta tokens leave behind does not depend on the prompt, so a cache holds it once for all its rows (`meta`).
A row holds: for every group of layers that share keys and values, a ring of `window` + 1 text positions, or a span of
`max_length` where a global layer reads it; for every layer with Mamba heads the last inputs of the convolution and the
SSM state (float32). Its size is a formula, `hymba.cost.cache_bytes`.

Keys and values of a row are kept in the model's dtype, or in 8 bits: kind "int8" holds for every token and head

    scale = max |x| / 127, one float32 for the key and one for the value      q = round(x / scale)

They are rounded once, when they are stored, and every token sees the others rounded, those of its own chunk too: so the
result does not depend on the chunks in which a text is read. The meta tokens', which exist once, stay as they are.

Rows are the unit of work: admitting, dropping, forking and saving a request are `reset`, `copy`, `snapshot` and
`restore`, and a batch is a range of rows, `rows(first, last)`, that shares the storage.

    B rows, G key/value heads, S slots, dk, dv head sizes, E inner width, K conv width, N SSM state
    C channels of the convolution: E, and of Mamba-2 E + 2 N; L layers that have Mamba heads
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hymba.config import HymbaConfig, LayerPlan
from hymba.errors import UserError
from hymba.files import atomic_write
from hymba.visibility import KeyValue, ring_slots, stored_positions

# how keys and values may be stored; None is the model's dtype
KINDS = (None, "int8")
LEVELS = 127  # of int8 on either side of zero


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: (..., d) -> int8 (..., d), float32 scales (...); x is about int8 times scale, and zero where that is zero"""
    x = x.float()
    scale = x.abs().amax(-1) / LEVELS
    q = x / torch.where(scale > 0, scale, 1)[..., None]
    return q.round().clamp(-LEVELS, LEVELS).to(torch.int8), scale


def expand(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantise` gave -> (..., d) of a floating type"""
    return (q * scale[..., None]).to(dtype)


class LayerState(NamedTuple):
    """What a layer remembers of the tokens before a call, without a cache: the meta tokens and nothing else."""

    conv: Tensor | None  # (B or 1, K - 1, C); None in a layer without Mamba heads
    ssm: Tensor | None  # (B or 1, E, N) float32
    meta: KeyValue | None  # None in a layer that makes no keys, or while the meta tokens themselves are read

    def extend(self, new: KeyValue, lengths: Tensor | None) -> tuple[KeyValue, ...]:
        """All keys and values that the new tokens may see; nothing is kept."""
        return (new,) if self.meta is None else (self.meta, new)


@dataclass
class CachedLayer:
    """One layer's part of a cache; as `LayerState`, but what it is given stays."""

    conv: Tensor | None  # (B, K - 1, C)
    ssm: Tensor | None  # (B, E, N) float32
    meta: KeyValue | None
    k: Tensor | None  # (B, G, S, dk); None in a layer that makes no keys
    v: Tensor | None  # (B, G, S, dv)
    k_scale: Tensor | None  # (B, G, S) float32; None unless keys and values are int8
    v_scale: Tensor | None
    lengths: Tensor  # (B,) tokens of each row before this call
    used: int  # the longest row before this call
    n_meta: int
    # of rings of one size the same in all layers of a call: made once, and masks that are made of them, too
    positions: dict[tuple[bool, int, int], Tensor]

    def extend(self, new: KeyValue, lengths: Tensor | None) -> tuple[KeyValue, ...]:
        """Store new keys and values, and return all that the new tokens may see.

        lengths: (B,) how many of the new tokens count in each row; None: all
        """
        T, slots, dtype = new.k.shape[2], self.k.shape[2], new.k.dtype
        count = torch.full_like(self.lengths, T) if lengths is None else lengths
        sources = [] if self.meta is None else [self.meta]
        coded = self._coded(new)
        if T == 1 or self.used + T <= slots:
            # nothing that the new tokens see is overwritten: store first, then read the store alone
            self._store(coded, count)
            sources.append(self._stored(count, min(self.used + T, slots), dtype))
        else:
            if self.used:
                old = self._stored(None, min(self.used, slots), dtype)
                if self.k_scale is None:  # the store itself, which is written below
                    old = old._replace(k=old.k.clone(), v=old.v.clone())
                sources.append(old)
            if self.k_scale is not None:
                k, v, k_scale, v_scale = coded
                new = new._replace(k=expand(k, k_scale, dtype), v=expand(v, v_scale, dtype))
            sources.append(new)
            self._store(coded, count)
        return tuple(sources)

    def _coded(self, new: KeyValue) -> tuple[Tensor, ...]:
        """Keys and values as they are stored: k, v and, of int8, their scales."""
        if self.k_scale is None:
            return new.k, new.v
        (k, k_scale), (v, v_scale) = quantise(new.k), quantise(new.v)
        return k, v, k_scale, v_scale

    def _stored(self, count: Tensor | None, slots: int, dtype: torch.dtype) -> KeyValue:
        """What the first `slots` slots hold before this call, or with `count` tokens of it in each row."""
        key = count is not None, self.k.shape[2], slots
        positions = self.positions.get(key)
        if positions is None:
            lengths = self.lengths if count is None else self.lengths + count
            positions = self.positions[key] = stored_positions(lengths, key[1], self.n_meta)[:, :slots]
        k, v = self.k[:, :, :slots], self.v[:, :, :slots]
        if self.k_scale is not None:
            k, v = (expand(x, s[:, :, :slots], dtype) for x, s in ((k, self.k_scale), (v, self.v_scale)))
        return KeyValue(k, v, positions)

    def _store(self, coded: tuple[Tensor, ...], count: Tensor) -> None:
        """Write each row's last tokens, as many as there are slots, to slot (token % slots)."""
        T, slots = coded[0].shape[2], self.k.shape[2]
        step = torch.arange(min(T, slots), device=count.device)
        pick = (count - slots).clamp(min=0)[:, None] + step  # (B, T') which of the new tokens
        slot = (self.lengths[:, None] + pick) % slots
        counts = (pick < count[:, None])[:, None, :, None]
        stores = (self.k, self.v, self.k_scale, self.v_scale)
        for store, x in zip(stores, coded, strict=False):  # no scales in the model's dtype
            store, x = (y if y.dim() == 4 else y[..., None] for y in (store, x))
            shape = (-1, x.shape[1], -1, x.shape[3])
            x = x.gather(2, pick[:, None, :, None].expand(shape)).to(store.dtype)
            index = slot[:, None, :, None].expand(shape)
            # padding writes back what is there
            store.scatter_(2, index, torch.where(counts, x, store.gather(2, index)))


@dataclass(frozen=True)
class RowSnapshot:
    """One row of a cache, trimmed to what it uses: a prompt that was read, to be continued any number of times."""

    tensors: Mapping[str, Tensor]
    length: int  # text tokens read
    model: str  # fingerprint of the model that made it, and of the kind of cache

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file; `metadata` is the caller's own."""
        header = {**(metadata or {}), "hymba_row": json.dumps({"length": self.length, "model": self.model})}
        with atomic_write(path) as temporary:
            save_file({name: x.contiguous() for name, x in self.tensors.items()}, temporary, metadata=header)

    @classmethod
    def load(cls, path: str | Path) -> tuple["RowSnapshot", dict[str, str]]:
        """Read what `save` wrote -> the row and the caller's metadata. Raises `UserError` if it is something else."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                header = json.loads(metadata.pop("hymba_row"))
                length, model = header["length"], header["model"]
                if type(length) is not int or length < 0 or not isinstance(model, str):
                    raise ValueError(f"its header is {header}")
                row = cls({name: file.get_tensor(name) for name in file.keys()}, length, model)  # noqa: SIM118
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no saved row of a hymba cache ({error})") from None
        return row, metadata


class HymbaCache:
    """Keys, values and states of `batch_size` rows of at most `max_length` text tokens. Made by `Hymba.new_cache`."""

    def __init__(
        self,
        config: HymbaConfig,
        meta: list[LayerState],
        batch_size: int,
        max_length: int,
        like: Tensor,
        fingerprint: str = "",
        kind: str | None = None,
    ):
        """meta: what the meta tokens leave in every layer (batch 1); like: a tensor of the model's dtype and device;
        kind: "int8" for keys and values of 8 bits"""
        self.config, self.max_length, self.kind = config, max_length, kind
        self.fingerprint = fingerprint if kind is None else f"{fingerprint}-{kind}"
        # copies: a forward pass gives views, and each would keep a whole activation alive
        own = lambda x: x if x is None else x.clone(memory_format=torch.contiguous_format)  # noqa: E731
        self.meta = [
            LayerState(own(conv), own(ssm), kv and kv._replace(k=own(kv.k), v=own(kv.v))) for conv, ssm, kv in meta
        ]
        c = config
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}
        # of int8 only
        self.k_scale: dict[int, Tensor] = {}
        self.v_scale: dict[int, Tensor] = {}
        dtype = like.dtype if kind is None else torch.int8
        for plan in c.layers:
            if plan.produces_kv:
                slots = ring_slots(None if plan.spans_context else c.window, max_length)
                shape = (batch_size, c.n_kv_heads, slots)
                self.k[plan.index] = like.new_zeros(*shape, c.d_key, dtype=dtype)
                self.v[plan.index] = like.new_zeros(*shape, plan.d_value, dtype=dtype)
                if kind is not None:
                    self.k_scale[plan.index] = like.new_zeros(shape, dtype=torch.float32)
                    self.v_scale[plan.index] = like.new_zeros(shape, dtype=torch.float32)
        # layer -> its place in `conv` and `ssm`
        self.recurrent = {layer: i for i, layer in enumerate(plan.index for plan in c.layers if plan.recurs)}
        L = len(self.recurrent)
        self.conv = like.new_empty(L, batch_size, c.d_conv - 1, c.d_conv_inputs)
        self.ssm = like.new_empty(L, batch_size, c.d_inner, c.d_state, dtype=torch.float32)
        # on the CPU always: the loop that drives the model asks for it at every step
        self.lengths = torch.zeros(batch_size, dtype=torch.int64)
        for row in range(batch_size):
            self.reset(row)

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    @property
    def stores(self) -> dict[str, dict[int, Tensor]]:
        """By name and layer, what holds the rows' keys and values: (B, G, S, ...) each."""
        return {"k": self.k, "v": self.v, "k_scale": self.k_scale, "v_scale": self.v_scale}

    def bytes(self) -> dict[str, int]:
        """Bytes of all rows by part, and of the meta tokens' keys, values and states, which exist once."""
        size = lambda tensors: sum(x.numel() * x.element_size() for x in tensors)  # noqa: E731
        kv = [x for state in self.meta if state.meta for x in (state.meta.k, state.meta.v)]
        return {
            "kv": size(x for store in self.stores.values() for x in store.values()),
            "conv": size([self.conv]),
            "ssm": size([self.ssm]),
            "meta": size([*kv, *(x for layer in self.recurrent for x in self.meta[layer][:2])]),
        }

    def rows(self, first: int, last: int) -> "HymbaCache":
        """Rows first .. last - 1 as a cache that shares the storage."""
        view = object.__new__(HymbaCache)
        view.__dict__.update(self.__dict__)
        for name, store in self.stores.items():
            setattr(view, name, {layer: x[first:last] for layer, x in store.items()})
        view.conv, view.ssm = self.conv[:, first:last], self.ssm[:, first:last]
        view.lengths = self.lengths[first:last]
        return view

    def require_room(self, counts: int | Tensor = 1) -> None:
        """Raises `UserError` if a row cannot hold `counts` tokens more, one number for all rows or (B,) on the CPU."""
        longest = int((self.lengths + counts).max())
        if longest > self.max_length:
            raise UserError(f"{longest} tokens do not fit a cache of max_length={self.max_length}")

    def reset(self, row: int) -> None:
        """Make a row empty: it has read the meta tokens and nothing else."""
        self.lengths[row] = 0
        for layer, i in self.recurrent.items():
            self.conv[i, row] = self.meta[layer].conv[0]
            self.ssm[i, row] = self.meta[layer].ssm[0]

    def copy(self, source: int, target: int) -> None:
        """Make `target` the same as `source`: a fork, or a move when `source` is given up afterwards."""
        if source != target:
            self.lengths[target] = self.lengths[source]
            for name, x in self._tensors(target, int(self.lengths[source])).items():
                x.copy_(self._tensors(source, int(self.lengths[source]))[name])

    def snapshot(self, row: int) -> RowSnapshot:
        """A copy of a row that does not depend on the cache any more."""
        length = int(self.lengths[row])
        return RowSnapshot({n: x.clone() for n, x in self._tensors(row, length).items()}, length, self.fingerprint)

    def restore(self, row: int, snapshot: RowSnapshot) -> None:
        """Continue in `row` where `snapshot` was taken. Raises `UserError` if it is another model's or too long."""
        if snapshot.model != self.fingerprint:
            raise UserError("this saved row was made by another model, dtype or kind of cache; read its prompt again")
        if snapshot.length > self.max_length:
            raise UserError(f"the saved row holds {snapshot.length} tokens, the cache at most {self.max_length}")
        mine = self._tensors(row, snapshot.length)
        shapes = {name: x.shape for name, x in snapshot.tensors.items()}
        if shapes != {name: x.shape for name, x in mine.items()}:
            raise UserError("the saved row does not fit this cache: it was made with another max_length")
        self.lengths[row] = snapshot.length
        for name, x in mine.items():
            x.copy_(snapshot.tensors[name])

    def _tensors(self, row: int, length: int) -> dict[str, Tensor]:
        """Everything a row of `length` tokens uses, as views."""
        kv = {f"{name}.{i}": x[row, :, :length] for name, store in self.stores.items() for i, x in store.items()}
        return {**kv, "conv": self.conv[:, row], "ssm": self.ssm[:, row]}

    def layers(self, lengths: Tensor, used: int) -> list[CachedLayer]:
        """Each layer's part, for a call; lengths and used: of the rows before the call, on the model's device."""
        positions: dict[tuple[bool, int, int], Tensor] = {}

        def layer(plan: LayerPlan) -> CachedLayer:
            i = plan.index
            conv, ssm = (x[self.recurrent[i]] if plan.recurs else None for x in (self.conv, self.ssm))
            stores = (store.get(i) for store in self.stores.values())
            return CachedLayer(conv, ssm, self.meta[i].meta, *stores, lengths, used, self.config.n_meta, positions)

        return [layer(plan) for plan in self.config.layers]


def fingerprint(config: HymbaConfig, weights: list[Tensor]) -> str:
    """Names a model by its config and a sample of its weights, so that a saved row is not continued by another one."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for x in weights:
        digest.update(str(x.dtype).encode() + x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
