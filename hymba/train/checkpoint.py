"""Checkpoints of a run: never half there, written while training goes on, readable by any number of processes.

    checkpoints/step-00000100/    manifest.json, and tensors as `torch.distributed.checkpoint` writes them

A checkpoint is written into a hidden folder and flushed; the manifest, with the size and SHA-256 of every file, comes
last; then the folder is renamed. PyTorch keeps its index (`.metadata`) as a pickle, so a run folder is to be trusted
as much as a program; `final/`, which is what one gives away, has safetensors only.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from hymba.errors import UserError
from hymba.train.parallel import World

MANIFEST = "manifest.json"
FORMAT = 1
NAME = re.compile(r"step-(\d{8,})")
HASH_CHUNK = 1 << 22


class Checkpoints:
    """The checkpoints of one run folder; every process has such an object and calls it at the same steps."""

    def __init__(self, folder: Path, keep: int, world: World, data: list[str]):
        """keep: how many are kept; data: fingerprints of what the run is trained on"""
        self.folder, self._keep, self._world, self._data = folder / "checkpoints", keep, world, data
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        if world.first and self.folder.is_dir():
            for left in self.folder.glob(".step-*"):  # of a run that was killed while it wrote or removed one
                shutil.rmtree(left)

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Copy the tensors and write them in the background, after an earlier write is done.

        Raises `UserError` if the earlier one failed.
        """
        self.wait()
        staged = BlockingAsyncStager().stage(tensors)
        self._pending = self._writer.submit(self._write, step, staged)

    def check(self) -> None:
        """Raises `UserError` if a write that has ended went wrong."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is on disk. Raises `UserError` if it could not be written."""
        pending, self._pending = self._pending, None
        error = pending and pending.exception()
        if error:
            reason = _root(error)
            kept = self.newest()
            where = f"the last whole checkpoint is {kept}" if kept else "there is no earlier checkpoint"
            text = getattr(reason, "strerror", None) or str(reason).strip().splitlines()[0]
            raise UserError(f"cannot write a checkpoint into {self.folder} ({text}); make room; {where}") from error

    def newest(self) -> Path | None:
        """The newest checkpoint, which may turn out damaged when it is read."""
        return next(self._all(), None)

    def restore(self, tensors: Callable[[], dict[str, Tensor]], say: Callable[[str], None]) -> int | None:
        """Read the newest whole checkpoint into the tensors -> its step, or None where there is none.

        tensors: called if there is something to read; say: told about checkpoints that are damaged
        Raises `UserError` if all of them are, or if the run was trained on other data.
        """
        damaged = []
        for path in self._world.tell(list(self._all()) if self._world.first else []):
            problem = self._world.tell(_problem(path) if self._world.first else None)
            if problem:
                say(f"{path} is damaged ({problem}); going back to the one before")
                damaged.append(path)
                continue
            if json.loads((path / MANIFEST).read_text(encoding="utf-8"))["data"] != self._data:
                raise UserError(f"{path} was trained on other data; prepare that again, or name another run folder")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.load(tensors(), checkpoint_id=path)
            if self._world.first:  # out of the way of the one that will be written in its place
                for other in damaged:
                    _remove(other.with_name(f"damaged-{other.name}"))
                    other.rename(other.with_name(f"damaged-{other.name}"))
            return int(NAME.fullmatch(path.name)[1])
        if damaged:
            raise UserError(f"no checkpoint in {self.folder} is whole; remove the run folder to begin anew")
        return None

    def close(self) -> None:
        self._writer.shutdown()

    def _all(self) -> Iterator[Path]:
        """Newest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        yield from sorted((path for path in found if NAME.fullmatch(path.name)), key=lambda p: p.name, reverse=True)

    def _write(self, step: int, tensors: dict[str, Tensor]) -> None:
        target = self.folder / f"step-{step:08d}"
        aside = target.with_name(f".{target.name}.tmp")
        try:
            if self._world.first:
                aside.mkdir(parents=True, exist_ok=True)  # another process may have been faster
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.save(tensors, checkpoint_id=aside, process_group=self._world.background)
            if self._world.first:
                _seal(aside, step, self._data)
                _remove(target)  # a run that went back to an earlier checkpoint passes here again
                aside.rename(target)
                _flush_folder(self.folder)
                for old in list(self._all())[self._keep :]:
                    _remove(old)
        except BaseException:  # DCP has one that is no Exception
            if self._world.first:
                shutil.rmtree(aside, ignore_errors=True)
            raise


def _seal(folder: Path, step: int, data: list[str]) -> None:
    """Write the manifest, after which the checkpoint is whole."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "step": step, "data": data, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _flush_folder(folder)


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None: it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, not {FORMAT}"
        for name, expected in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if _sha256(path) != expected["sha256"]:
                return f"{name} has another checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {type(error).__name__}"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that no half of it ever has its name."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.old")
        folder.rename(hidden)
        shutil.rmtree(hidden)


def _flush_folder(folder: Path) -> None:
    """Make names and renames in a folder last, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        os.fsync(handle)
        os.close(handle)


def _root(error: BaseException) -> BaseException:
    """The machine's own word inside PyTorch's."""
    for failure in getattr(error, "failures", {}).values():
        return _root(failure[0])
    return error.__cause__ if isinstance(error.__cause__, OSError) else error
