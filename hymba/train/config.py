"""What a training run is: frozen dataclasses, read from TOML with `--key value` on top, written back as resolved.

The comment behind a field is its help text. Everything but `[run]` and `[card]` decides what is trained; those two say
how and where, and may change between the parts of an interrupted run.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from hymba.config import HymbaConfig, brief
from hymba.convert import load_config, resolve
from hymba.errors import UserError
from hymba.files import atomic_write
from hymba.tokenizer import Tokenizer
from hymba.train.data import Source

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OPTIMIZERS = ("adamw", "muon")
PRECISIONS = ("float32", "bfloat16")
PARALLEL = ("ddp", "fsdp")
CHANGEABLE = ("run", "card")  # sections that may differ when a run is continued


@dataclass(frozen=True)
class Stage:
    """A part of the schedule with its own data, row length and learning rates (paper: general, annealing, context)."""

    sources: tuple[Source, ...]  # folders made by `hymba prepare`: "path", or {path = "...", weight = 2.0}
    tokens: int  # tokens to train on in this stage
    length: int  # tokens in a row
    name: str = "general"  # for the reports
    lr_start: float = 1.0  # learning rate when the stage begins, as a share of the optimiser's
    lr_end: float = 1.0  # learning rate when the stage ends; between them it moves in a straight line


@dataclass(frozen=True)
class Optimizer:
    """AdamW, or Muon for the matrices of the blocks and AdamW for the rest."""

    name: str = "adamw"  # adamw, or muon: matrices of the blocks by Muon, the rest by AdamW
    lr: float = 1e-3  # peak learning rate
    muon_lr: float | None = None  # peak learning rate of Muon, scaled to match AdamW's update size; none: lr
    beta1: float = 0.9  # decay of AdamW's mean of gradients
    beta2: float = 0.95  # decay of AdamW's mean of squares
    eps: float = 1e-8  # added to AdamW's denominator
    momentum: float = 0.95  # of Muon
    weight_decay: float = 0.1  # of matrices and embeddings; norms, biases, A_log, D, meta tokens have none
    clip: float = 1.0  # largest norm of the gradient; 0: no limit


@dataclass(frozen=True)
class Validation:
    """When and on what the loss is measured."""

    sources: tuple[str, ...] = ()  # prepared folders; none: every source of every stage that has a validation split
    every: int = 100  # steps between two measurements; there is always one at the end
    length: int = 0  # tokens in a row; 0: as in the last stage
    stride: int = 0  # tokens by which a row moves on: what it shares with the row before is context; 0: half a row


@dataclass(frozen=True)
class Samples:
    """Texts that are written during training."""

    prompts: tuple[str, ...] = ()  # beginnings of texts
    every: int = 500  # steps between two samples; there are always some at the end
    max_tokens: int = 64  # length of a sample
    temperature: float = 0.8  # of the samples


@dataclass(frozen=True)
class Run:
    """How and where; changes nothing about what is learned, beyond the order of sums."""

    device: str = "auto"  # cpu, cuda; auto: the GPU if any
    parallel: str = "ddp"  # under torchrun: ddp (a copy of the model in each process) or fsdp (sharded)
    micro_tokens: int = 16384  # tokens of one forward pass; a batch is accumulated from these
    checkpoint_blocks: bool = False  # compute activations again in the backward pass instead of keeping them
    compile: bool = False  # torch.compile every block
    graph: bool = False  # on a GPU: forward and backward pass as one CUDA graph, which waits less for Python
    log_every: int = 10  # steps between two reports
    save_every: int = 100  # steps between two checkpoints
    keep: int = 2  # checkpoints that are kept
    loss_jump: float = 3.0  # stop if a step's loss is this many nats above the recent mean
    tensorboard: bool = False  # write TensorBoard events into the run folder
    wandb: str = ""  # report to this project of Weights & Biases
    trackio: str = ""  # report to this project of Trackio


@dataclass(frozen=True)
class Card:
    """What only a person can say in the model card."""

    name: str = ""  # of the model; empty: the run folder's
    language: str = "en"  # code of the language of the texts
    license: str = ""  # of the weights, as the Hugging Face hub spells it
    data: str = ""  # where the texts are from, and under which licence
    intended_use: str = ""  # what the model is for
    notes: str = ""  # anything else a reader should know


@dataclass(frozen=True)
class TrainConfig:
    """A whole run. Raises `UserError` when values do not fit together."""

    model: HymbaConfig
    stages: tuple[Stage, ...]
    checkpoint: str = ""  # weights that training starts from, in [model] as `from`; empty: fresh ones
    seed: int = 0  # of the weights, the order of the data and dropout
    batch_tokens: int = 32768  # tokens of one step, in all processes together
    warmup_tokens: int = 0  # tokens in which the learning rate rises from 0
    precision: str = "float32"  # of the products: float32 or bfloat16 (weights and sums are always float32)
    dropout: float = 0.0  # share of embeddings and of branch outputs that is dropped in training
    ema: float = 0.0  # decay of the weights' moving average, which is then what is evaluated and kept; 0: none
    optimizer: Optimizer = field(default_factory=Optimizer)
    validation: Validation = field(default_factory=Validation)
    samples: Samples = field(default_factory=Samples)
    run: Run = field(default_factory=Run)
    card: Card = field(default_factory=Card)

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError("there is no stage to train; write at least one [[stages]] with sources, tokens and length")
        for i, stage in enumerate(self.stages):
            where = f"stages.{i}"
            _require(stage.sources, f"{where}.sources", "must name at least one prepared folder")
            _require(stage.tokens >= 1, f"{where}.tokens={stage.tokens}", "must be at least 1")
            _require(stage.length >= 2, f"{where}.length={stage.length}", "must be at least 2")
            _require(
                stage.length <= self.model.max_length,
                f"{where}.length={stage.length}",
                f"is beyond model.max_length={self.model.max_length}",
            )
            _require(
                stage.length <= self.batch_tokens,
                f"{where}.length={stage.length}",
                f"is beyond batch_tokens={self.batch_tokens}",
            )
            _require(min(stage.lr_start, stage.lr_end) >= 0, f"{where}.lr_start and lr_end", "must not be negative")
            for source in stage.sources:
                _require(source.weight > 0, f"{where}.sources: weight={source.weight}", "must be above 0")
        o, r = self.optimizer, self.run
        _one_of("optimizer.name", o.name, OPTIMIZERS)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("run.parallel", r.parallel, PARALLEL)
        for name in ("lr", "muon_lr", "eps", "weight_decay", "clip"):
            value = getattr(o, name)
            _require(value is None or 0 <= value < math.inf, f"optimizer.{name}={value}", "must be 0 or above")
        shares = {"dropout": self.dropout, "ema": self.ema, "optimizer.beta1": o.beta1, "optimizer.beta2": o.beta2}
        for name, value in (shares | {"optimizer.momentum": o.momentum}).items():
            _require(0 <= value < 1, f"{name}={value}", "must be from 0 to below 1")
        counts = {"validation.every": self.validation.every, "samples.every": self.samples.every}
        counts |= {"samples.max_tokens": self.samples.max_tokens}
        counts |= {f"run.{name}": getattr(r, name) for name in ("micro_tokens", "log_every", "save_every", "keep")}
        for name, value in counts.items():
            _require(value >= 1, f"{name}={value}", "must be at least 1")
        _require(self.warmup_tokens >= 0, f"warmup_tokens={self.warmup_tokens}", "must not be negative")
        _require(self.samples.temperature >= 0, f"samples.temperature={self.samples.temperature}", "is negative")
        _require(r.loss_jump > 0, f"run.loss_jump={r.loss_jump}", "must be above 0")
        _require(0 <= self.seed < 2**31, f"seed={self.seed}", "must be from 0 to below 2^31")

    @property
    def sources(self) -> list[str]:
        """Every prepared folder that the stages name, once."""
        return list(dict.fromkeys(source.path for stage in self.stages for source in stage.sources))


def _require(good: Any, name: str, problem: str) -> None:
    if not good:
        raise UserError(f"{name} {problem}")


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    _require(value in choices, f"{name}={brief(value)}", f"is not supported; choose from {', '.join(choices)}")


# ----------------------------------------------------------------------------------------------------------------- TOML


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises `UserError` if it cannot be read."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None


def load(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> TrainConfig:
    """Read a TOML file; `overrides` are (dotted key, value) pairs that win over it.

    Raises `UserError` for a file that cannot be read, and for keys and values that make no sense.
    """
    table = read_toml(path)
    for key, value in overrides:
        _override(table, key, value)
    return from_table(table)


def from_table(table: Mapping[str, Any]) -> TrainConfig:
    """A config from nested tables as TOML has them. Raises `UserError` that names the key."""
    table = dict(table)
    model = table.pop("model", {})
    if not isinstance(model, dict):
        raise UserError("model must be a table: [model]")
    values = read_values(TrainConfig, table, "", without=("model", "checkpoint"))
    config, checkpoint = read_model(dict(model), values["stages"])
    return TrainConfig(model=config, checkpoint=checkpoint, **values)


def read_model(table: dict[str, Any], stages: tuple[Stage, ...]) -> tuple[HymbaConfig, str]:
    """[model]: a preset or a checkpoint, with changes; without either the paper's rules fill what is left out."""
    preset, checkpoint = table.pop("preset", None), table.pop("from", "")
    changes = read_values(HymbaConfig, table, "model.")
    if preset is not None and checkpoint:
        raise UserError("model.preset and model.from exclude each other: a checkpoint has its own sizes")
    if checkpoint:
        return replace(load_config(resolve(checkpoint))[0], **changes), str(checkpoint)
    if "vocab_size" not in changes and stages and stages[0].sources:
        tokenizer = Tokenizer.from_pretrained(stages[0].sources[0].path)
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        known = {name: id for name, id in special.items() if id is not None}
        changes = {"vocab_size": tokenizer.vocab_size, **known, **changes}
    if preset is not None:
        return HymbaConfig.preset(preset, **changes), ""
    return HymbaConfig(**changes), ""


def read_values(cls: type, table: Any, where: str, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Check a table's keys and types against the fields of a dataclass."""
    if not isinstance(table, dict):
        raise UserError(f"{where.rstrip('.')} must be a table of {', '.join(f.name for f in fields(cls))}")
    known = {f.name: f for f in fields(cls) if f.name not in without}
    for key in table:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            hint = f"did you mean {where}{close[0]}?" if close else f"choose from {', '.join(known)}"
            raise UserError(f"unknown key {where}{key}; {hint}")
    values = {key: _value(known[key].type, value, where + key) for key, value in table.items()}
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING and name not in without:
            raise UserError(f"{where}{name} is missing and has no default")
    return values


def _value(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, UnionType):
        if value == "none":
            return None
        kind = next(choice for choice in get_args(kind) if choice is not type(None))
    if is_dataclass(kind):
        if kind is Source and isinstance(value, str):
            value = {"path": value}
        return kind(**read_values(kind, value, where + "."))
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}={brief(value)} must be a list")
        return tuple(_value(get_args(kind)[0], item, f"{where}.{i}") for i, item in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():  # 2e6 tokens
        return int(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise UserError(f"{where}={brief(value)} must be {kind.__name__}")
    return value


def _override(table: dict[str, Any], key: str, value: str) -> None:
    """Set a dotted key; the value is read as TOML, and as text where it is none."""
    *path, last = key.split(".")
    place: Any = table
    for part in path:
        place = place.setdefault(part, {}) if isinstance(place, dict) else _item(place, part, key)
    try:
        parsed = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = value
    if isinstance(place, dict):
        place[last] = parsed
    else:
        _item(place, last, key)
        place[int(last)] = parsed


def _item(items: Any, part: str, key: str) -> Any:
    if not isinstance(items, list) or not part.isdigit() or int(part) >= len(items):
        raise UserError(f"unknown key --{key}; {part} is not there")
    return items[int(part)]


def as_table(config: TrainConfig) -> dict[str, Any]:
    """The tables from which `from_table` makes the same config."""
    table = {f.name: _plain(getattr(config, f.name)) for f in fields(config) if f.name not in ("model", "checkpoint")}
    model = {f.name: _plain(getattr(config.model, f.name)) for f in fields(config.model)}
    return {**table, "model": model | ({"from": config.checkpoint} if config.checkpoint else {})}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return "none" if value is None else value


def save(config: TrainConfig, path: Path) -> None:
    """Write the config as TOML, every key spelled out."""
    table = as_table(config)
    lines = [f"{key} = {_toml(value)}" for key, value in table.items() if not _is_section(value)]
    for key, value in table.items():
        for part in value if isinstance(value, list) else [value]:
            if _is_section(value):
                header = f"[[{key}]]" if isinstance(value, list) else f"[{key}]"
                lines += ["", header, *(f"{name} = {_toml(x)}" for name, x in part.items())]
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _is_section(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value).lower() if isinstance(value, bool) else repr(value)


def difference(old: TrainConfig, new: TrainConfig) -> str | None:
    """The first setting that differs, as `key = old, now new`; sections that may change are left out."""
    return _difference(_comparable(old), _comparable(new), "")


def _comparable(config: TrainConfig) -> dict[str, Any]:
    return {key: value for key, value in as_table(config).items() if key not in CHANGEABLE}


def _difference(old: Any, new: Any, key: str) -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(f"{key}.{name}".lstrip("."), old.get(name), new.get(name)) for name in [*old, *(set(new) - set(old))]]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{key}.{i}", a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return None if old == new else f"{key} = {brief(old)}, now {brief(new)}"
    return next((found for name, a, b in pairs if (found := _difference(a, b, name))), None)
