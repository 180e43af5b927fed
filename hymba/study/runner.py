"""All runs of a study: arms, each at several learning rates on the first seed, then at its best one on the others.

What is left to do follows from the study and the results file alone, so a study that was stopped anywhere goes on when
the same command is given again: finished runs are not repeated, an interrupted one goes on from its last checkpoint.

Runs are worked off by processes of their own, several side by side if that is asked for; this process only writes down
what they return. Under `torchrun` all processes train every run together instead.
"""

import fcntl
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hymba import Hymba, __version__
from hymba.errors import UserError
from hymba.study import cloze, data, evaluate, results, speed
from hymba.study.results import Record, Results, Run
from hymba.study.study import Study
from hymba.tokenizer import Tokenizer
from hymba.train import train
from hymba.train.data import Source
from hymba.train.parallel import backend
from hymba.train.report import LOG, read_log
from hymba.train.schedule import Schedule
from hymba.train.trainer import FINAL

RESULTS = "results.jsonl"
OUTPUT = "output.log"  # in a run's folder: what the trainer said
CURVE = 200  # points that are kept of a loss curve
POLL = 2.0  # seconds between two looks at runs in progress

_gpu: int | None = None  # of this process, where several share the runs


# called after each run with its record, the number of finished runs, that of all, and how to print
Finished = Callable[[Record, int, int, Callable[[str], object]], object]


@dataclass(frozen=True)
class Order:
    """What a process needs to do a run."""

    study: Study
    run: Run
    folder: Path  # of the study
    sources: tuple[Source, ...]
    device: str
    threads: int | None = None  # None: as many as there are


class Interrupted(Exception):
    """A signal ended a run; all is saved."""


class Runner:
    """A study in its folder."""

    def __init__(self, study: Study, folder: Path, arms: Sequence[str], seeds: Sequence[int], device: str):
        """arms, seeds: which of the study's. Raises `UserError` for others, or if the folder is another study's."""
        for what, asked, known in (("arm", arms, study.arms), ("seed", seeds, study.seeds)):
            for x in asked:
                if x not in known:
                    raise UserError(f"the study has no {what} {x}; choose from {', '.join(map(str, known))}")
        self.study, self.folder, self.device = study, folder, device
        # the first seed, on which learning rates are chosen, is always among them
        self.arms = [arm for arm in study.arms if arm in arms]
        self.seeds = [seed for seed in study.seeds if seed in seeds or seed == study.seeds[0]]
        self.path = folder / RESULTS

    @property
    def results(self) -> Results:
        return results.read(self.path)

    @property
    def total(self) -> int:
        """Runs in all, finished ones included."""
        return len(self.arms) * (len(self.study.learning_rates) + len(self.seeds) - 1)

    @property
    def done(self) -> int:
        """Runs that have finished."""
        return sum(run.arm in self.arms and run.seed in self.seeds for run in self.results.runs)

    @property
    def steps(self) -> int:
        """Steps of one run."""
        built = self.study.build(self.arms[0])
        return len(Schedule(self.study.training(built, self.study.learning_rates[0], 0, [Source("")])))

    def begin(self) -> None:
        """Write the first line of the results, or see that they are of this study. Raises `UserError` also for cloze
        questions that cannot be read, before anything is trained."""
        for path in self.study.cloze.values():
            cloze.read(path)
        if self.path.exists():
            if self.results.study["fingerprint"] != self.study.fingerprint():
                raise UserError(f"{self.path} has results of another study; name another folder with --output")
            return
        hymba = self.study.build("hymba")
        first = {
            "kind": "study",
            "fingerprint": self.study.fingerprint(),
            "hymba": __version__,
            "tokens": self.study.tokens,
            "length": self.study.length,
            "parameters": hymba.parameters,
            "first_seed": self.study.seeds[0],
            "model": asdict(self.study.model),
            "shares": {name: settings.share for name, settings in self.study.tasks.items()},
        }
        results.append(self.path, first)

    def pending(self) -> list[Run]:
        """Runs that can be done now, arm by arm."""
        s, done = self.study, self.results.objectives
        chosen = results.chosen_rates(self.arms, s.learning_rates, s.seeds[0], done)
        runs = []
        for arm in self.arms:
            runs += [Run(arm, lr, s.seeds[0]) for lr in s.learning_rates]
            runs += [Run(arm, chosen[arm], seed) for seed in self.seeds[1:] if arm in chosen]
        return [run for run in runs if run not in done]

    def run(self, jobs: int, job: Callable[[str, int, str], Any], finished: Finished) -> None:
        """Do all runs.

        jobs: side by side; job: shows progress, as `hymba.cli.terminal.job` does
        Raises `Interrupted` if a signal ended a run.
        """
        sources = tuple(data.make(self.study, self.folder / "data", job).sources)
        order = lambda run: Order(  # noqa: E731
            self.study, run, self.folder, sources, self.device, max(1, torch.get_num_threads() // jobs)
        )
        with job("training", self.total * self.steps, "steps") as bar, _pool(jobs) as pool:
            bar.advance(self.done * self.steps)
            running: dict[Future, Run] = {}
            seen: dict[Run, int] = {}  # steps that are shown
            while True:
                for run in self.pending():
                    if len(running) < jobs and run not in running.values():
                        running[pool.submit(work, order(run))] = run
                        seen[run] = 0
                if not running:
                    return
                for future in wait(running, POLL, FIRST_COMPLETED).done:
                    run = running.pop(future)
                    record = _result(future, run)
                    results.append(self.path, record)
                    bar.advance(self.steps - seen.pop(run))
                    finished(record, self.done, self.total, bar.print)
                for run in running.values():
                    step = min(self.steps, _last_step(self.folder / "runs" / run.folder / LOG))
                    bar.advance(step - seen[run])
                    seen[run] = step

    def run_together(self, finished: Finished) -> None:
        """Do all runs one after the other, in all processes that `torchrun` started. Raises as `run` does."""
        first = _rank() == 0
        dist.init_process_group(backend(torch.device(_device(self.device))))
        try:
            if first:
                data.make(self.study, self.folder / "data")
            dist.barrier()
            sources = tuple(data.make(self.study, self.folder / "data").sources)
            while pending := self.pending():
                record = work(Order(self.study, pending[0], self.folder, sources, self.device))
                if record is None:
                    raise Interrupted
                if first:
                    results.append(self.path, record)
                    finished(record, self.done, self.total, print)
                dist.barrier()
        finally:
            dist.destroy_process_group()

    def measure(self, job: Callable[[str, int, str], Any]) -> Record | None:
        """Time all arms that have results, unless that was done for the same arms."""
        names = [arm for arm in self.study.arms if any(run.arm == arm for run in self.results.runs)]
        before = self.results.speed
        if before is not None and list(before["arms"]) == names and before["settings"] == asdict(self.study.speed):
            return None
        device = torch.device(_device(self.device))
        with job("timing", len(names) * (self.study.speed.repeats + 1), "repetitions") as bar:
            configs = {name: self.study.build(name).config for name in names}
            numbers = speed.measure(configs, self.study.speed, device, bar.advance)
        record = {"kind": "speed", "settings": asdict(self.study.speed), **_machine(device), "arms": numbers}
        results.append(self.path, record)
        return record


def work(order: Order) -> Record | None:
    """Train and test one run -> its record; None if a signal ended it."""
    study, run = order.study, order.run
    folder = order.folder / "runs" / run.folder
    if order.threads is not None:
        torch.set_num_threads(order.threads)
    built, device = study.build(run.arm), _device(order.device)
    config = study.training(built, run.lr, run.seed, list(order.sources), device)
    if device.startswith("cuda") and order.threads is not None:  # not under torchrun
        config = replace(config, run=replace(config.run, graph=True))
    about = {"kind": "run", **run._asdict(), "parameters": built.parameters}
    about |= {"adjusted": built.adjusted, "ratio": built.ratio}
    with _claimed(folder), open(folder / OUTPUT, "a", buffering=1, encoding="utf-8") as output, redirect_stderr(output):
        try:
            result = train(config, folder)
        except UserError as error:
            if not any(record["kind"] == "stopped" for record in read_log(folder / LOG)):
                raise  # not the run is at fault, but the disk, say
            return about | {"failed": str(error)}
        if not result.finished:
            return None
        if _rank():
            return about  # the first process tests
        model = Hymba.from_pretrained(folder / FINAL, device=device, dtype=torch.float32).eval()
        tasks = data.make_tasks(study, order.sources[0].path)
        scores = {
            name: evaluate.score(model, task, study.tasks[name].documents, config.run.micro_tokens)
            for name, task in tasks.items()
        }
        tokenizer = Tokenizer.from_pretrained(order.sources[0].path)
        endings = {
            name: cloze.score(model, tokenizer, cloze.read(path), config.run.micro_tokens)
            for name, path in study.cloze.items()
        }
    learned = _learned(result.log, order.sources)
    return about | learned | {"tasks": scores, "cloze": endings, **_machine(torch.device(device))}


def _learned(log: list[Record], sources: Sequence[Source]) -> Record:
    """What a run's log says: losses at the end and on the way, and speed."""
    steps = [record for record in log if record["kind"] == "step"]
    measured = [record for record in log if record["kind"] == "validation"]
    tokens = {record["step"]: record["tokens"] for record in steps}
    last = {record["source"]: record for record in measured}
    names = {source.path: data.TEXT if i == 0 else Path(source.path).name for i, source in enumerate(sources)}
    kept = steps[:: max(1, len(steps) // CURVE)]
    text = {tokens[r["step"]]: r["bits_per_byte"] for r in measured if r["source"] == sources[0].path}
    rates = [record["tokens_per_second"] for record in steps if "tokens_per_second" in record]
    return {
        "bits_per_byte": last[sources[0].path]["bits_per_byte"],
        "validation": {names[path]: record["loss"] for path, record in last.items()},
        "objective": sum(source.weight * last[source.path]["loss"] for source in sources),
        "curve": [[record["tokens"], round(record["loss"], 4)] for record in kept],
        "validation_curve": [list(point) for point in text.items()],
        "training_tokens_per_second": sorted(rates)[len(rates) // 2],
    }


def _result(future: Future, run: Run) -> Record:
    try:
        record = future.result()
    except BrokenProcessPool:
        raise UserError(
            f"the process that trained {run.folder} was killed; the same command goes on from there"
        ) from None
    if record is None:
        raise Interrupted
    return record


def _last_step(log: Path) -> int:
    """How far a run is, by the end of its log."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:  # cut off
            continue
        if record["kind"] == "step":
            return record["step"]
    return 0


def _device(device: str) -> str:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{_gpu}" if device == "cuda" and _gpu is not None else device


def _machine(device: torch.device) -> Record:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "hymba": __version__, "torch": torch.__version__}


def _rank() -> int:
    """Of this process among those that `torchrun` started."""
    return int(os.environ.get("RANK", 0))


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Make a run's folder; one study at a time trains in it, the next one waits."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        if _rank() == 0:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, _begin_worker, (context.Value("i", 0),))
    try:
        yield pool
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()  # the trainer saves before it ends
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(counter) -> None:
    """Take the next GPU, if there are several, and end with the parent."""
    global _gpu
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if (gpus := torch.cuda.device_count()) > 1:
        _gpu = number % gpus
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)  # the trainer saves before it ends
