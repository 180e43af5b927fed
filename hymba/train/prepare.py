"""From text to token shards: what `hymba prepare` does.

A prepared folder holds the tokenizer's files, `manifest.json`, and for each split (train, validation) shards of two
files: `train-00000.bin`, the token ids of documents one after the other (little-endian uint16, or uint32 where the
vocabulary needs it), and `train-00000.docs.npy`, int64, where each document starts. A document is BOS, its text, EOS;
one that does not fit in the rest of a shard goes on in the next, where its rest counts as a document of its own.

The same input gives the same bytes. The work is done in the folder's neighbour `NAME.partial`, which is renamed when it
is whole; `progress.json` in there says how far the files can be trusted, so that a killed run goes on from there.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hymba.errors import UserError
from hymba.files import atomic_write
from hymba.tokenizer import OPTIONAL_FILES, TOKENIZER_FILE, Tokenizer
from hymba.train.text import LOOKAHEAD, PIECE, Cut, Input, Piece, cut_at_space, find_inputs

FORMAT = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
LOCK = "lock"
STDIN_COPY = "stdin"
SPLITS = ("train", "validation")
BATCH = 2**20  # bytes of text that are encoded in one call
BATCHES_PER_SAVE = 32  # what a kill can cost: seconds
TOKENIZER_TEXT = 10**9  # bytes of text that a tokenizer learns from at most, since it keeps every word in memory
# a place where a long text may be cut: one character that is no part of a word, between two that are
SEAM = re.compile(r"(?<=[^\W_])[\W_](?=[^\W_])")
SEAM_CONTEXT = 64  # characters on either side that decide how a tokenizer splits there
SEAM_TRIES = 16
SURE_BEGINNING = PIECE // 4  # characters that the first piece of a longer document has wherever it is cut
MB = 10**6


@dataclass(frozen=True)
class Settings:
    """What to prepare, and how."""

    inputs: tuple[str, ...]  # files, folders, globs, hf:NAME[:CONFIG[:SPLIT]], or - for stdin
    output: Path
    tokenizer: str | None = None  # folder or hub id of the tokenizer
    train_tokenizer: int | None = None  # learn a byte-level BPE of this many tokens from the training documents instead
    validation: tuple[str, ...] = ()  # an INPUT that becomes the validation split, and no part of the training split
    validation_fraction: float = 0.0  # share of the documents that become the validation split, drawn by their text
    format: str | None = None  # text, jsonl or parquet, whatever the names of the files say
    field: str = "text"  # name of the text in a JSONL line or a table
    split_on: str | None = None  # what stands between the documents of a text file, e.g. '<|endoftext|>' or '\n\n'
    seed: int = 0  # of the draw for the validation split
    shard_tokens: int = 2**26  # a shard is closed when it has so many

    def __post_init__(self) -> None:
        if not self.inputs:
            raise UserError("there is nothing to prepare; name files, folders, or a dataset")
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            raise UserError("choose a tokenizer: --tokenizer PATH, or --train-tokenizer VOCABULARY to learn one")
        if self.validation and self.validation_fraction:
            raise UserError("--validation and --validation-fraction exclude each other; choose one")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation_fraction={self.validation_fraction} must be at least 0 and less than 1")
        if self.format not in (None, "text", "jsonl", "parquet"):
            raise UserError(f"format {self.format!r} is not known; choose from text, jsonl, parquet")
        if self.shard_tokens < 1:
            raise UserError(f"shard_tokens={self.shard_tokens} must be 1 or more")
        if self.split_on is not None and not 0 < len(self.split_on) <= LOOKAHEAD:
            raise UserError(f"split_on has {len(self.split_on)} characters; a separator has 1 to {LOOKAHEAD}")


@dataclass
class Shards:
    """How far one split is written."""

    documents: int = 0
    bytes: int = 0  # of text
    sizes: list[list[int]] = field(default_factory=list)  # (tokens, starts of documents) of each shard

    @property
    def tokens(self) -> int:
        return sum(tokens for tokens, _ in self.sizes)


@dataclass
class Progress:
    """How far everything is written: what is saved, and where a killed run goes on."""

    fingerprint: dict[str, Any]
    has_tokenizer: bool = False
    input: int = 0
    position: int = 0  # in this input
    document_split: str | None = None  # of the document in whose midst we are
    splits: dict[str, Shards] = field(default_factory=lambda: {split: Shards() for split in SPLITS})


def prepare(settings: Settings, job: Callable[[str, int, str], Any] | None = None) -> dict[str, Any]:
    """Write the prepared folder -> its manifest. A run that was killed goes on where it stopped.

    job: shows progress, as `hymba.cli.terminal.job` does
    Raises `UserError` for input that cannot be used, and if the folder cannot be written.
    """
    return _Preparation(settings, job or _silent).run()


class _Preparation:
    def __init__(self, settings: Settings, job: Callable[[str, int, str], Any]) -> None:
        self.settings, self.job = settings, job
        self.output = Path(settings.output)
        self.folder = self.output.with_name(f"{self.output.name}.partial")
        self.reads_stdin = "-" in (*settings.inputs, *settings.validation)
        held_out = [input for pattern in settings.validation for input in self._find(pattern)]
        names = {Path(input.name).resolve() for input in held_out}
        found = [input for pattern in settings.inputs for input in self._find(pattern)]
        found = [input for input in found if Path(input.name).resolve() not in names]
        if not found:
            raise UserError("all inputs are validation files; nothing is left to train on")
        self.inputs = [(input, "train") for input in found] + [(input, "validation") for input in held_out]
        self.tokenizer = None if settings.tokenizer is None else _load_tokenizer(settings.tokenizer)
        self.fingerprint = self._fingerprint()

    def _find(self, pattern: str) -> list[Input]:
        if pattern == "-":  # copied to a file before it is read
            return [Input(str(self.folder / STDIN_COPY), self.settings.format or "text")]
        return find_inputs(pattern, self.settings.format)

    def _fingerprint(self) -> dict[str, Any]:
        """What decides the result, and by `changed` whether it still is what it was."""
        s = self.settings
        recipe = {
            "format": FORMAT,
            "tokenizer": s.train_tokenizer if self.tokenizer is None else self.tokenizer.fingerprint(),
            "inputs": [[self._shown(input), input.kind, input.size, split] for input, split in self.inputs],
            "options": [s.validation_fraction, s.field, s.split_on, s.seed, s.shard_tokens],
        }
        digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
        return {"recipe": digest, "changed": [input.changed for input, _ in self.inputs]}

    def _shown(self, input: Input) -> str:
        return "-" if input.name == str(self.folder / STDIN_COPY) else input.name

    def run(self) -> dict[str, Any]:
        if self._is_finished(self.output):
            return read_manifest(self.output)
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise UserError(f"{self.output} is there already and not empty; choose another folder")
        with _writing(self.folder), _locked(self.folder):
            if not self._is_finished(self.folder):
                self._work()
            manifest = read_manifest(self.folder)
            whole = {MANIFEST, *self._tokenizer_files()}
            for split in manifest["splits"].values():
                whole |= {f"{shard['name']}.{kind}" for shard in split["shards"] for kind in ("bin", "docs.npy")}
            self._remove_all_but(whole)
            (self.folder / LOCK).unlink()
            self.folder.rename(self.output)
        return manifest

    def _is_finished(self, folder: Path) -> bool:
        """Whether a folder is whole. Raises `UserError` if it was made from something else."""
        path = folder / MANIFEST
        if not path.is_file():
            return False
        same = read_manifest(folder)["recipe"] == self.fingerprint["recipe"] and not self.reads_stdin
        if not same or path.stat().st_mtime_ns < max(self.fingerprint["changed"]):
            raise UserError(f"{folder} was prepared from other input or options; remove it, or choose another folder")
        return True

    def _work(self) -> None:
        self.progress = self._load_progress()
        if self.progress.has_tokenizer:
            self.tokenizer = Tokenizer.from_pretrained(self.folder)
        else:
            self._remove_all_but({PROGRESS})
            self._save()
        if self.reads_stdin:
            _copy_stdin(self.folder / STDIN_COPY)
        if not self.progress.has_tokenizer:
            if self.tokenizer is None:
                self.tokenizer = self._train_tokenizer()
            self.tokenizer.save_pretrained(self.folder)
            self.progress.has_tokenizer = True
            self._save()
        self.dtype = np.dtype("<u2" if self.tokenizer.vocab_size <= 2**16 else "<u4")
        self._encode()
        self._conclude()

    def _load_progress(self) -> Progress:
        """What an earlier run left, or a beginning."""
        path, fresh = self.folder / PROGRESS, Progress(self.fingerprint)
        if not path.exists():
            if any(not name.startswith(".") and name != LOCK for name in os.listdir(self.folder)):
                raise UserError(f"{self.folder} is in the way; remove it, or choose another name")
            return fresh
        progress = Progress(**json.loads(path.read_text()))
        progress.splits = {split: Shards(**values) for split, values in progress.splits.items()}
        if progress.fingerprint == self.fingerprint and not self.reads_stdin:
            return progress
        if any(shards.sizes for shards in progress.splits.values()) and not self.reads_stdin:
            raise UserError(f"{self.folder} is interrupted work on other input or options; remove it to start afresh")
        return fresh

    def _save(self) -> None:
        with atomic_write(self.folder / PROGRESS) as path:
            path.write_text(json.dumps(asdict(self.progress)))

    def _remove_all_but(self, kept: set[str]) -> None:
        for name in set(os.listdir(self.folder)) - kept - {LOCK}:
            (self.folder / name).unlink()

    def _tokenizer_files(self) -> set[str]:
        return {TOKENIZER_FILE, *OPTIONAL_FILES} & set(os.listdir(self.folder))

    def _train_tokenizer(self) -> Tokenizer:
        """Learn one from the training split, or if there is very much text from a sample of its pieces: an even one
        where the sizes of the inputs are known, else the beginning."""
        share = TOKENIZER_TEXT / max(sum(input.size for input, split in self.inputs if split == "train"), 1)
        with self._job("reading for the tokenizer") as meter:

            def texts() -> Iterator[str]:
                left = TOKENIZER_TEXT
                for _, split, _, piece in self._pieces(Progress({}), cut_at_space, meter):
                    if split == "train" and (share >= 1 or _chance(piece.text, "tokenizer") < share):
                        yield piece.text
                        left -= piece.size
                        if left <= 0:
                            return

            return Tokenizer.train(texts(), self.settings.train_tokenizer)

    def _pieces(self, since: Progress, cut: Cut, meter: "_Meter") -> Iterator[tuple[int, str, bool, Piece]]:
        """(number of the input, split, whether it begins a document, piece), from some state of the work on."""
        split = since.document_split
        before = sum(input.size for input, _ in self.inputs[: since.input])
        for number in range(since.input, len(self.inputs)):
            input, its_split = self.inputs[number]
            start = since.position if number == since.input else 0
            within = start
            for piece in input.pieces(start, self.settings.field, self.settings.split_on, cut):
                if begins := split is None:
                    split = self._split_of(its_split, piece.text)
                yield number, split, begins, piece
                split = None if piece.last else split
                within += piece.size
                meter.reach(before + min(within, input.size or within))
            before += input.size or within
            meter.reach(before)

    def _split_of(self, split: str, beginning: str) -> str:
        if split == "train" and self.settings.validation_fraction:
            # equal documents get into the same split
            chance = _chance(beginning[:SURE_BEGINNING], f"validation {self.settings.seed}")
            return "validation" if chance < self.settings.validation_fraction else "train"
        return split

    def _encode(self) -> None:
        progress = self.progress
        ends = _document_ends(self.tokenizer)
        writers = {
            split: _Writer(self.folder, split, shards, self.dtype, ends, self.settings.shard_tokens)
            for split, shards in progress.splits.items()
        }
        files = {name for writer in writers.values() for name in writer.names()}
        self._remove_all_but({PROGRESS, STDIN_COPY, *self._tokenizer_files(), *files})
        with self._job("encoding") as meter:
            pieces = self._pieces(replace(progress), _seam_cut(self.tokenizer), meter)
            unsaved = 0
            for batch, encoded in _encoded(pieces, self.tokenizer):
                for (_, split, begins, piece), ids in zip(batch, encoded, strict=True):
                    writers[split].write(ids, begins, piece.last, piece.size)
                for writer in writers.values():
                    writer.flush()
                unsaved += 1
                number, split, _, piece = batch[-1]
                if unsaved >= BATCHES_PER_SAVE and piece.position is not None:
                    for writer in writers.values():
                        writer.sync()
                    progress.input, progress.position = number, piece.position
                    progress.document_split = None if piece.last else split
                    self._save()
                    unsaved = 0
        for writer in writers.values():
            writer.close()

    def _conclude(self) -> None:
        """Write what can only be known now: where documents start, as arrays, and the manifest."""
        settings, splits = self.settings, {}
        if not self.progress.splits["train"].tokens:
            raise UserError(f"there is no text in {', '.join(settings.inputs)}; nothing was prepared")
        wanted = bool(settings.validation or settings.validation_fraction)
        if wanted and not self.progress.splits["validation"].tokens:
            advice = "raise the fraction, name files with --validation, or make more documents with --split-on"
            raise UserError(f"no document got into the validation split; {advice}")
        for split, shards in self.progress.splits.items():
            if not shards.sizes:
                continue
            entries = []
            for number, (tokens, _) in enumerate(shards.sizes):
                name = f"{split}-{number:05}"
                starts = np.fromfile(self.folder / f"{name}.starts", "<i8")
                with atomic_write(self.folder / f"{name}.docs.npy") as path, open(path, "wb") as file:
                    np.save(file, starts)
                digest = _digest(self.folder / f"{name}.bin")
                entries.append({"name": name, "tokens": tokens, "starts": len(starts), "sha256": digest})
            splits[split] = {
                "tokens": shards.tokens, "documents": shards.documents, "bytes": shards.bytes, "shards": entries
            }  # fmt: skip
        tokenizer = self.tokenizer
        manifest = {
            "format": FORMAT,
            "recipe": self.fingerprint["recipe"],
            "tokenizer": {
                "sha256": tokenizer.fingerprint(),
                "vocab_size": tokenizer.vocab_size,
                "trained": settings.tokenizer is None,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
            "dtype": self.dtype.name,
            "inputs": {"train": settings.inputs, "validation": settings.validation},
            "validation_fraction": settings.validation_fraction,
            "field": settings.field,
            "split_on": settings.split_on,
            "seed": settings.seed,
            "splits": splits,
        }
        with atomic_write(self.folder / MANIFEST) as path:
            path.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @contextmanager
    def _job(self, title: str) -> Iterator["_Meter"]:
        total = sum(input.size for input, _ in self.inputs)
        with self.job(title, -(-total // MB), "MB") as bar:
            yield _Meter(bar)


class _Meter:
    """Counts bytes, shows megabytes."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._shown = bar, 0

    def reach(self, position: int) -> None:
        if position // MB > self._shown:
            self._bar.advance(position // MB - self._shown)
            self._shown = position // MB


class _Writer:
    """Appends documents to the shards of a split; `shards` always says what is in the files after a flush."""

    def __init__(
        self, folder: Path, split: str, shards: Shards, dtype: np.dtype,
        ends: tuple[list[int], list[int]], shard_tokens: int,
    ) -> None:  # fmt: skip
        self._folder, self._split, self._shards = folder, split, shards
        self._dtype, self._ends, self._limit = dtype, ends, shard_tokens
        self._tokens: list[int] = []  # what is not yet in the files
        self._starts: list[int] = []
        self._files: tuple[BinaryIO, BinaryIO] | None = None
        for number, (tokens, starts) in enumerate(shards.sizes):  # cut off what came after the last save
            for path, size in zip(self._paths(number), (tokens * dtype.itemsize, starts * 8), strict=True):
                os.truncate(path, size)
        if shards.sizes:
            self._open("ab")

    def _paths(self, number: int) -> tuple[Path, Path]:
        stem = f"{self._split}-{number:05}"
        return self._folder / f"{stem}.bin", self._folder / f"{stem}.starts"

    def names(self) -> Iterator[str]:
        for number in range(len(self._shards.sizes)):
            yield from (path.name for path in self._paths(number))

    def _open(self, mode: str) -> None:
        tokens, starts = self._paths(len(self._shards.sizes) - 1)
        self._files = (open(tokens, mode), open(starts, mode))  # noqa: SIM115  (closed in `close`)

    def write(self, ids: list[int], begins: bool, ends: bool, size: int) -> None:
        """Append a piece of a document: its ids, whether it begins and ends the document, bytes of its text."""
        shards = self._shards
        if not shards.sizes or shards.sizes[-1][0] >= self._limit:
            self.close()
            shards.sizes.append([0, 0])
            self._open("wb")
        shard = shards.sizes[-1]
        if begins or not shard[0]:
            self._starts.append(shard[0])
            shard[1] += 1
        before = len(self._tokens)
        for part in (self._ends[0] * begins, ids, self._ends[1] * ends):
            self._tokens += part
        shard[0] += len(self._tokens) - before
        shards.documents += begins
        shards.bytes += size

    def flush(self) -> None:
        if self._files:
            kinds = ((self._tokens, self._dtype), (self._starts, "<i8"))
            for file, (values, dtype) in zip(self._files, kinds, strict=True):
                file.write(np.fromiter(values, dtype, len(values)))  # five times as fast as np.array
                file.flush()
                values.clear()

    def sync(self) -> None:
        self.flush()
        for file in self._files or ():
            os.fsync(file.fileno())

    def close(self) -> None:
        self.sync()
        for file in self._files or ():
            file.close()
        self._files = None


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a prepared folder says of itself. Raises `UserError` if it is none."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is no prepared data (there is no {MANIFEST}); make it with `hymba prepare`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); prepare the data again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} has not the format {FORMAT} that this version reads; prepare the data again")
    return manifest


def _load_tokenizer(source: str) -> Tokenizer:
    """A tokenizer from a folder or the hub."""
    from hymba.convert import resolve  # which imports PyTorch

    return Tokenizer.from_pretrained(resolve(source, ("tokenizer*.json", "special_tokens_map.json", "*.jinja")))


def _document_ends(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What stands in front of a document's tokens and behind them: BOS, or EOS where there is no BOS, and EOS."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None and eos is None:
        raise UserError("the tokenizer names neither a BOS nor an EOS token, so documents cannot be told apart")
    return [eos if bos is None else bos], [] if eos is None else [eos]


def _encoded(pieces: Iterator, tokenizer: Tokenizer) -> Iterator[tuple[list, list[list[int]]]]:
    """Batches of pieces with their token ids; one is encoded while the one before is used and the next is read."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque = deque()
        for batch in _batches(pieces):
            waiting.append((batch, pool.submit(tokenizer.encode_plain, [piece.text for *_, piece in batch])))
            if len(waiting) > 1:
                batch, future = waiting.popleft()
                yield batch, future.result()
        for batch, future in waiting:
            yield batch, future.result()


def _batches(pieces: Iterator) -> Iterator[list]:
    batch, size = [], 0
    for item in pieces:
        batch.append(item)
        size += item[-1].size
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _seam_cut(tokenizer: Tokenizer) -> Cut:
    """Cut a long text where the tokens of its pieces are the tokens of the whole.

    At the last such place up to the limit, tested on the text around it. Tokenizers after SentencePiece put a blank in
    front of every text: there the blank at the cut is left out. A text without any such place is cut at the limit.
    """

    def cut(text: str, limit: int) -> tuple[int, int]:
        region = limit // 16  # of the end, where places are looked for
        seams = [match.start() for match in SEAM.finditer(text, limit - region, limit)]
        for at in seams[: -SEAM_TRIES - 1 : -1]:
            left, whole = text[at - SEAM_CONTEXT : at], text[at - SEAM_CONTEXT : at + SEAM_CONTEXT]
            for skipped in (0, 1) if text[at] == " " else (0,):
                right = text[at + skipped : at + SEAM_CONTEXT]
                a, b, both = tokenizer.encode_plain([left, right, whole])
                if a + b == both:
                    return at, at + skipped
        return limit, limit

    return cut


def _chance(text: str, purpose: str) -> float:
    """A number in [0, 1) that is drawn by the text itself."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=purpose.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _copy_stdin(path: Path) -> None:
    with open(path, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 2**20)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two runs must not write the same folder; the lock ends with the process, however it ends."""
    with open(folder / LOCK, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is preparing {folder}; wait for it, or stop it") from None
        yield


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """What the machine refuses becomes a `UserError`; what was done so far stays."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or folder} ({error.strerror or error}); make room, and run the same command "
            "again: it goes on where it stopped"
        ) from error


class _Silent:
    def advance(self, amount: int = 1) -> None:
        pass


@contextmanager
def _silent(title: str, total: int, unit: str) -> Iterator[_Silent]:
    yield _Silent()
