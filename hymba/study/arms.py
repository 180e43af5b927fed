"""The architectures of the study: rows of the paper's table 1, and what table 3 compares (arXiv 2411.13676).

An arm is a function from the config of Hymba to its own, written as one change to a neighbour. The study gives every
arm the same tokenizer, data, schedule and seeds, and `build` the same number of parameters, so that what is left to
differ is the architecture.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd

from hymba.config import HymbaConfig
from hymba.cost import parameters
from hymba.errors import UserError

TOLERANCE = 0.02  # of the number of parameters
FF_STEP = 8  # widths of an MLP are multiples of this
# the state of a Mamba-2 channel against that of Mamba: 128 and 16 are the defaults of their papers
MAMBA2_STATE = 8
# a model without an MLP may become by this share wider or narrower, if whole layers do not come close enough
WIDTH_RANGE = 0.5

Change = Callable[[HymbaConfig], HymbaConfig]


def nothing(c: HymbaConfig) -> HymbaConfig:
    return c


def no_meta_tokens(c: HymbaConfig) -> HymbaConfig:
    return replace(c, n_meta=0)


def concatenate(c: HymbaConfig) -> HymbaConfig:
    return replace(c, fusion="concat")


def own_kv(c: HymbaConfig) -> HymbaConfig:
    return replace(c, kv_groups=())


def all_local(c: HymbaConfig) -> HymbaConfig:
    return replace(c, global_layers=())


def all_global(c: HymbaConfig) -> HymbaConfig:
    return replace(c, window=None, global_layers=())


def one_key_head_each(c: HymbaConfig) -> HymbaConfig:
    return replace(c, n_kv_heads=c.n_heads)


def half_of_the_heads(c: HymbaConfig) -> HymbaConfig:
    """As wide as before, so that the attention output fills half of what it is averaged with, twice."""
    if c.n_heads % 2:
        raise UserError(f"n_heads={c.n_heads} cannot be halved; leave out the arms heads-half and heads-quarter")
    return replace(c, n_heads=c.n_heads // 2, n_kv_heads=c.n_kv_heads // 2, d_head=c.d_key)


def mamba_only(c: HymbaConfig) -> HymbaConfig:
    return c.with_mixers("mamba")


def attention_only(c: HymbaConfig) -> HymbaConfig:
    return c.with_mixers("attention")


def mamba2_for_mamba(c: HymbaConfig) -> HymbaConfig:
    return c.with_mixers("mamba2", d_state=MAMBA2_STATE * c.d_state)


def no_mlp(c: HymbaConfig) -> HymbaConfig:
    return replace(c, d_ff=0, mlp_activation="silu")


def mamba_and_attention_in_turn(c: HymbaConfig) -> HymbaConfig:
    return c.with_mixers("mamba", "attention")


@dataclass(frozen=True)
class Arm:
    """One architecture of the study."""

    name: str
    row: int | None  # of table 1
    neighbour: str | None  # the arm from which it differs by one change; None: it is what the study file describes
    change: Change
    text: str  # what the change is
    table_3: bool = False  # whether table 3 has it, too

    def config(self, hymba: HymbaConfig) -> HymbaConfig:
        """This arm in the sizes of a Hymba; parameters are not matched."""
        return self.change(ARMS[self.neighbour].config(hymba) if self.neighbour else hymba)


# in the order of table 1, then what only table 3 has
ARMS = {
    arm.name: arm
    for arm in (
        Arm("mamba", 1, "heads-all", mamba_only, "Mamba heads only"),
        Arm("heads-quarter", 2, "heads-half", half_of_the_heads, "half of the attention heads again"),
        Arm("heads-half", 3, "heads-all", half_of_the_heads, "half of the attention heads"),
        Arm("heads-all", 4, "gqa", one_key_head_each, "as many key heads as query heads"),
        Arm("gqa", 5, "local-global", all_global, "full attention in every layer"),
        Arm("attention", 6, "heads-all", attention_only, "attention heads only"),
        Arm("all-local", 7, "local-global", all_local, "sliding window in every layer"),
        Arm("local-global", 8, "shared-kv", own_kv, "keys and values of its own in every layer"),
        Arm("shared-kv", 9, "hymba", no_meta_tokens, "no meta tokens"),
        Arm("attention-compressed", 10, "shared-kv", attention_only, "attention heads only"),
        Arm("concat", 11, "shared-kv", concatenate, "branches concatenated instead of averaged"),
        Arm("mamba-meta", 12, "hymba", mamba_only, "Mamba heads only"),
        Arm("hymba", 13, None, nothing, "as the study file says", table_3=True),
        Arm("mamba2", None, "mamba2-ffn", no_mlp, "no MLP, more layers instead", table_3=True),
        Arm("mamba2-ffn", None, "mamba", mamba2_for_mamba, "Mamba-2 instead of Mamba", table_3=True),
        Arm("llama", None, "gqa", attention_only, "attention heads only", table_3=True),
        Arm("samba", None, "all-local", mamba_and_attention_in_turn, "layers of Mamba and attention in turn", True),
    )
}


@dataclass(frozen=True)
class Built:
    """An arm at the size of a study."""

    arm: Arm
    config: HymbaConfig
    parameters: int
    adjusted: str  # what was changed so that parameters match; empty: nothing

    @property
    def ratio(self) -> str:
        """Parameters of attention heads to those of Mamba heads, counted as table 1 seems to: of hybrid heads, the
        output projection with Mamba."""
        parts = parameters(self.config)
        attention, mamba = parts["attention projections"], parts["Mamba projections"]
        if not attention or not mamba:
            return "1:0" if attention else "0:1"
        return f"1:{(mamba + parts['Mamba conv, A, D, bias'] + parts['output projections']) / attention:.2f}"


def build(name: str, hymba: HymbaConfig) -> Built:
    """An arm with as many parameters as the Hymba that the study is about, within 2%.

    Raises `UserError` for an unknown arm, or one that cannot be matched in this size.
    """
    if name not in ARMS:
        raise UserError(f"unknown arm {name!r}; choose from {', '.join(ARMS)}")
    arm = ARMS[name]
    config, target = arm.config(hymba), _size(hymba)
    fitted = _fit_mlp(config, target) if config.d_ff else _fit_depth_and_width(config, target)
    if abs(_size(fitted) - target) > TOLERANCE * target:
        raise UserError(
            f"the arm {name} comes no closer than {_size(fitted):,} parameters to Hymba's {target:,}; "
            "leave it out, or change d_ff or n_layers in the study's [model]"
        )
    names = ("d_ff", "n_layers", "d_model")
    pairs = [(n, getattr(config, n), getattr(fitted, n)) for n in names]
    adjusted = ", ".join(f"{n} {old} -> {new}" for n, old, new in pairs if old != new)
    return Built(arm, fitted, _size(fitted), adjusted)


def _size(config: HymbaConfig) -> int:
    return sum(parameters(config).values())


def _fit_mlp(config: HymbaConfig, target: int) -> HymbaConfig:
    """The MLP takes what the heads give up, or the other way round."""
    slope = _size(replace(config, d_ff=config.d_ff + 1)) - _size(config)
    missing = round((target - _size(config)) / (FF_STEP * slope))
    return replace(config, d_ff=max(FF_STEP, config.d_ff + FF_STEP * missing)) if missing else config


def _fit_depth_and_width(config: HymbaConfig, target: int) -> HymbaConfig:
    """Without an MLP: more or fewer layers, and as little as possible wider or narrower."""
    step = config.d_ssm_head // gcd(config.d_ssm_head, config.expand)  # E is a multiple of the head
    steps = int(WIDTH_RANGE * config.d_model / step)
    found = []
    for i in range(-steps, steps + 1):
        wide = replace(config, d_model=config.d_model + i * step)
        layer = _size(replace(wide, n_layers=2)) - _size(replace(wide, n_layers=1))
        layers = max(1, wide.n_layers + round((target - _size(wide)) / layer))
        fitted = replace(wide, n_layers=layers)
        error = abs(_size(fitted) - target) / target
        found.append((error > TOLERANCE, abs(i), error, fitted))
    return min(found, key=lambda x: x[:3])[3]
