"""Files are written aside and renamed, so that a crash or a full disk leaves the old file or the new one."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it replaces `path`, on failure it is removed."""
    with atomic_writes([path]) as (temporary,):
        yield temporary


@contextmanager
def atomic_writes(paths: list[str | os.PathLike]) -> Iterator[list[Path]]:
    """`atomic_write` for files that belong together: all are written before the first one is renamed.

    The folder is created if it is missing. The renames are in the order of `paths`, so name an index last.
    """
    targets = [Path(path) for path in paths]
    temporaries: list[Path] = []
    try:
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
            os.close(handle)
            temporaries.append(Path(name))
        yield temporaries
        for temporary in temporaries:
            _flush(temporary)
        for temporary, target in zip(temporaries, targets, strict=True):
            _match_umask(temporary)
            os.replace(temporary, target)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def write_files(writers: Mapping[Path, Callable[[Path], None]]) -> None:
    """Write a set of files that belong together; `writers[path](temporary)` fills one of them."""
    with atomic_writes(list(writers)) as temporaries:
        for temporary, write in zip(temporaries, writers.values(), strict=True):
            write(temporary)


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _match_umask(path: Path) -> None:
    """mkstemp makes private files; a checkpoint is as readable as any file that the user writes."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
