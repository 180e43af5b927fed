"""Documents from files of many kinds, as pieces of text, in constant memory.

An input is a text file, JSONL, Parquet, a folder or a glob of those, or a Hugging Face dataset. Whatever it is, it is
read as a sequence of `Piece`s: a long document in several, a short one in one. Reading can start again after any piece
that has a position. Nothing here knows tokens, but for the function that says where a text may be cut.
"""

import glob
import gzip
import json
import zlib
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from hymba.errors import UserError

PIECE = 2**16  # characters of a long document that are encoded at a time
LOOKAHEAD = 256  # characters behind them that are known when a piece is cut; a separator is not longer
BLOCK = 2**20  # bytes
ROWS = 256  # of a table that are read at a time
HUB = "hf:"
KINDS = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
INSTALL = "pip install 'hymba[data]'"

# (text, limit) -> (where a piece of it ends, where the next one begins); limit + LOOKAHEAD characters are known
Cut = Callable[[str, int], tuple[int, int]]


class Piece(NamedTuple):
    """A part of a document."""

    text: str
    size: int  # bytes of the document's text in UTF-8 that it stands for
    last: bool  # whether it ends its document
    position: int | None  # where reading goes on behind it; None: only behind a later piece


@dataclass(frozen=True)
class Input:
    """A file, or a dataset of the hub or on disk."""

    name: str
    kind: str  # "text", "jsonl", "parquet", "dataset"
    size: int = 0  # bytes on disk, compressed or not; 0: not known
    changed: int = 0  # when it was modified, ns; 0: not known

    def pieces(self, start: int, field: str, separator: str | None, cut: Cut) -> Iterator[Piece]:
        """The documents from a position on, in pieces; empty ones are left out.

        start: 0, or the position of a piece; field: of a JSONL line or a table that holds the text; separator: what
        stands between the documents of a text file, None: it is one document
        Raises `UserError` for what cannot be read.
        """
        if self.kind == "text":
            return _text_pieces(self.name, start, separator, cut)
        rows = {"jsonl": _json_rows, "parquet": _parquet_rows, "dataset": _dataset_rows}[self.kind]
        return _row_pieces(rows(self.name, start, field), cut)


def find_inputs(pattern: str, kind: str | None = None) -> list[Input]:
    """The inputs that a path, a folder, a glob or `hf:NAME[:CONFIG[:SPLIT]]` stands for, sorted by name.

    kind: overrides what the ending of a file's name says. In a folder only files with a known ending count.
    Raises `UserError` if there are none.
    """
    if pattern.startswith(HUB):
        return [Input(pattern, "dataset")]
    path = Path(pattern)
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():  # what `save_to_disk` writes
        return [Input(pattern, "dataset", sum(file.stat().st_size for file in path.glob("*.arrow")))]
    if path.is_dir():
        files = [str(file) for file in sorted(path.rglob("*")) if file.is_file() and _kind(file)]
        absent = f"no file in it ends in {', '.join(KINDS)}, or one of these and .gz"
    else:
        found = [pattern] if path.exists() else sorted(glob.glob(pattern, recursive=True))
        files = [name for name in found if not Path(name).is_dir()]
        absent = "there is no such file"
    if not files:
        raise UserError(f"{pattern}: {absent}; name text, JSONL or Parquet files, or a dataset as {HUB}NAME")
    return [_file(name, kind) for name in files]


def _kind(path: Path) -> str | None:
    return KINDS.get(Path(path.name.removesuffix(".gz")).suffix.lower())


def _file(name: str, kind: str | None) -> Input:
    state = Path(name).stat()
    return Input(name, kind or _kind(Path(name)) or "text", state.st_size, state.st_mtime_ns)


def cut_at_space(text: str, limit: int) -> tuple[int, int]:
    """Cut in front of the last blank or line break up to `limit`, or there if there is none."""
    at = max(text.rfind(" ", limit // 2, limit), text.rfind("\n", limit // 2, limit))
    at = at if at > 0 else limit
    return at, at


def open_bytes(name: str) -> BinaryIO:
    """A file for reading, decompressed if its name ends in .gz."""
    return gzip.open(name) if name.endswith(".gz") else open(name, "rb")


def _text_pieces(name: str, start: int, separator: str | None, cut: Cut) -> Iterator[Piece]:
    if separator is not None and not 0 < len(separator) <= LOOKAHEAD:
        raise UserError(f"a separator has 1 to {LOOKAHEAD} characters; this one has {len(separator)}")
    gap = len((separator or "").encode())
    text, begin, position, open_document = "", 0, start, False
    blocks = _decoded(name, start)
    while True:
        while len(text) - begin < PIECE + LOOKAHEAD and (block := next(blocks, None)) is not None:
            text, begin = text[begin:] + block, 0
        if position == 0 and text.startswith("\ufeff"):  # a byte order mark
            begin, position = 1, 3
        # what follows depends on these characters only, so that reading from a position on gives the same pieces
        end = -1 if separator is None else text.find(separator, begin, begin + PIECE + len(separator))
        if end >= 0:
            piece, begin, last, skipped = text[begin:end], end + len(separator), True, gap
        elif len(text) - begin <= PIECE:
            piece, begin, last, skipped = text[begin:], len(text), True, 0
        else:
            window = text[begin : begin + PIECE + LOOKAHEAD]
            stop, resume = cut(window, PIECE)
            piece, begin, last, skipped = window[:stop], begin + resume, False, len(window[stop:resume].encode())
        size = len(piece.encode())
        position += size + skipped
        if piece or open_document:
            # what is skipped at a cut belongs to the document; a separator does not
            yield Piece(piece, size + (0 if last else skipped), last, position)
        open_document = not last
        if end < 0 and last:
            return


def _decoded(name: str, start: int) -> Iterator[str]:
    """Blocks of text from a byte on."""
    decoder = getincrementaldecoder("utf-8")("strict")
    with _reading(name), open_bytes(name) as file:
        file.seek(start)
        at, block = start, b"-"
        while block:
            block = file.read(BLOCK)
            held = len(decoder.getstate()[0])  # the beginning of a character at the end of the last block
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{name} is not UTF-8 at byte {at - held + error.start}; convert it, for example with "
                    "iconv -f WINDOWS-1252 -t UTF-8 if that is its encoding"
                ) from None
            at += len(block)
            if text:
                yield text


def _row_pieces(rows: Iterator[tuple[str, int]], cut: Cut) -> Iterator[Piece]:
    for text, position in rows:
        begin, size = 0, len(text.encode())
        while len(text) - begin > PIECE:
            stop, resume = cut(text[begin : begin + PIECE + LOOKAHEAD], PIECE)
            covered = len(text[begin : begin + resume].encode())
            yield Piece(text[begin : begin + stop], covered, False, None)
            begin, size = begin + resume, size - covered
        if size or begin:
            yield Piece(text[begin:], size, True, position)


def _json_rows(name: str, start: int, field: str) -> Iterator[tuple[str, int]]:
    """The text of each line that is not blank, and the byte behind the line."""
    position = start
    with _reading(name), open_bytes(name) as file:
        file.seek(start)
        for line in file:
            if line.strip():
                try:
                    value = json.loads(line)
                except UnicodeDecodeError as error:
                    raise UserError(f"{_line(name, position)} is not UTF-8 (byte {position + error.start})") from None
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{_line(name, position)} is not JSON ({error})") from None
                if not isinstance(value, dict):
                    raise UserError(f"{_line(name, position)} is no JSON object; write {{{json.dumps(field)}: ...}}")
                text = _field(value, field, partial(_line, name, position))
                yield text, position + len(line)
            position += len(line)


def _line(name: str, position: int) -> str:
    """Which line of a file begins at a byte."""
    number, at = 1, 0
    with open_bytes(name) as file:
        while at < position:
            at += len(file.readline())
            number += 1
    return f"{name} line {number}"


def _field(row: dict[str, Any], field: str, where: Callable[[], str]) -> str:
    """The text of a row; a null is an empty text."""
    if field not in row:
        there = ", ".join(map(str, row)) or "nothing"
        raise UserError(f"{where()} has no field {field!r} (there is {there}); choose another with --field")
    text = row[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where()}: {field!r} is no text but of type {type(text).__name__}; choose another --field")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where()}: character {error.start} of {field!r} is half a surrogate pair; remove it"
        ) from None
    return text


def _parquet_rows(name: str, start: int, field: str) -> Iterator[tuple[str, int]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{name}: Parquet files are read with pyarrow; {INSTALL}") from None
    with _reading(name, pyarrow.ArrowException), parquet.ParquetFile(name) as file:
        if field not in (names := file.schema_arrow.names):
            raise UserError(
                f"{name} has no column {field!r} (there is {', '.join(names)}); choose another with --field"
            )
        row = 0
        for group in range(file.num_row_groups):
            if row + file.metadata.row_group(group).num_rows <= start:
                row += file.metadata.row_group(group).num_rows
                continue
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=[field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if row > start:
                        yield _field({field: text}, field, lambda row=row: f"{name} row {row}"), row


def _dataset_rows(name: str, start: int, field: str) -> Iterator[tuple[str, int]]:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name}: this dataset is read with the library datasets; {INSTALL}") from None
    try:
        if name.startswith(HUB):
            path, config, split = (*name.removeprefix(HUB).split(":"), "", "")[:3]
            rows = datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
        else:
            rows = datasets.load_from_disk(name)
        for row, values in enumerate(rows.skip(start), start + 1):
            yield _field(values, field, lambda row=row: f"{name} row {row}"), row
    except UserError:
        raise
    except Exception as error:  # the library and the hub's client raise errors of many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{name} cannot be read ({reason}); check the name, and the network") from None


@contextmanager
def _reading(name: str, *errors: type[Exception]) -> Iterator[None]:
    """What goes wrong while a file is read becomes a `UserError`."""
    try:
        yield
    except (OSError, EOFError, zlib.error, *errors) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{name} cannot be read ({reason}); check the file") from None
