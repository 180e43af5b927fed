"""What a terminal needs: a bar while a job runs, and text from a model that cannot command it."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

# all but tab and newline; a carriage return is harmless in front of a newline
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")
SECONDS_BETWEEN_LINES = 10


def printable(text: str) -> str:
    """`text` for stdout. A model may write anything: on a terminal, control characters are shown, not obeyed."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text) if sys.stdout.isatty() else text


def dim(text: str) -> str:
    """What is ours between texts, for stdout."""
    return click.style(text, dim=True) if sys.stdout.isatty() else text


def bold(text: str) -> str:
    """A heading, for stdout."""
    return click.style(text, bold=True) if sys.stdout.isatty() else text


class Job:
    """A long job, shown on stderr: a bar on a terminal, otherwise a plain line from time to time."""

    def __init__(self, title: str, total: int, unit: str, bar: Progress | None):
        self._title, self._total, self._unit, self._bar = title, total, unit, bar
        self._task: TaskID | None = bar and bar.add_task(title, total=total or None)
        self._done, self._spoke = 0, time.monotonic()

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        if self._bar:
            self._bar.update(self._task, completed=self._done)
        elif time.monotonic() - self._spoke > SECONDS_BETWEEN_LINES:
            self._spoke = time.monotonic()
            of = f" of {self._total}" if self._total else ""
            print(f"{self._title}: {self._done}{of} {self._unit}", file=sys.stderr, flush=True)

    def print(self, text: str) -> None:
        """A result, on stdout, above the bar."""
        if self._bar:
            self._bar.stop()
        print(text, flush=True)
        if self._bar:
            self._bar.start()


@contextmanager
def job(title: str, total: int, unit: str) -> Iterator[Job]:
    """Show a job of `total` units while it runs; 0: it is not known how many."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Job(title, total, unit, None)
        return
    count = "{task.completed} of {task.total} " if total else "{task.completed} "
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn(count + unit))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True, redirect_stdout=False) as bar:
        yield Job(title, total, unit, bar)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say on a terminal what takes its time; elsewhere nothing."""
    with Console(stderr=True).status(f"{what} ..."):
        yield
