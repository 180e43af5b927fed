"""What a study found, computed from its results: each arm's numbers over seeds, and the paper's contrasts in them."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hymba.study.arms import ARMS
from hymba.study.paper import TABLE_1
from hymba.study.results import Record, Results, recall

# two-sided 95% quantiles of Student's t, by degrees of freedom; beyond them that of 10 is used, which is stricter
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23}
PER_BYTE = ", per byte"  # of a cloze task: by cost a byte instead of cost


class Spread(NamedTuple):
    """A number over seeds."""

    mean: float
    deviation: float | None  # sample standard deviation; None: there is one seed
    seeds: int


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Summary:
    """An arm at its chosen learning rate."""

    arm: str
    lr: float
    records: dict[int, Record]  # by seed
    speed: Record | None  # its part of the latest measurement

    def by_seed(self, measure: str) -> dict[int, float]:
        """bits_per_byte, recall, a task: the mean of its settings, or `cloze NAME` and `cloze NAME, per byte`."""
        return {seed: _value(record, measure) for seed, record in self.records.items()}

    def spread(self, measure: str) -> Spread:
        return spread(list(self.by_seed(measure).values()))

    @property
    def parameters(self) -> int:
        return next(iter(self.records.values()))["parameters"]

    @property
    def ratio(self) -> str:
        """Parameters of the attention heads to those of the Mamba heads, each with its projections."""
        return next(iter(self.records.values()))["ratio"]

    @property
    def tasks(self) -> list[str]:
        return list(next(iter(self.records.values()))["tasks"])

    @property
    def cloze(self) -> list[str]:
        """Measures of cloze tasks, see `by_seed`."""
        names = next(iter(self.records.values())).get("cloze", {})
        return [f"cloze {name}{way}" for name in names for way in ("", PER_BYTE)]

    def cells(self, task: str) -> list[Record]:
        """The settings of a task, with the accuracy of each seed."""
        lists = [record["tasks"][task] for record in self.records.values()]
        return [{**cells[0], "accuracy": [cell["accuracy"] for cell in cells]} for cells in zip(*lists, strict=True)]


def _value(record: Record, measure: str) -> float:
    if measure == "bits_per_byte":
        return record["bits_per_byte"]
    if measure == "recall":
        return recall(record)
    if measure.startswith("cloze "):
        name = measure.removeprefix("cloze ").removesuffix(PER_BYTE)
        return record["cloze"][name]["accuracy_per_byte" if measure.endswith(PER_BYTE) else "accuracy"]
    return statistics.fmean(cell["accuracy"] for cell in record["tasks"][measure])


def summaries(results: Results) -> list[Summary]:
    """The arms that have results, in the order of the tables."""
    first, found = results.study["first_seed"], []
    for arm in ARMS:
        done = {run: record for run, record in results.runs.items() if run.arm == arm and "failed" not in record}
        grid = {run.lr: record["objective"] for run, record in done.items() if run.seed == first}
        if grid:
            lr = min(grid, key=grid.__getitem__)
            records = {run.seed: record for run, record in sorted(done.items()) if run.lr == lr}
            found.append(Summary(arm, lr, records, results.speed and results.speed["arms"].get(arm)))
    return found


@dataclass(frozen=True)
class Contrast:
    """A finding of the paper: one arm against another in one respect."""

    text: str
    arm: str
    other: str
    measure: str  # general, recall, speed, cache


CONTRASTS = (
    Contrast("Attention heads beside Mamba heads raise recall", "heads-all", "mamba", "recall"),
    Contrast("... and general quality", "heads-all", "mamba", "general"),
    Contrast("... but need more cache", "heads-all", "mamba", "cache"),
    Contrast("A quarter of the attention heads already raises recall", "heads-quarter", "mamba", "recall"),
    Contrast("Twice as many raise it further", "heads-half", "heads-quarter", "recall"),
    Contrast("... and twice as many again", "heads-all", "heads-half", "recall"),
    Contrast("Hybrid heads recall more than attention alone", "heads-all", "attention", "recall"),
    Contrast("... are better in general", "heads-all", "attention", "general"),
    Contrast("... also with grouped queries", "gqa", "attention", "recall"),
    Contrast("Sliding windows in all layers cost recall", "all-local", "gqa", "recall"),
    Contrast("... save cache", "all-local", "gqa", "cache"),
    Contrast("... and decode faster", "all-local", "gqa", "speed"),
    Contrast("Three full layers bring recall back", "local-global", "all-local", "recall"),
    Contrast("Sharing keys and values between layers saves cache", "shared-kv", "local-global", "cache"),
    Contrast("... at little or no cost in recall", "shared-kv", "local-global", "recall"),
    Contrast("... and in general quality", "shared-kv", "local-global", "general"),
    Contrast("The same compression costs attention alone its recall", "attention-compressed", "attention", "recall"),
    Contrast("... which the hybrid keeps", "shared-kv", "attention-compressed", "recall"),
    Contrast("Averaging the branches is as good as concatenating them", "shared-kv", "concat", "general"),
    Contrast("... in recall, too", "shared-kv", "concat", "recall"),
    Contrast("... and faster", "shared-kv", "concat", "speed"),
    Contrast("Meta tokens help Mamba in general", "mamba-meta", "mamba", "general"),
    Contrast("... not in recall", "mamba-meta", "mamba", "recall"),
    Contrast("Meta tokens help Hymba in general", "hymba", "shared-kv", "general"),
    Contrast("... and in recall", "hymba", "shared-kv", "recall"),
    Contrast("Hymba is better than attention in general", "hymba", "attention", "general"),
    Contrast("... in recall", "hymba", "attention", "recall"),
    Contrast("... in speed", "hymba", "attention", "speed"),
    Contrast("... in cache", "hymba", "attention", "cache"),
    Contrast("Hymba recalls more than Mamba alone", "hymba", "mamba", "recall"),
    # table 3, whose numbers are not repeated here
    Contrast("Hymba is better than Samba in general", "hymba", "samba", "general"),
    Contrast("... in recall", "hymba", "samba", "recall"),
    Contrast("Hymba is better than Llama 3's layers in general", "hymba", "llama", "general"),
    Contrast("... in recall", "hymba", "llama", "recall"),
    Contrast("Hymba is better than Mamba-2 with an MLP in general", "hymba", "mamba2-ffn", "general"),
    Contrast("... in recall", "hymba", "mamba2-ffn", "recall"),
    Contrast("... and without", "hymba", "mamba2", "recall"),
)


class Verdict(NamedTuple):
    """A contrast in the paper and here. Differences are those of the arm minus the other's, or ratios to the other's
    for speed and cache; for general quality ours are in bits per byte, of which less is better."""

    contrast: Contrast
    paper: float | None
    ours: float
    half_width: float | None  # of the 95% interval of the mean over seeds, paired; None: not over seeds
    reading: str


def judge(found: Sequence[Summary]) -> list[Verdict]:
    """All contrasts whose two arms have results."""
    by_name = {summary.arm: summary for summary in found}
    verdicts = []
    for contrast in CONTRASTS:
        if contrast.arm in by_name and contrast.other in by_name:
            arm, other = by_name[contrast.arm], by_name[contrast.other]
            if contrast.measure in ("general", "recall"):
                verdicts.append(_over_seeds(contrast, arm, other))
            elif arm.speed and other.speed:
                verdicts.append(_ratio(contrast, arm.speed, other.speed))
    return verdicts


def _over_seeds(contrast: Contrast, arm: Summary, other: Summary) -> Verdict:
    measure = "recall" if contrast.measure == "recall" else "bits_per_byte"
    a, b = arm.by_seed(measure), other.by_seed(measure)
    mean, deviation, n = spread([a[seed] - b[seed] for seed in a.keys() & b.keys()])
    half = None if deviation is None else STUDENT[min(n - 1, 10)] * deviation / math.sqrt(n)
    paper = _paper(contrast, lambda one, two: one - two)
    better = mean if measure == "recall" else -mean
    if half is None:
        return Verdict(contrast, paper, mean, None, "one seed: no spread, no verdict")
    if abs(mean) <= half:
        return Verdict(contrast, paper, mean, half, "no clear difference")
    return Verdict(contrast, paper, mean, half, _direction(better, 1.0 if paper is None else paper))


def _ratio(contrast: Contrast, arm: Record, other: Record) -> Verdict:
    paper = _paper(contrast, lambda one, two: one / two)
    if contrast.measure == "cache":
        ratio = arm["cache_bytes"] / other["cache_bytes"]
    else:
        ratio = arm["decode"]["median"] / other["decode"]["median"]
        if (
            arm["decode"]["slowest"] <= other["decode"]["fastest"]
            and other["decode"]["slowest"] <= arm["decode"]["fastest"]
        ):
            return Verdict(contrast, paper, ratio, None, "no clear difference")
    return Verdict(contrast, paper, ratio, None, _direction(math.log(ratio), math.log(paper)))


def _direction(ours: float, papers: float) -> str:
    return "as in the paper" if ours * papers > 0 else "the other way round"


def _paper(contrast: Contrast, compare) -> float | None:
    rows = [TABLE_1.get(ARMS[name].row) for name in (contrast.arm, contrast.other)]
    if None in rows:
        return None
    names = {"speed": "tokens_per_second", "cache": "cache_mb"}
    return compare(*(getattr(row, names.get(contrast.measure, contrast.measure)) for row in rows))
