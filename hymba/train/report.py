"""What a run says: a bar or plain lines, `log.jsonl`, and TensorBoard, Weights & Biases or Trackio if asked for."""

import json
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from hymba.errors import UserError
from hymba.files import atomic_write
from hymba.train.config import TrainConfig, as_table

LOG = "log.jsonl"


class Report:
    """Everything that a run says; in processes other than the first it says nothing."""

    def __init__(self, config: TrainConfig, folder: Path, steps: int, done: int, speaks: bool):
        """steps: of the whole run, done: before this process began; what `log.jsonl` has beyond that is forgotten."""
        self._steps, self._bar, self._sinks, self._log = steps, None, [], None
        if not speaks:
            return
        _forget(folder / LOG, done)
        self._log = open(folder / LOG, "a", encoding="utf-8")  # noqa: SIM115
        self._sinks = list(_sinks(config, folder, done))
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console, redirect_stdout=False)
            self._task = self._bar.add_task("", total=steps, completed=done)
            self._bar.start()

    def steps(self, records: list[dict[str, Any]]) -> None:
        """Records of steps that are done; the last one has speed and memory, too."""
        for record in records:
            self._write({"kind": "step", **record})
        last = records[-1]
        for sink in self._sinks:
            sink(last["step"], {f"train/{k}": v for k, v in last.items() if isinstance(v, int | float) and k != "step"})
        if self._log is None:
            return
        text = f"loss {last['loss']:.4f}  {last['tokens_per_second']:,.0f} tokens/s"
        if last.get("mfu"):
            text += f"  MFU {last['mfu']:.0%}"
        if self._bar:
            self._bar.update(self._task, completed=last["step"], description=text)
        else:
            text += f"  lr {last['lr']:.3g}  gradient {last['gradient_norm']:.2f}  {last['peak_memory'] / 1e9:.2f} GB"
            self.say(f"step {last['step']}/{self._steps}  {text}")

    def validation(self, step: int, source: str, loss: float, bits_per_byte: float) -> None:
        self._write(
            {"kind": "validation", "step": step, "source": source, "loss": loss, "bits_per_byte": bits_per_byte}
        )
        name = Path(source).name
        for sink in self._sinks:
            sink(step, {f"validation/{name}/loss": loss, f"validation/{name}/bits_per_byte": bits_per_byte})
        self.say(f"step {step}: {name}: validation loss {loss:.4f} nats, {bits_per_byte:.4f} bits per byte")

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._write({"kind": "sample", "step": step, "prompt": prompt, "text": text})
        self.say(f"step {step}: {prompt}|{' '.join(text.split())}")

    def event(self, name: str, **values: Any) -> None:
        """Something for the log only."""
        self._write({"kind": name, **values})

    def say(self, text: str) -> None:
        """A line for people."""
        if self._log is None:
            return
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
        for sink in self._sinks:
            sink.close()
        if self._log:
            self._log.close()

    def _write(self, record: dict[str, Any]) -> None:
        if self._log:
            self._log.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._log.flush()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a last line that was cut off by a crash is left out."""
    records = []
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            with suppress(ValueError):
                records.append(json.loads(line))
    return records


def _forget(path: Path, step: int) -> None:
    """Leave out what a run wrote after the checkpoint from which it goes on: it will be written again."""
    if path.exists():
        kept = [record for record in read_log(path) if record.get("step", 0) <= step]
        with atomic_write(path) as temporary:
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
            temporary.write_text("".join(lines), encoding="utf-8")


class _TensorBoard:
    def __init__(self, folder: Path, done: int):
        self._writer = _package("tensorboard", "torch.utils.tensorboard").SummaryWriter(folder, purge_step=done + 1)

    def __call__(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Tracker:
    """Weights & Biases, and Trackio, which has the same functions."""

    def __init__(self, package: str, project: str, config: TrainConfig, folder: Path):
        self._run = _package(package, package).init(project=project, name=folder.name, config=as_table(config))

    def __call__(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def _sinks(config: TrainConfig, folder: Path, done: int):
    if config.run.tensorboard:
        yield _TensorBoard(folder / "tensorboard", done)
    if config.run.wandb:
        yield _Tracker("wandb", config.run.wandb, config, folder)
    if config.run.trackio:
        yield _Tracker("trackio", config.run.trackio, config, folder)


def _package(name: str, module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise UserError(f"run.{name} needs the package {name}; install it (pip install {name})") from None


class Stopwatch:
    """Seconds of training alone: validation, samples and waiting for checkpoints are left out."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap or restart."""
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        return seconds

    restart = lap


def peak_memory(device: Any) -> int:
    """Bytes: of the GPU what PyTorch allocated at most, of the CPU the largest resident size of the process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
