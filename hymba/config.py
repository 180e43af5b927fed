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
# what a layer may mix tokens with: Hymba's hybrid heads, and each kind of head alone (docs/model.md)
MIXERS = ("hybrid", "attention", "mamba", "mamba2")
WITH_ATTENTION = ("hybrid", "attention")
FUSIONS = ("mean", "concat")


@dataclass(frozen=True)
class LayerPlan:
    """What one layer mixes tokens with, and what it does with keys and values."""

    index: int
    mixer: str
    window: int | None  # None: full attention
    producer: int | None  # the layer whose keys and values this one reads, itself perhaps; None: it has no attention
    spans_context: bool  # its keys and values are kept for the whole context, not for the window only
    d_value: int  # size of a value head; 0: it has no attention

    @property
    def attends(self) -> bool:
        """Whether it has attention heads."""
        return self.producer is not None

    @property
    def recurs(self) -> bool:
        """Whether it has Mamba heads."""
        return self.mixer != "attention"

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
    """Architecture of a hybrid-head model (paper, section 2 and table 9), or of what it is compared with (tables 1, 3).

    The defaults are Hymba-1.5B. Raises `UserError` when values do not fit together, or a choice has no effect; sizes of
    parts that a model does not have are not looked at.
    """

    vocab_size: int = 32001
    d_model: int = 1600
    n_layers: int = 32
    mixers: tuple[str, ...] = ("hybrid",)  # of the layers, over and over: hybrid, attention, mamba, mamba2
    fusion: str = "mean"  # of the two branches of a hybrid layer, each normed: mean or concat
    n_heads: int = 25  # query heads
    n_kv_heads: int = 5  # each serves n_heads / n_kv_heads query heads
    d_head: int | None = None  # size of a query or key head; None: d_model / n_heads
    d_ff: int = 5504  # hidden width of the MLP; 0: no layer has one
    mlp_activation: str = "silu"  # silu: gated (SwiGLU); relu2: squared ReLU without gate
    expand: int = 2  # inner width / model width
    d_state: int = 16  # SSM state per channel
    d_ssm_head: int = 64  # channels of a Mamba-2 head, which share their decay
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
        return self.d_model // self.n_heads if self.d_head is None else self.d_head

    @property
    def d_value(self) -> int:
        """Size of a value head of a hybrid layer: where heads fill the model width, as they do if `d_head` is None, the
        attention output is as wide as the Mamba output."""
        return self.expand * self.d_key

    @property
    def n_ssm_heads(self) -> int:
        """Heads of a Mamba-2 layer."""
        return self.d_inner // self.d_ssm_head

    @property
    def d_conv_inputs(self) -> int:
        """Channels of the convolution in a layer with Mamba heads: of Mamba-2, B and C pass through it too."""
        return self.d_inner + (2 * self.d_state if "mamba2" in self.mixers else 0)

    @property
    def is_hymba(self) -> bool:
        """Whether every layer is as in the released model: hybrid heads of full width, fused by mean, then an MLP."""
        full = self.d_head is None or self.n_heads * self.d_head == self.d_model
        return set(self.mixers) == {"hybrid"} and self.fusion == "mean" and full and self.d_ff > 0

    def mixer(self, layer: int) -> str:
        """What a layer mixes tokens with."""
        return self.mixers[layer % len(self.mixers)]

    @cached_property
    def layers(self) -> tuple[LayerPlan, ...]:
        """The plan of every layer."""
        producer = {layer: layer for layer in range(self.n_layers) if self._attends(layer)}
        producer |= {layer: group[0] for group in self.kv_groups for layer in group}
        whole = {made_by for layer, made_by in producer.items() if self._is_global(layer)}
        return tuple(
            LayerPlan(
                index=i,
                mixer=self.mixer(i),
                window=None if self._is_global(i) else self.window,
                producer=producer.get(i),
                spans_context=producer.get(i) in whole,
                d_value={"hybrid": self.d_value, "attention": self.d_key}.get(self.mixer(i), 0),
            )
            for i in range(self.n_layers)
        )

    def with_mixers(self, *mixers: str, **changes) -> "HymbaConfig":
        """This model with other layers. What was chosen about attention stays for the layers that have it."""
        repeated = (mixers * self.n_layers)[: self.n_layers]
        attend = {mixer: [i for i, x in enumerate(repeated) if x == mixer] for mixer in WITH_ATTENTION}
        groups = [tuple(i for i in group if i in layers) for group in self.kv_groups for layers in attend.values()]
        fitting = {
            "mixers": mixers,
            "fusion": self.fusion if "hybrid" in mixers else "mean",
            "global_layers": tuple(i for i in self.global_layers if any(i in layers for layers in attend.values())),
            "kv_groups": tuple(group for group in groups if len(group) > 1),
        }
        if not set(WITH_ATTENTION) & set(mixers):
            fitting |= {"rope": "none", "qk_norm": "none", "d_head": None}
        return replace(self, **(fitting | changes))

    def _attends(self, layer: int) -> bool:
        return self.mixer(layer) in WITH_ATTENTION

    def _is_global(self, layer: int) -> bool:
        return self.window is None or layer in self.global_layers

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "expand", "d_state", "d_ssm_head",
                     "d_conv", "dt_rank", "max_length"):  # fmt: skip
            limit = MAX_LAYERS if name == "n_layers" else MAX_SIZE
            if not 1 <= getattr(self, name) <= limit:
                raise UserError(f"{name}={brief(getattr(self, name))} must be from 1 to {limit}")
        if not 0 <= self.d_ff <= MAX_SIZE:
            raise UserError(f"d_ff={brief(self.d_ff)} must be from 0 (no MLP) to {MAX_SIZE}")
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
        _one_of("rope", self.rope, ROPE_TYPES)
        _one_of("qk_norm", self.qk_norm, QK_NORMS)
        _one_of("mlp_activation", self.mlp_activation, MLP_ACTIVATIONS)
        _one_of("fusion", self.fusion, FUSIONS)
        self._check_mixers()
        if any(map(self._attends, range(self.n_layers))):
            self._check_attention()
        else:
            for name, idle in (("rope", "none"), ("qk_norm", "none"), ("d_head", None)):
                value = getattr(self, name)
                if value != idle:
                    raise UserError(f"{name}={value!r} has no effect: no layer has attention; set {name}={idle!r}")
        for name in ("rope_theta", "norm_eps", "init_std"):
            if not 0 < getattr(self, name) < MAX_REAL:  # false for NaN, too
                raise UserError(f"{name}={brief(getattr(self, name))} must be above 0 and below {MAX_REAL:g}")
        if len(set(self.global_layers)) < len(self.global_layers):
            raise UserError(f"global_layers: {brief(list(self.global_layers))} names a layer twice")
        for layer in self.global_layers:
            self._check_attends("global_layers", layer)
        self._check_kv_groups()

    def _check_mixers(self) -> None:
        if not 1 <= len(self.mixers) <= self.n_layers:
            raise UserError(f"mixers={brief(self.mixers)} must name from 1 to n_layers={self.n_layers} mixers")
        for mixer in self.mixers:
            _one_of("mixers", mixer, MIXERS)
        if "mamba2" in self.mixers:
            if {"mamba", "hybrid"} & set(self.mixers):
                raise UserError(f"mixers={brief(self.mixers)}: a model has Mamba-1 heads or Mamba-2 heads, not both")
            if self.d_inner % self.d_ssm_head:
                raise UserError(
                    f"expand * d_model = {self.d_inner} is not divisible by d_ssm_head={self.d_ssm_head}, "
                    "the channels of a Mamba-2 head"
                )
        if self.fusion != "mean" and "hybrid" not in self.mixers:
            raise UserError(f"fusion={self.fusion!r} has no effect: no layer is hybrid; set fusion='mean'")
        if self.mlp_activation != "silu" and not self.d_ff:
            raise UserError(
                f"mlp_activation={self.mlp_activation!r} has no effect: d_ff=0 is no MLP; set mlp_activation='silu'"
            )

    def _check_attention(self) -> None:
        if self.d_head is None and self.d_model % self.n_heads:
            raise UserError(
                f"d_model={self.d_model} is not divisible by n_heads={self.n_heads}; choose d_head otherwise"
            )
        if not 1 <= self.d_key <= MAX_SIZE:
            raise UserError(f"d_head={brief(self.d_head)} must be from 1 to {MAX_SIZE}; None is d_model / n_heads")
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}")
        width = self.n_heads * self.d_key
        if "hybrid" in self.mixers and self.fusion == "mean" and self.d_model % width:
            raise UserError(
                f"fusion='mean' needs heads that fill d_model={self.d_model} or a whole part of it, not "
                f"n_heads * d_head = {width}; change them, or set fusion='concat'"
            )
        size = f"d_model / n_heads = {self.d_key}" if self.d_head is None else f"d_head={self.d_head}"
        if self.rope != "none" and self.d_key % 2:
            raise UserError(f"RoPE needs an even head size, not {size}")
        if self.rope in ("ntk", "dynamic_ntk"):
            if self.rope_original_length is None:
                raise UserError(f"rope={self.rope!r} needs rope_original_length, the context length before rescaling")
            if self.d_key < 4:
                raise UserError(f"rope={self.rope!r} needs heads of size 4 or more, not {size}")
        if self.rope == "ntk" and 2 * self.max_length <= self.rope_original_length:
            raise UserError(f"rope='ntk' needs max_length={self.max_length} above half of rope_original_length")

    def _check_attends(self, name: str, layer: int) -> None:
        if not 0 <= layer < self.n_layers:
            raise UserError(
                f"{name}: there is no layer {brief(layer)} in a model of {self.n_layers} layers "
                f"(0 to {self.n_layers - 1})"
            )
        if not self._attends(layer):
            raise UserError(f"{name}: layer {layer} has no attention (its mixer is {self.mixer(layer)}); leave it out")

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
                self._check_attends("kv_groups", layer)
                if self.mixer(layer) != self.mixer(group[0]):  # their values are not of one size
                    raise UserError(f"kv_groups: {brief(list(group))} has layers of different mixers")
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
        item = get_args(kind)[0]
        return "a tuple of " + ("tuples of int" if get_origin(item) is tuple else item.__name__)
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
