"""Files are written aside and renamed, so that a crash or a full disk leaves the old file or the new one.

What the machine refuses (disk full, no permission) becomes a `UserError`, one line that names the place.
"""

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from hymba.errors import UserError


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it replaces `path`, on failure it is removed."""
    with atomic_writes([path]) as (temporary,):
        yield temporary


@contextmanager
def atomic_writes(paths: list[str | os.PathLike]) -> Iterator[list[Path]]:
    """`atomic_write` for files that belong together: all are written before the first one is renamed.

    The folder is created if it is missing. The renames are in the order of `paths`, so name an index last.
    Raises `UserError` if the files cannot be written.
    """
    targets = [Path(path) for path in paths]
    temporaries: list[Path] = []
    modes: list[int] = []
    try:
        for target in targets:
            if "\0" in str(target):
                raise UserError(f"{str(target)!r} is no file name")
            if target.is_dir():
                raise UserError(f"{target} is a folder; move it away, a file of this name is to be written")
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
            handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)  # less what the umask takes
            temporaries.append(temporary)
            modes.append(os.fstat(handle).st_mode & 0o777)
            os.close(handle)
        yield temporaries
        for temporary, mode in zip(temporaries, modes, strict=True):
            _flush(temporary)
            temporary.chmod(mode)  # safetensors puts a private file of its own in the place of ours
        for temporary, target in zip(temporaries, targets, strict=True):
            os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        where = targets[0] if len(targets) == 1 else targets[0].parent
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {where} ({reason}); make room, or choose another place") from error
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
