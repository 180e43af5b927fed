"""The results file: JSON lines, one a finished run, and one a measurement of speed.

A line is appended in one write and flushed, so a crash leaves it whole, absent, or cut off at the end of the file,
where it is not read and is mended by the next one. Of two lines on the same run the later one counts.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hymba.errors import UserError

Record = dict[str, Any]


class Run(NamedTuple):
    """One training run."""

    arm: str
    lr: float
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.arm}/lr-{self.lr:g}-seed-{self.seed}"


@dataclass(frozen=True)
class Results:
    """What a results file says."""

    study: Record  # of the first line: what all runs share
    runs: dict[Run, Record]
    speed: Record | None  # the latest measurement

    @property
    def objectives(self) -> dict[Run, float]:
        """The loss by which learning rates are chosen; infinite where training diverged."""
        return {run: float("inf") if "failed" in record else record["objective"] for run, record in self.runs.items()}


def append(path: Path, record: Record) -> None:
    """Add a line."""
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line  # what a crash cut off stays alone
        file.write(line)
        os.fsync(file.fileno())


def read(path: Path) -> Results:
    """Raises `UserError` if there is no such file, or if it holds no study."""
    records = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it with `hymba study run`") from None
    for line in lines:
        with suppress(ValueError):
            records.append(json.loads(line))
    records = [record for record in records if isinstance(record, dict) and "kind" in record]
    study = next((record for record in records if record["kind"] == "study"), None)
    if study is None:
        raise UserError(f"{path} is no results file of a study")
    speeds = [record for record in records if record["kind"] == "speed"]
    runs = {Run(r["arm"], r["lr"], r["seed"]): r for r in records if r["kind"] == "run"}
    return Results(study, runs, speeds[-1] if speeds else None)


def chosen_rates(arms: list[str], rates: list[float], seed: int, objectives: dict[Run, float]) -> dict[str, float]:
    """The learning rate of each arm whose grid is complete: that of the lowest loss on the first seed."""
    chosen = {}
    for arm in arms:
        grid = [Run(arm, lr, seed) for lr in rates]
        if all(run in objectives for run in grid):
            best = min(grid, key=objectives.__getitem__)
            if objectives[best] < float("inf"):
                chosen[arm] = best.lr
    return chosen


def recall(record: Record) -> float:
    """The mean over tasks of the share of right answers in all settings: what stands beside the paper's recall."""
    tasks = [sum(cell["accuracy"] for cell in cells) / len(cells) for cells in record["tasks"].values()]
    return sum(tasks) / len(tasks) if tasks else float("nan")
