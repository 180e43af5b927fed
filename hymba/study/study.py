"""A study file: which arms, on what text and tasks, with which recipe. Read from TOML; paths are relative to the file.

`[model]` is the config of the arm "hymba", from which the others follow. `[train]` is what `hymba train` reads, without
the parts that the study decides: model, data, seed and learning rate.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from hymba.config import HymbaConfig
from hymba.errors import UserError
from hymba.study.arms import ARMS, Built, build
from hymba.study.tasks import TASKS, Cell
from hymba.train import config as train_config
from hymba.train.config import TrainConfig
from hymba.train.data import Source

# what may change between two calls without making results of the same folder another study
EXTENDABLE = ("arms", "seeds", "learning_rates", "speed")


@dataclass(frozen=True)
class Text:
    """The text that is learned, and its held-out part: files, or a folder made by `hymba prepare`."""

    train: tuple[str, ...] = ()  # files, folders, globs
    validation: tuple[str, ...] = ()  # what is held out
    vocab_size: int = 1024  # of the tokenizer, learned from the training text
    prepared: str = ""  # a folder with both splits and a tokenizer, in the place of all this


@dataclass(frozen=True)
class TaskSettings:
    """How much of a task is trained, and what is tested."""

    share: float  # of the training tokens
    sizes: tuple[int, ...]  # pairs, entries, letters, or tokens of the haystack
    depths: tuple[float, ...] = ()  # of the needle, 0 to 1
    documents: int = 64  # tested in each setting

    @property
    def cells(self) -> list[Cell]:
        return [Cell(size, depth) for size in self.sizes for depth in self.depths or (None,)]


@dataclass(frozen=True)
class Speed:
    """How speed and memory are measured, for all arms side by side."""

    context: int = 1024  # tokens of the prompt, and in the cache when decoding begins
    batch: int = 1  # rows
    steps: int = 16  # tokens that are decoded in one go
    repeats: int = 5  # after one that warms up


@dataclass(frozen=True)
class Study:
    """A study. Raises `UserError` when its parts do not fit together."""

    model: HymbaConfig
    text: Text
    train: Mapping[str, Any]
    learning_rates: tuple[float, ...]  # tried for each arm on the first seed; the one with the lowest loss is used
    tasks: Mapping[str, TaskSettings] = field(default_factory=dict)
    cloze: Mapping[str, str] = field(default_factory=dict)  # files of questions, see `hymba.study.cloze`
    arms: tuple[str, ...] = tuple(ARMS)
    seeds: tuple[int, ...] = (0, 1, 2)
    speed: Speed = field(default_factory=Speed)

    def __post_init__(self) -> None:
        for name in ("arms", "seeds", "learning_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name} must name at least one, and none twice")
        for name in self.arms:
            self.build(name)
        for name in self.tasks:
            if name not in TASKS:
                raise UserError(f"unknown task {name!r}; choose from {', '.join(TASKS)}")
        shares = sum(settings.share for settings in self.tasks.values())
        if min((settings.share for settings in self.tasks.values()), default=1) <= 0 or shares >= 1:
            raise UserError(
                f"tasks: shares must be above 0, and below 1 in all: the rest is text; now it is {shares:g}"
            )
        if not self.text.prepared and not (self.text.train and self.text.validation):
            raise UserError("text needs train and validation, lists of files, or prepared, a folder")
        if self.speed.context + self.speed.steps > self.model.max_length:
            raise UserError(
                f"speed.context + speed.steps = {self.speed.context + self.speed.steps} tokens are beyond "
                f"model.max_length={self.model.max_length}; make context smaller"
            )
        for key in ("model", "seed", "checkpoint", "card"):
            if key in self.train:
                raise UserError(f"train.{key} is the study's to decide; leave it out")
        if "lr" in self.train.get("optimizer", {}):
            raise UserError("train.optimizer.lr is chosen from learning_rates; leave it out")
        self.training(self.build(self.arms[0]), self.learning_rates[0], self.seeds[0], [Source("data")])

    def build(self, arm: str) -> Built:
        return build(arm, self.model)

    def training(self, built: Built, lr: float, seed: int, sources: list[Source], device: str = "auto") -> TrainConfig:
        """What the trainer is told: the same for all arms, but for the model."""
        table = dict(self.train)
        stages = table.get("stages") or []
        if not isinstance(stages, list) or any("sources" in stage for stage in stages):
            raise UserError("train.stages must be tables without sources: the study's text and tasks are what is read")
        data = [{"path": source.path, "weight": source.weight} for source in sources]
        table["stages"] = [{**stage, "sources": data} for stage in stages]
        table["optimizer"] = {**table.get("optimizer", {}), "lr": lr}
        table["run"] = {**table.get("run", {}), "device": device}
        # the arm's config is put in its place below; this one has what the other settings are checked against
        table["model"] = {"vocab_size": self.model.vocab_size, "max_length": self.model.max_length, "rope": "none"}
        return replace(train_config.from_table({**table, "seed": seed}), model=built.config)

    @property
    def tokens(self) -> int:
        """Tokens that a run trains on."""
        return sum(int(stage["tokens"]) for stage in self.train["stages"])

    @property
    def length(self) -> int:
        """Tokens in the longest row that is trained on."""
        return max(int(stage["length"]) for stage in self.train["stages"])

    def fingerprint(self) -> str:
        """Changes with anything that makes results incomparable."""
        parts = {name: part for name, part in asdict(self).items() if name not in EXTENDABLE}
        if not self.cloze:
            del parts["cloze"]
        parts["first seed"] = self.seeds[0]
        return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def load(path: str | Path) -> Study:
    """Read a study file. Raises `UserError` for one that cannot be read, and for keys and values that make no sense."""
    path = Path(path)
    table = train_config.read_toml(path)
    text = table.get("text", {})
    if isinstance(text, dict):
        for name in ("train", "validation"):
            if isinstance(text.get(name), list):
                text[name] = [str(path.parent / str(file)) for file in text[name]]
        if text.get("prepared"):
            text["prepared"] = str(path.parent / str(text["prepared"]))
    apart = ("tasks", "cloze", "train", "model")
    tasks, cloze, train, model = (table.pop(name, {}) for name in apart)
    for name, value in zip(apart, (tasks, cloze, train, model), strict=True):
        if not isinstance(value, dict):
            raise UserError(f"{name} must be a table: [{name}]")
    values = train_config.read_values(Study, table, "", without=apart)
    cloze = {name: str(path.parent / str(file)) for name, file in cloze.items()}
    settings = {
        name: TaskSettings(**train_config.read_values(TaskSettings, t, f"tasks.{name}.")) for name, t in tasks.items()
    }
    if not values["text"].prepared:
        model = {"vocab_size": values["text"].vocab_size, **model}
    config, checkpoint = train_config.read_model(model, ())
    if checkpoint:
        raise UserError("model.from is of no use here: all arms begin with fresh weights; write out its sizes")
    return Study(model=config, train=train, tasks=settings, cloze=cloze, **values)
