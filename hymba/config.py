"""The architecture in the paper's words: one frozen dataclass, its presets, and the plan of each layer.

Files and names of Hugging Face checkpoints are the business of `convert.py`.
"""

import reprlib
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import get_args, get_origin

from hymba.errors import UserError

# beyond any model of this kind; a config that says more is broken, and must not make us allocate
MAX_LAYERS, MAX_SIZE = 512, 2**24
MAX_REAL = 1e30
ROPE_TYPES = ("none", "default", "ntk", "dynamic_ntk")
QK_NORMS = ("none", "rms", "perhead-rms")
MLP_ACTIVATIONS = ("silu", "relu2")


@dataclass(frozen=True)
class LayerPlan:
    """What one layer does with keys and values."""

    index: int
    window: int | None  # None: full attention
    producer: int  # the layer whose keys and values this one reads; its own index if it makes them
    spans_context: bool  # its keys and values are kept for the whole context, not for the window only

    @property
    def produces_kv(self) -> bool:
        return self.producer == self.index


def share_kv_in_pairs(n_layers: int, global_layers: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Groups of neighbouring local layers as in Hymba-1.5B: pairs, the first of an odd run being a group of three."""
    groups, run = [], []
    for layer in range(n_layers + 1):
        if layer < n_layers and layer not in global_layers:
            run.append(layer)
            continue
        first = 3 if len(run) % 2 else 2
        if len(run) >= 2:
            groups.append(tuple(run[:first]))
            groups += [tuple(run[i : i + 2]) for i in range(first, len(run), 2)]
        run = []
    return tuple(groups)


@dataclass(frozen=True)
class HymbaConfig:
    """Architecture of a hybrid-head model (paper, section 2 and table 9); the defaults are Hymba-1.5B.

    Raises `UserError` when values do not fit together.
    """

    vocab_size: int = 32001
    d_model: int = 1600
    n_layers: int = 32
    n_heads: int = 25  # query heads
    n_kv_heads: int = 5  # each serves n_heads / n_kv_heads query heads
    d_ff: int = 5504  # hidden width of the MLP
    mlp_activation: str = "silu"  # silu: gated (SwiGLU); relu2: squared ReLU without gate
    expand: int = 2  # inner width / model width
    d_state: int = 16  # SSM state per channel
    d_conv: int = 4  # kernel of the depthwise causal convolution
    dt_rank: int = 100
    n_meta: int = 128  # learnable tokens in front of every input
    window: int | None = 1024  # a local token sees itself and `window` tokens before it; None: all layers are global
    global_layers: tuple[int, ...] = (0, 15, 31)  # layers with full attention
    # layers that share keys and values; the first of a group makes them
    kv_groups: tuple[tuple[int, ...], ...] = share_kv_in_pairs(32, (0, 15, 31))
    rope: str = "ntk"
    rope_theta: float = 10000.0
    max_length: int = 8192  # context length
    rope_original_length: int | None = 2048  # context length before RoPE was rescaled (ntk, dynamic_ntk)
    qk_norm: str = "none"  # norm of queries and keys before RoPE
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    init_std: float = 0.02
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2

    @property
    def d_inner(self) -> int:
        """E, the width of the output of both branches."""
        return self.expand * self.d_model

    @property
    def d_key(self) -> int:
        """Size of a query or key head."""
        return self.d_model // self.n_heads

    @property
    def d_value(self) -> int:
        """Size of a value head: the attention output is as wide as the Mamba output."""
        return self.d_inner // self.n_heads

    @cached_property
    def layers(self) -> tuple[LayerPlan, ...]:
        """The plan of every layer."""
        producer = {layer: group[0] for group in self.kv_groups for layer in group}
        whole = {producer.get(layer, layer) for layer in range(self.n_layers) if self._is_global(layer)}
        return tuple(
            LayerPlan(
                index=i,
                window=None if self._is_global(i) else self.window,
                producer=producer.get(i, i),
                spans_context=producer.get(i, i) in whole,
            )
            for i in range(self.n_layers)
        )

    def _is_global(self, layer: int) -> bool:
        return self.window is None or layer in self.global_layers

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "expand", "d_state",
                     "d_conv", "dt_rank", "max_length"):  # fmt: skip
            limit = MAX_LAYERS if name == "n_layers" else MAX_SIZE
            if not 1 <= getattr(self, name) <= limit:
                raise UserError(f"{name}={brief(getattr(self, name))} must be from 1 to {limit}")
        if not 0 <= self.n_meta <= MAX_SIZE:
            raise UserError(f"n_meta={brief(self.n_meta)} must be from 0 (no meta tokens) to {MAX_SIZE}")
        if self.window is not None and not 1 <= self.window <= MAX_SIZE:
            raise UserError(
                f"window={brief(self.window)} must be from 1 to {MAX_SIZE}; None is full attention in every layer"
            )
        if self.rope_original_length is not None and not 1 <= self.rope_original_length <= MAX_SIZE:
            raise UserError(
                f"rope_original_length={brief(self.rope_original_length)} must be from 1 to {MAX_SIZE}, or None"
            )
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise UserError(f"{name}={brief(getattr(self, name))} is outside the vocabulary of {self.vocab_size}")
        if self.d_model % self.n_heads:
            raise UserError(f"d_model={self.d_model} is not divisible by n_heads={self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}")
        _one_of("rope", self.rope, ROPE_TYPES)
        _one_of("qk_norm", self.qk_norm, QK_NORMS)
        _one_of("mlp_activation", self.mlp_activation, MLP_ACTIVATIONS)
        if self.rope != "none" and self.d_key % 2:
            raise UserError(f"RoPE needs an even head size, but d_model / n_heads = {self.d_key}")
        if self.rope in ("ntk", "dynamic_ntk"):
            if self.rope_original_length is None:
                raise UserError(f"rope={self.rope!r} needs rope_original_length, the context length before rescaling")
            if self.d_key < 4:
                raise UserError(
                    f"rope={self.rope!r} needs heads of size 4 or more, but d_model / n_heads = {self.d_key}"
                )
        if self.rope == "ntk" and 2 * self.max_length <= self.rope_original_length:
            raise UserError(f"rope='ntk' needs max_length={self.max_length} above half of rope_original_length")
        for name in ("rope_theta", "norm_eps", "init_std"):
            if not 0 < getattr(self, name) < MAX_REAL:  # false for NaN, too
                raise UserError(f"{name}={brief(getattr(self, name))} must be above 0 and below {MAX_REAL:g}")
        if len(set(self.global_layers)) < len(self.global_layers):
            raise UserError(f"global_layers: {brief(list(self.global_layers))} names a layer twice")
        for layer in self.global_layers:
            _layer_exists("global_layers", layer, self.n_layers)
        self._check_kv_groups()

    def _check_types(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not _fits(value, field.type):
                raise UserError(f"{field.name}={brief(value)} must be {_spell(field.type)}")

    def _check_kv_groups(self) -> None:
        seen: set[int] = set()
        for group in self.kv_groups:
            if len(group) < 2 or list(group) != sorted(set(group)):
                raise UserError(f"kv_groups: {brief(list(group))} must name two or more layers in rising order")
            for layer in group:
                _layer_exists("kv_groups", layer, self.n_layers)
                if layer in seen:
                    raise UserError(f"kv_groups: layer {layer} is in two groups")
                seen.add(layer)

    @classmethod
    def preset(cls, name: str, **changes) -> "HymbaConfig":
        """The paper's family (`125M`, `350M`, `1.5B`; table 9) and small ones for tests (`tiny`, `mini`)."""
        if name not in PRESETS:
            raise UserError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
        return replace(PRESETS[name], **changes)


def _family(n_layers: int, d_model: int, **values) -> HymbaConfig:
    """A member of the paper's family: full attention in the first, the middle and the last layer."""
    global_layers = (0, n_layers // 2 - 1, n_layers - 1)
    defaults = {"dt_rank": -(-d_model // 16), "kv_groups": share_kv_in_pairs(n_layers, global_layers)}
    return HymbaConfig(n_layers=n_layers, d_model=d_model, global_layers=global_layers, **(defaults | values))


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name}={brief(value)} is not supported; choose from {', '.join(choices)}")


def _layer_exists(name: str, layer: int, n_layers: int) -> None:
    if not 0 <= layer < n_layers:
        raise UserError(
            f"{name}: there is no layer {brief(layer)} in a model of {n_layers} layers (0 to {n_layers - 1})"
        )


def brief(value) -> str:
    """`repr` for an error message: in one line and not too long, however large or deep the value is."""
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def _fits(value, kind) -> bool:
    """Whether a value has the annotated type; bool is no int, an int may stand for a float."""
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(kind)[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if get_args(kind):
        return any(_fits(value, choice) for choice in get_args(kind))
    return isinstance(value, kind)


def _spell(kind) -> str:
    if get_origin(kind) is tuple:
        return "a tuple of " + ("tuples of int" if get_origin(get_args(kind)[0]) is tuple else "int")
    return str(getattr(kind, "__name__", kind)).replace("NoneType", "None")


PRESETS = {
    "125M": _family(24, 512, n_heads=8, n_kv_heads=4, d_ff=1664),
    "350M": _family(32, 768, n_heads=12, n_kv_heads=4, d_ff=2432),
    "1.5B": _family(32, 1600),
    # for tests and demonstrations: every part of the architecture, a window that a short text crosses
    "tiny": _family(6, 64, n_heads=4, n_kv_heads=2, d_ff=160, d_state=8, vocab_size=256, n_meta=8, window=16,
                    max_length=512, rope_original_length=128),
    "mini": _family(8, 128, n_heads=8, n_kv_heads=2, d_ff=352, vocab_size=1024, n_meta=16, window=128,
                    max_length=2048, rope_original_length=512),
}  # fmt: skip
