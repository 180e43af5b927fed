"""Rows to train on, read from prepared folders: random access, memory-mapped, no state to save.

Row r is a pure function of the sources, the length and the seed, so a run that resumes, or one of many ranks, just asks
for the rows it wants. No plan is kept in memory: the order of an epoch is a keyed permutation that is computed where it
is needed, so a corpus costs the same whatever its size. T is the length of a row, N the tokens of a shard.

An epoch goes round every shard as round a ring, from another place each time. A row is T neighbouring tokens, and its
first token is the last one of the row before it: it is context, which a row's first token always is, since nothing is
there to predict it from. So every token of a corpus is predicted exactly once an epoch, but for those that begin a
document. Short documents are neighbours in a row and told apart by their ids; one that reaches over a row's end is cut
there, in every epoch at another place.
"""

import hashlib
import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hymba.errors import UserError
from hymba.tokenizer import Tokenizer
from hymba.train.prepare import MANIFEST, read_manifest

IGNORED_LABEL = -100
OPEN_SHARDS = 128  # at a time, two files each


@dataclass(frozen=True)
class Source:
    """A prepared folder and its share of the rows, relative to the other sources."""

    path: str
    weight: float = 1.0


class Rows(NamedTuple):
    """(rows, T) int64 each, as `Hymba.forward` takes them."""

    input_ids: Tensor
    document_ids: Tensor  # 0, 1, ... in each row
    labels: Tensor  # the input ids where they are to be predicted, else -100: so their count is that of predictions


class Corpus:
    """A prepared folder.

    Attributes:
        path, manifest: the folder, and what it says of itself
        fingerprint: a hash of the manifest, which has the hashes of tokenizer and shards
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.manifest: dict[str, Any] = read_manifest(self.path)
        self.fingerprint = hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()

    @property
    def vocab_size(self) -> int:
        return self.manifest["tokenizer"]["vocab_size"]

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_pretrained(self.path)

    def split(self, name: str) -> "Split":
        """Raises `UserError` if it was not prepared, or if files are missing or cut short."""
        if name not in self.manifest["splits"]:
            raise UserError(f"{self.path} has no {name} split; prepare it with --validation or --validation-fraction")
        return Split(self.path, self.manifest["splits"][name], np.dtype(self.manifest["dtype"]).newbyteorder("<"))


class Split:
    """The shards of a split.

    Attributes:
        tokens, documents, bytes: of all shards; bytes are those of the text in UTF-8
        starts: tokens that begin a document, or the rest of one in another shard
        shard_tokens: (shards,) int64
    """

    def __init__(self, folder: Path, entry: dict[str, Any], dtype: np.dtype) -> None:
        self.tokens: int = entry["tokens"]
        self.documents: int = entry["documents"]
        self.bytes: int = entry["bytes"]
        self.starts: int = sum(shard["starts"] for shard in entry["shards"])
        self.shard_tokens = np.array([shard["tokens"] for shard in entry["shards"]], np.int64)
        self._stems = [str(folder / shard["name"]) for shard in entry["shards"]]
        self._dtype = dtype
        for stem, tokens in zip(self._stems, self.shard_tokens, strict=True):
            path = Path(f"{stem}.bin")
            if not path.is_file() or path.stat().st_size != tokens * dtype.itemsize:
                raise UserError(f"{path} is missing or not of the size in {MANIFEST}; copy or prepare the data again")

    def read(self, shard: int, first: int, ids: np.ndarray, begins: np.ndarray) -> None:
        """Fill `ids` and `begins` (whether a document begins there) from token `first` on; behind the end comes the
        beginning again."""
        tokens, starts = _open_shard(self._stems[shard], self._dtype, int(self.shard_tokens[shard]))
        done = 0
        while done < len(ids):
            at = (first + done) % len(tokens)
            count = min(len(ids) - done, len(tokens) - at)
            ids[done : done + count] = tokens[at : at + count]
            low, high = np.searchsorted(starts, (at, at + count))
            begins[done : done + count] = False
            begins[done + starts[low:high] - at] = True
            done += count


@lru_cache(OPEN_SHARDS)
def _open_shard(stem: str, dtype: np.dtype, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and starts of documents, as memory maps."""
    path = f"{stem}.docs.npy"
    try:
        with open(f"{stem}.bin", "rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Rows are far apart: what the system would read ahead, up to megabytes a row, is not wanted.
        pages.madvise(mmap.MADV_RANDOM)
        tokens = np.frombuffer(pages, dtype)
        starts = np.load(path, mmap_mode="r").view(np.ndarray)
    except (OSError, ValueError) as error:
        raise UserError(f"{stem} cannot be read ({error}); copy or prepare the data again") from None
    if starts.dtype != np.int64 or starts.ndim != 1 or not len(starts) or starts[0] != 0 or starts[-1] >= size:
        raise UserError(f"{path} does not fit {stem}.bin; copy or prepare the data again")
    return tokens, starts


class TrainingRows:
    """The rows of the training splits of some sources, without end.

    Attributes:
        tokens_per_epoch: tokens of all sources together; each source goes through its own epochs at its own pace
        fingerprint: changes with anything that changes the rows
    """

    def __init__(self, sources: Sequence[Source], length: int, seed: int) -> None:
        """length: T, tokens of a row. Raises `UserError` for sources that cannot be used, or not together."""
        if not sources:
            raise UserError("there is no data to train on; name at least one prepared folder")
        _check_length(length)
        for source in sources:
            if not (source.weight > 0 and math.isfinite(source.weight)):
                raise UserError(f"{source.path}: weight {source.weight} must be a number above 0; leave it out instead")
        corpora = [Corpus(source.path) for source in sources]
        for corpus in corpora:
            if corpus.manifest["tokenizer"]["sha256"] != corpora[0].manifest["tokenizer"]["sha256"]:
                raise UserError(
                    f"{corpus.path} and {corpora[0].path} were prepared with different tokenizers; "
                    "prepare one with --tokenizer and the folder of the other"
                )
        self.length = length
        self._seed = seed
        self._splits = [corpus.split("train") for corpus in corpora]
        self._weights = [source.weight for source in sources]
        # rows of each shard, as the number of rows in front of it and, last, of all
        self._rows = [np.cumsum([0, *-(-split.shard_tokens // (length - 1))]) for split in self._splits]
        self.tokens_per_epoch = sum(split.tokens for split in self._splits)
        what = [[corpus.fingerprint for corpus in corpora], self._weights, length, seed]
        self.fingerprint = hashlib.sha256(repr(what).encode()).hexdigest()

    def rows(self, first: int, count: int) -> Rows:
        """Rows `first` to `first + count - 1`."""
        if first < 0 or count < 1:
            raise UserError(f"there are no {count} rows from row {first} on; both count from 0 upwards")
        source, number = interleave(np.arange(first, first + count, dtype=np.int64), self._weights)
        page = _Page(count, self.length)
        for s, split in enumerate(self._splits):
            mine = np.flatnonzero(source == s)
            epoch, index = np.divmod(number[mine], self._rows[s][-1])
            key = _hash(_hash(epoch, self._seed), s)
            index = permute(index, int(self._rows[s][-1]), key)
            shard = np.searchsorted(self._rows[s], index, side="right") - 1
            size = split.shard_tokens[shard]
            done = (index - self._rows[s][shard]) * (self.length - 1)  # tokens that the rows before it predict
            offset = (_hash(shard, key) % size.astype(np.uint64)).astype(np.int64)
            for row, k, at, left in zip(mine, shard, offset + done, size - done, strict=True):
                page.fill(row, split, k, at, min(self.length, left + 1))
        return page.rows()


class ValidationRows:
    """The rows of a validation split, each once: a window of T tokens that moves on by `stride`.

    A row predicts the tokens that no row before it has predicted; what else is in it is context. So every token that
    begins no document is predicted exactly once, from the T - stride tokens in front of it at least, or from all of its
    document. The sum of the losses in nats over a text is what it costs the model to write the text down.

    Attributes:
        tokens: that are predicted; bytes: of the text in UTF-8, so that nats become `bits_per_byte`
    """

    def __init__(self, path: str, length: int, stride: int | None = None) -> None:
        """length: T, tokens of a row; stride: 1 to T - 1, default T // 2: small is slow and gives much context.

        Raises `UserError` if there is no validation split.
        """
        _check_length(length)
        stride = length // 2 if stride is None else stride
        if not 1 <= stride < length:
            raise UserError(f"stride={stride} must be at least 1 and less than the length of a row, {length}")
        corpus = Corpus(path)
        self.length, self.stride = length, stride
        self._split = corpus.split("validation")
        sizes = self._split.shard_tokens
        self._rows = np.cumsum([0, *(1 + -(-np.maximum(sizes - length, 0) // stride))])
        self.bytes = self._split.bytes
        self.tokens = self._split.tokens - self._split.starts

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._rows[-1])

    def rows(self, first: int, count: int) -> Rows:
        """Rows `first` to `first + count - 1`, fewer at the end."""
        index = np.arange(first, min(first + count, len(self)))
        if first < 0 or not len(index):
            raise UserError(f"there are no {count} rows from row {first} on; there are {len(self)} in all")
        page = _Page(len(index), self.length)
        shards = np.searchsorted(self._rows, index, side="right") - 1
        for row, (i, k) in enumerate(zip(index, shards, strict=True)):
            number = i - self._rows[k]
            at = number * self.stride
            known = self.length - self.stride if number else 0
            page.fill(row, self._split, k, at, min(self.length, self._split.shard_tokens[k] - at), known)
        return page.rows()

    def batches(self, count: int) -> Iterator[Rows]:
        """All rows in order, `count` at a time, fewer at the end."""
        for first in range(0, len(self), count):
            yield self.rows(first, count)

    def bits_per_byte(self, nats: float) -> float:
        """nats: the sum of the losses of all predicted tokens"""
        return nats / math.log(2) / self.bytes


class _Page:
    """Rows while they are filled."""

    def __init__(self, count: int, length: int) -> None:
        self._ids = np.zeros((count, length), np.int64)
        self._begins = np.zeros((count, length), bool)
        self._context = np.ones((count, length), bool)  # what is not to be predicted

    def fill(self, row: int, split: Split, shard: int, at: int, count: int, known: int = 0) -> None:
        """`count` tokens from one on; the first `known` of them are context."""
        split.read(shard, int(at), self._ids[row, :count], self._begins[row, :count])
        self._begins[row, count : count + 1] = True  # padding is a document of its own
        self._context[row, max(known, 1) : count] = False

    def rows(self) -> Rows:
        labels = np.where(self._context | self._begins, IGNORED_LABEL, self._ids)
        self._begins[:, 0] = False
        document_ids = self._begins.cumsum(axis=1, dtype=np.int64)
        return Rows(*map(torch.from_numpy, (self._ids, document_ids, labels)))


def interleave(index: np.ndarray, weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(source of each row, its number among the rows of this source); both int64, like `index`

    Rows go to the sources in an even rhythm: among the first n rows, each source has its share of n to within one row
    for every source. The first source takes every row at which n times its share passes a whole number; the others
    divide the rest in the same way.
    """
    source = np.full_like(index, len(weights) - 1)
    number = index.copy()
    undecided = np.ones(len(index), bool)
    for s in range(len(weights) - 1):
        share = weights[s] / sum(weights[s:])
        before, after = (np.floor(share * n + 0.5).astype(np.int64) for n in (number, number + 1))
        taken = undecided & (after > before)
        source[taken] = s
        undecided &= ~taken
        number = np.where(taken, before, np.where(undecided, number - before, number))
    return source, number


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Where a pseudo-random permutation of 0 ... size - 1 takes each index (int64); key: one uint64 for each.

    A Feistel network (Luby and Rackoff 1988) on the smallest even number of bits, applied again to what falls outside
    (cycle walking, Black and Rogaway 2002): a permutation that needs no table.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    x = index.astype(np.uint64)
    outside = np.ones(len(x), bool)
    while outside.any():
        left, right = x[outside] >> half, x[outside] & mask
        for turn in range(6):
            left, right = right, left ^ (_hash(right, key[outside] + np.uint64(turn)) & mask)
        x[outside] = left << half | right
        outside = x >= size
    return x.astype(np.int64)


def _hash(x: np.ndarray, key: Any) -> np.ndarray:
    """uint64 of integers and keys, well mixed: the finaliser of SplitMix64 (Steele et al. 2014), twice."""
    # not on scalars, whose overflow numpy warns of
    x, key = (np.atleast_1d(value).astype(np.uint64) for value in (x, key))
    x = x + key * np.uint64(0x9E3779B97F4A7C15)
    for _ in range(2):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        x = x ^ x >> np.uint64(31)
    return x


def _check_length(length: int) -> None:
    if length < 2:
        raise UserError(f"a row of length {length} has nothing to predict; make it 2 or more")
