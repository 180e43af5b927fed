"""Rows to train and validate on: every token is predicted once an epoch, and nothing depends on how one asks."""

import hashlib
import json
import re
import tempfile
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba.errors import UserError
from hymba.train.data import Corpus, Rows, Source, TrainingRows, ValidationRows, interleave, permute

# documents of some shards, by their length
shards = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=8), min_size=1, max_size=3)
lengths = st.integers(2, 50)


def write_corpus(folder: Path, shards: list[list[int]], split: str = "train", tokenizer: str = "t") -> None:
    """A prepared folder in which token i of the split has the id i."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, first = [], 0
    for number, documents in enumerate(shards):
        tokens = sum(documents)
        name = f"{split}-{number:05}"
        np.arange(first, first + tokens, dtype="<u4").tofile(folder / f"{name}.bin")
        np.save(folder / f"{name}.docs.npy", np.cumsum([0, *documents[:-1]]))
        entries.append({"name": name, "tokens": tokens, "starts": len(documents)})
        first += tokens
    write_manifest(folder, {split: {"tokens": first, "documents": 1, "bytes": 3 * first, "shards": entries}}, tokenizer)


def write_manifest(folder: Path, splits: dict, tokenizer: str = "t") -> None:
    manifest = {"format": 1, "dtype": "uint32", "tokenizer": {"sha256": tokenizer, "vocab_size": 10}, "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@contextmanager
def corpus(shards: list[list[int]], split: str = "train"):
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), shards, split)
        yield folder


def starts_of(shards: list[list[int]]) -> set[int]:
    ends = np.cumsum([n for documents in shards for n in documents])
    return {0, *ends[:-1].tolist()}


def shard_ranges(shards: list[list[int]]) -> list[range]:
    ends = np.cumsum([0, *map(sum, shards)]).tolist()
    return [range(a, b) for a, b in pairwise(ends)]


def predicted(rows: Rows, starts: set[int]) -> Counter:
    """What the rows predict; on the way, that each row is what `Hymba.forward` expects."""
    found = []
    for ids, documents, labels in zip(*(part.tolist() for part in rows), strict=True):
        assert documents[0] == 0 and labels[0] == -100
        for t in range(1, len(ids)):
            assert documents[t] - documents[t - 1] in (0, 1)
            if labels[t] == -100:
                continue
            assert labels[t] == ids[t] == ids[t - 1] + 1  # after its neighbour in the text
            assert documents[t] == documents[t - 1] and ids[t] not in starts
            found.append(labels[t])
        real = max((t for t in range(len(ids)) if labels[t] != -100), default=-1)
        for t in range(1, real + 1):
            assert (documents[t] != documents[t - 1]) == (ids[t] in starts)
    return Counter(found)


@given(shards, lengths, st.integers(0, 2**40), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_an_epoch_predicts_every_token_once(shards, length, seed, epoch):
    with corpus(shards) as folder:
        rows = TrainingRows([Source(folder)], length, seed)
        count = sum(-(-sum(documents) // (length - 1)) for documents in shards)
        starts, total = starts_of(shards), sum(map(sum, shards))
        assert predicted(rows.rows(epoch * count, count), starts) == Counter(set(range(total)) - starts)
        assert rows.tokens_per_epoch == total


@given(shards, lengths, st.data())
@settings(deadline=None, max_examples=60)
def test_validation_predicts_every_token_once_with_context(shards, length, data):
    stride = data.draw(st.integers(1, length - 1))
    with corpus(shards, "validation") as folder:
        rows = ValidationRows(folder, length, stride)
        starts, total = starts_of(shards), sum(map(sum, shards))
        found = Counter()
        for batch in rows.batches(3):
            found += predicted(batch, starts)
            for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
                for t in range(length):
                    if labels[t] != -100:
                        start = max(s for s in starts if s <= ids[t])
                        shard = next(r for r in shard_ranges(shards) if ids[t] in r)
                        assert t >= min(length - stride, ids[t] - max(start, shard.start))
        assert found == Counter(set(range(total)) - starts)
        assert rows.tokens == total - len(starts)
        assert rows.bits_per_byte(8 * 3 * total * np.log(2)) == pytest.approx(8)


@given(shards, shards, lengths, st.integers(1, 30), st.data())
@settings(deadline=None, max_examples=40)
def test_rows_do_not_depend_on_how_they_are_asked_for(one, other, length, first, data):
    with corpus(one) as a, corpus(other) as b:
        sources = [Source(a, 0.7), Source(b, 0.4)]
        rows = TrainingRows(sources, length, seed=5)
        whole = rows.rows(0, first + 40)
        count = data.draw(st.integers(1, 40))
        part = TrainingRows(sources, length, seed=5).rows(first, count)
        for x, y in zip(part, whole, strict=True):
            assert x.dtype == torch.int64 and x.shape == (count, length)
            assert torch.equal(x, y[first : first + count])


def test_epochs_and_seeds_differ_in_order_and_in_cuts():
    with corpus([[1000]]) as folder:
        epoch = [TrainingRows([Source(folder)], 101, seed=0).rows(10 * e, 10).input_ids[:, 0].tolist() for e in (0, 1)]
        other = TrainingRows([Source(folder)], 101, seed=1).rows(0, 10).input_ids[:, 0].tolist()
    assert len({tuple(np.argsort(x)) for x in (*epoch, other)}) == 3
    assert len({min(x) for x in (*epoch, other)}) == 3


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(np.arange(size), size, np.full(size, key, np.uint64)).tolist()) == list(range(size))


def test_permute_favours_no_place():
    keys = np.repeat(np.arange(4000, dtype=np.uint64), 7)
    found = permute(np.tile(np.arange(7), 4000), 7, keys).reshape(4000, 7)
    for place in range(7):
        counts = np.bincount(found[:, place], minlength=7)
        assert abs(counts - 4000 / 7).max() < 5 * (4000 / 7) ** 0.5  # five sigma


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5), st.integers(1, 3000))
def test_weights_are_met_by_every_prefix(weights, count):
    source, number = interleave(np.arange(count), weights)
    for s, weight in enumerate(weights):
        mine = number[source == s]
        assert mine.tolist() == list(range(len(mine)))  # none left out, in order
        assert abs(len(mine) - count * weight / sum(weights)) <= len(weights)


def test_interleave_far_away():
    source, number = interleave(np.arange(10**12, 10**12 + 1000), [1, 3])
    assert abs((source == 0).sum() - 250) <= 1
    assert (np.diff(number[source == 1]) == 1).all()


def anonymous_memory() -> int:
    """KiB of this process, without the pages of mapped files, which the system takes back when it likes."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_ten_billion_tokens_need_no_memory(tmp_path):
    tokens, count = 2**26, 150  # sparse files: 40 GB that take no room
    entries = []
    for number in range(count):
        name = f"train-{number:05}"
        with open(tmp_path / f"{name}.bin", "wb") as file:
            file.truncate(4 * tokens)
        np.save(tmp_path / f"{name}.docs.npy", np.array([0]))
        entries.append({"name": name, "tokens": tokens, "starts": 1})
    write_manifest(tmp_path, {"train": {"tokens": tokens * count, "documents": count, "bytes": 1, "shards": entries}})
    before = anonymous_memory()
    rows = TrainingRows([Source(str(tmp_path))], 2048, seed=0)
    for first in (0, 10**6, 10**9):
        assert rows.rows(first, 300).input_ids.shape == (300, 2048)
        assert anonymous_memory() - before < 40 * 1024  # the rows themselves are 15 MB


def test_fingerprint_follows_content(tmp_path):
    def fingerprint(length=8, seed=0, weight=1.0):
        return TrainingRows([Source(str(tmp_path), weight)], length, seed).fingerprint

    write_corpus(tmp_path, [[5, 6]])
    first = fingerprint()
    assert first == fingerprint()
    write_corpus(tmp_path, [[5, 7]])
    assert len({first, fingerprint(), fingerprint(length=9), fingerprint(seed=1), fingerprint(weight=2.0)}) == 5
    assert Corpus(str(tmp_path)).fingerprint == hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()


def test_mistakes_cost_one_line(tmp_path):
    good, other = tmp_path / "good", tmp_path / "other"
    write_corpus(good, [[5, 6]])
    write_corpus(other, [[5]], tokenizer="u")

    def fails(words, call):
        with pytest.raises(UserError, match=words):
            call()

    fails("no prepared data", lambda: TrainingRows([Source(str(tmp_path))], 8, 0))
    fails("different tokenizers", lambda: TrainingRows([Source(str(good)), Source(str(other))], 8, 0))
    fails("weight", lambda: TrainingRows([Source(str(good), 0.0)], 8, 0))
    fails("nothing to predict", lambda: TrainingRows([Source(str(good))], 1, 0))
    fails("at least one", lambda: TrainingRows([], 8, 0))
    fails("no validation split", lambda: ValidationRows(str(good), 8))
    fails("stride=8", lambda: ValidationRows(str(good), 8, 8))
    fails("no 0 rows", lambda: TrainingRows([Source(str(good))], 8, 0).rows(0, 0))
    (good / "train-00000.bin").write_bytes(b"1234")
    fails("not of the size", lambda: TrainingRows([Source(str(good))], 8, 0))
    np.save(other / "train-00000.docs.npy", np.array([0, 9]))
    fails("does not fit", lambda: TrainingRows([Source(str(other))], 8, 0).rows(0, 1))
    (good / "manifest.json").write_text("{")
    fails("cannot be read", lambda: TrainingRows([Source(str(good))], 8, 0))
