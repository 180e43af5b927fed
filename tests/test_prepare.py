"""`hymba prepare`: the same documents give the same bytes, whatever they come in, however often the run is killed."""

import fcntl
import gzip
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from hymba import Tokenizer
from hymba.cli import run
from hymba.errors import UserError
from hymba.train import prepare as preparing
from hymba.train import text as reading
from hymba.train.data import Corpus, Source, TrainingRows
from hymba.train.prepare import Settings, prepare
from hymba.train.text import find_inputs

try:
    import datasets
    import pyarrow
    from pyarrow import parquet
except ImportError:
    has_arrow = False
else:
    has_arrow = True

ROOT = Path(__file__).resolve().parents[1]
AUSTEN = ROOT / "data" / "austen"
DOCUMENTS = [
    "It is a truth universally acknowledged,\nthat a single man",
    "Emma Woodhouse, handsome, clever, and rich — “with a comfortable home”\r\n\r\n",
    " 1234567 </s> <s> \t日本語。 naïve 🎈\u0301",
    "x",
    "\n\n",
] + [f"Chapter {i}\n\n" + "She was not a woman of many words; " * i for i in range(1, 40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(DOCUMENTS, 320).save_pretrained(folder)
    return folder


@pytest.fixture
def small(monkeypatch):
    """Pieces and batches so small that a few kilobytes have many."""
    monkeypatch.setattr(reading, "PIECE", 512)
    monkeypatch.setattr(preparing, "BATCH", 2000)
    monkeypatch.setattr(preparing, "SURE_BEGINNING", 128)


def write_jsonl(path: Path, documents=DOCUMENTS, field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(documents)))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def shards(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith((".bin", ".npy"))}


def documents_of(folder: Path, split: str = "train") -> list[str]:
    """The documents of a prepared folder, decoded."""
    corpus = Corpus(str(folder))
    tokenizer, found = corpus.tokenizer(), []
    for shard in corpus.manifest["splits"][split]["shards"]:
        ids = np.fromfile(folder / f"{shard['name']}.bin", "<u2").tolist()
        starts = np.load(folder / f"{shard['name']}.docs.npy").tolist()
        assert shard["tokens"] == len(ids) and shard["starts"] == len(starts)
        found += [tokenizer.decode(ids[a:b], True) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return found


def test_documents_come_back(tmp_path, tokenizer):
    manifest = prepare(Settings((str(write_jsonl(tmp_path / "a.jsonl")),), tmp_path / "out", tokenizer=str(tokenizer)))
    assert documents_of(tmp_path / "out") == DOCUMENTS
    split = manifest["splits"]["train"]
    assert split["documents"] == len(DOCUMENTS) and split["bytes"] == sum(len(text.encode()) for text in DOCUMENTS)
    ids = np.fromfile(tmp_path / "out" / "train-00000.bin", "<u2")
    starts = np.load(tmp_path / "out" / "train-00000.docs.npy")
    assert starts.dtype == np.int64 and (ids[starts] == 1).all() and (ids[starts[1:] - 1] == 2).all() and ids[-1] == 2
    assert (ids == 1).sum() == (ids == 2).sum() == len(DOCUMENTS)  # what spells </s> is no end of a document
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def test_every_kind_of_input_gives_the_same_bytes(tmp_path, tokenizer, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    write_jsonl(tmp_path / "c.dat", field="content")
    (tmp_path / "d.txt").write_bytes("<|sep|>".join(DOCUMENTS).encode("utf-8-sig"))
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for i, text in enumerate(DOCUMENTS):
        (tmp_path / "folder" / "deep" / f"{i:03}.txt").write_bytes(text.encode())
    (tmp_path / "folder" / "README.md").write_text("not a document")
    cases = {
        "a.jsonl": {},
        "b.jsonl.gz": {},
        "c.dat": {"format": "jsonl", "field": "content"},
        "d.txt": {"split_on": "<|sep|>"},
        "folder": {},
        "folder/**/*.txt": {},
        "-": {"format": "jsonl"},
    }
    if has_arrow:
        table = pyarrow.table({"id": range(len(DOCUMENTS)), "text": DOCUMENTS})
        parquet.write_table(table, tmp_path / "e.parquet", row_group_size=7)
        datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
        cases |= {"e.parquet": {}, "saved": {}}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "a.jsonl").read_bytes())))
    for name, options in cases.items():
        prepare(Settings((name,), Path("out", name.replace("/", "_").replace("*", "x")), str(tokenizer), **options))
    found = {path.name: shards(path) for path in (tmp_path / "out").iterdir()}
    assert len(found) == len(cases)
    for name, data in found.items():
        assert data == found["a.jsonl"], name


def test_reading_goes_on_from_every_position(tmp_path, small):
    texts = ["日本 語。" * 300, *DOCUMENTS, "word " * 400]
    write_jsonl(tmp_path / "a.jsonl", texts)
    if has_arrow:
        parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "b.parquet", row_group_size=7)
    (tmp_path / "c.txt").write_bytes("##".join(texts).encode("utf-8-sig"))
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress("".join(texts).encode()))
    for name in ("a.jsonl", "c.txt", "d.txt.gz", *["b.parquet"] * has_arrow):
        (source,) = find_inputs(str(tmp_path / name))
        options = ("text", "##" if name == "c.txt" else None, reading.cut_at_space)
        pieces = list(source.pieces(0, *options))
        assert len(pieces) > 10 and not all(piece.last for piece in pieces)
        for i, piece in enumerate(pieces):
            if piece.position is not None:
                assert list(source.pieces(piece.position, *options)) == pieces[i + 1 :]


def sentencepiece_tokenizer(folder: Path) -> None:
    """After the released one: a blank in front of every text, and no splitting before the merges."""
    pairs = ["h e", "▁ t", "▁t he", "▁ w", "o r", "▁w or", "▁ s", "h he", "e ▁", "▁ ▁"]
    characters = sorted(set("".join(DOCUMENTS).replace(" ", "▁")) | {"▁"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *characters]
    merges = [tuple(pair.split()) for pair in pairs]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*tokens, *map("".join, merges)]))}
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_a_long_document_is_cut_where_its_tokens_do_not_change(tmp_path, tokenizer, small, kind):
    if kind == "sentencepiece":
        tokenizer = tmp_path / "tokenizer"
        sentencepiece_tokenizer(tokenizer)
    text = "".join(DOCUMENTS)
    assert len(text) > 30 * reading.PIECE
    (tmp_path / "a.txt").write_bytes(text.encode())
    manifest = prepare(Settings((str(tmp_path / "a.txt"),), tmp_path / "out", str(tokenizer), shard_tokens=10**9))
    ids = np.fromfile(tmp_path / "out" / "train-00000.bin", "<u2").tolist()
    assert ids == [1, *Tokenizer.from_pretrained(tokenizer).encode_plain([text])[0], 2]
    assert manifest["splits"]["train"]["bytes"] == len(text.encode())


@given(st.text(), st.sampled_from(["\n\n", "a", "##"]))
@settings(deadline=None)
def test_documents_of_a_text_file(tmp_path_factory, text, separator):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    (source,) = find_inputs(str(path))
    pieces = list(source.pieces(0, "text", separator, reading.cut_at_space))
    assert [piece.text for piece in pieces] == [part for part in text.split(separator) if part]
    assert all(piece.size == len(piece.text.encode()) and piece.last for piece in pieces)


def test_shards_hold_the_same_stream(tmp_path, tokenizer, small):
    source = write_jsonl(tmp_path / "a.jsonl", [*DOCUMENTS, "one long document " * 500])
    for name, size in (("one", 10**9), ("many", 700)):
        prepare(Settings((str(source),), tmp_path / name, str(tokenizer), shard_tokens=size))
    one, many = (Corpus(str(tmp_path / name)) for name in ("one", "many"))
    names = [shard["name"] for shard in many.manifest["splits"]["train"]["shards"]]
    assert len(names) > 5
    whole = b"".join((tmp_path / "many" / f"{name}.bin").read_bytes() for name in names)
    assert whole == (tmp_path / "one" / "train-00000.bin").read_bytes()
    split = one.manifest["splits"]["train"]
    assert all(many.manifest["splits"]["train"][key] == split[key] for key in ("tokens", "documents", "bytes"))
    assert TrainingRows([Source(str(tmp_path / "many"))], 64, 0).rows(0, 1000).input_ids.shape == (1000, 64)


def test_validation_files_stay_out_of_training(tmp_path):
    for name, text in (("a.txt", "the cat sat " * 50), ("b.txt", "a dog ran " * 50), ("c.txt", "zzzz qqqq " * 500)):
        (tmp_path / name).write_text(text)
    held_out = (str(tmp_path / "c.txt"),)
    manifest = prepare(Settings((str(tmp_path),), tmp_path / "out", train_tokenizer=300, validation=held_out))
    assert [manifest["splits"][split]["documents"] for split in ("train", "validation")] == [2, 1]
    assert documents_of(tmp_path / "out", "validation") == [(tmp_path / "c.txt").read_text()]
    without = (str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
    prepare(Settings(without, tmp_path / "alone", train_tokenizer=300))
    for name in ("tokenizer.json", "train-00000.bin"):
        assert contents(tmp_path / "out")[name] == contents(tmp_path / "alone")[name]


def test_a_tokenizer_learns_from_a_sample_of_much_text(tmp_path, monkeypatch):
    texts = [f"{chr(97 + i % 26) * 3} {chr(97 + i // 26) * 3} " * 20 for i in range(26 * 26)]
    source, seen = write_jsonl(tmp_path / "a.jsonl", texts), []
    train = Tokenizer.train
    monkeypatch.setattr(preparing, "TOKENIZER_TEXT", source.stat().st_size // 10)
    monkeypatch.setattr(Tokenizer, "train", lambda texts, size: train((seen.append(t) or t for t in texts), size))
    prepare(Settings((str(source),), tmp_path / "out", train_tokenizer=300))
    assert 30 < len(seen) < 100
    assert len({text[4] for text in seen}) > 15  # from everywhere


def test_validation_fraction(tmp_path, tokenizer, small):
    texts = [f"document number {i % 300} " * (1 + i % 60) for i in range(1200)]  # each several times
    source = str(write_jsonl(tmp_path / "a.jsonl", texts))
    options = {"tokenizer": str(tokenizer), "validation_fraction": 0.2}
    prepare(Settings((source,), tmp_path / "out", **options))
    train, validation = (documents_of(tmp_path / "out", split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(texts)
    assert 0.1 < len(validation) / len(texts) < 0.3
    assert not set(train) & set(validation)  # equal documents are in one split
    prepare(Settings((source,), tmp_path / "other", seed=1, **options))
    assert documents_of(tmp_path / "other", "validation") != validation
    prepare(Settings((source,), tmp_path / "trained", train_tokenizer=300, validation_fraction=0.2))
    assert documents_of(tmp_path / "trained", "validation") == validation
    train_only = Tokenizer.train(train, 300)
    assert Tokenizer.from_pretrained(tmp_path / "trained").fingerprint() == train_only.fingerprint()


# Killed in the middle of the n-th line of our own code that runs, wherever that is.
KILLED = """
import os, signal, sys
from pathlib import Path
from hymba.train import prepare as p, text
text.PIECE, p.BATCH, p.BATCHES_PER_SAVE, p.SURE_BEGINNING = 512, 2000, 2, 128
left = int(sys.argv[1])
def trace(frame, event, argument):
    global left
    if not frame.f_code.co_filename.endswith(("prepare.py", "files.py")):
        return None
    left -= event == "line"
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return trace
if left:
    sys.settrace(trace)
options = {"train_tokenizer": 300, "validation_fraction": 0.2, "shard_tokens": 4000}
p.prepare(p.Settings((sys.argv[2],), Path(sys.argv[3]), **options))
print(-left)
"""


def run_killed(source: Path, output: Path, line: int) -> tuple[int, str]:
    command = [sys.executable, "-c", KILLED, str(line), str(source), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path, kills):
    source = write_jsonl(tmp_path / "a.jsonl", [*DOCUMENTS, "one long document " * 500, *DOCUMENTS])
    _, lines = run_killed(source, tmp_path / "whole", 10**9)
    total, draw = 10**9 + int(lines), random.Random(kills)
    expected, killed, output = contents(tmp_path / "whole"), 0, tmp_path / "out"
    while killed < kills:
        while run_killed(source, output, draw.randint(1, total))[0]:
            killed += 1
            assert not output.exists() or contents(output) == expected  # there is the whole folder or none
        assert contents(output) == expected
        shutil.rmtree(output)
    run_killed(source, output, total * 9 // 10)
    _, lines = run_killed(source, output, 10**9)
    assert 10**9 + int(lines) < total / 2  # it went on, and did not begin again


def test_done_work_is_not_done_again_and_other_work_is_kept(tmp_path, tokenizer):
    source, output = write_jsonl(tmp_path / "a.jsonl"), tmp_path / "out"
    given = Settings((str(source),), output, str(tokenizer))
    manifest = prepare(given)
    before = output.stat().st_mtime_ns, (output / "train-00000.bin").stat().st_mtime_ns
    assert prepare(given) == manifest
    assert (output.stat().st_mtime_ns, (output / "train-00000.bin").stat().st_mtime_ns) == before
    with pytest.raises(UserError, match="other input or options"):
        prepare(replace(given, seed=1))
    write_jsonl(source)
    with pytest.raises(UserError, match="other input or options"):
        prepare(given)


def test_interrupted_work_on_something_else_is_not_thrown_away(tmp_path, tokenizer, small, monkeypatch):
    source, output = write_jsonl(tmp_path / "a.jsonl"), tmp_path / "out"
    given = Settings((str(source),), output, str(tokenizer))
    monkeypatch.setattr(preparing, "BATCHES_PER_SAVE", 1)
    monkeypatch.setattr(preparing._Preparation, "_conclude", lambda self: os.write(-1, b""))
    with pytest.raises(UserError, match="cannot write"):
        prepare(given)
    monkeypatch.undo()
    with pytest.raises(UserError, match="interrupted work"):
        prepare(replace(given, seed=1))
    with open(tmp_path / "out.partial" / "lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            prepare(given)
    prepare(given)
    assert documents_of(output) == DOCUMENTS


def run_limited(limit: int, source: Path, output: Path, tokenizer: Path) -> subprocess.CompletedProcess:
    """Prepare where no file may grow beyond `limit` bytes."""
    command = [sys.executable, "-m", "hymba", "prepare", source, "--tokenizer", tokenizer, "-o", output]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
    )  # fmt: skip


def test_a_full_disk_costs_one_line_and_no_work(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS * 3)
    failed = run_limited(40_000, source, tmp_path / "out", tokenizer)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
    assert "cannot write" in failed.stderr and "same command again" in failed.stderr
    assert not (tmp_path / "out").exists()
    assert run_limited(10**9, source, tmp_path / "out", tokenizer).returncode == 0
    assert documents_of(tmp_path / "out") == DOCUMENTS * 3


# Peak memory of the process in KiB, in front of the work and behind it.
MEASURED = """
import sys
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from hymba.train.prepare import Settings, prepare
import hymba.convert
for n, source in enumerate(sys.argv[2:]):
    prepare(Settings((source,), Path(f"{source}.out"), sys.argv[1]))
    print(getrusage(RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path, tokenizer):
    text = "".join(path.read_text() for path in sorted(AUSTEN.glob("*.txt")))
    small, document, lines = tmp_path / "small.txt", tmp_path / "one.txt", tmp_path / "many.jsonl"
    small.write_text(text * 2)
    document.write_text(text * 16)
    lines.write_text("".join(json.dumps({"text": part}) + "\n" for part in (text * 8).split("\n\n")))
    command = [sys.executable, "-c", MEASURED, tokenizer, small, document, lines]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    first, *others = map(int, done.stdout.split())
    assert max(others) - first < 24 * 1024  # the large inputs have 64 and 32 MB


@pytest.fixture
def command(tmp_path, tokenizer, capfd, monkeypatch):
    """Run `hymba prepare` in a folder of its own -> exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        if not {"--tokenizer", "--train-tokenizer"} & set(arguments):
            arguments += ("--tokenizer", str(tokenizer))
        return run(["prepare", *arguments, "-o", "out"]), *capfd.readouterr()

    return call


MISTAKES = {
    "nothing there": ([], "no-such-file.txt", "there is no such file"),
    "empty": (b"", "a.txt", "no text in a.txt"),
    "latin-1": ("Se\xf1or".encode("latin-1"), "a.txt", "a.txt is not UTF-8 at byte 2; convert it"),
    "cut character": ("日本".encode()[:-1], "a.txt", "not UTF-8 at byte 3"),
    "no field": (b'{"text": "a"}\n\n{"body": "b"}\n', "a.jsonl", "a.jsonl line 3 has no field 'text' (there is body)"),
    "no text": (b'{"text": 7}\n', "a.jsonl", "a.jsonl line 1: 'text' is no text but of type int"),
    "no JSON": (b'{"text": "a"}\n{"text": \n', "a.jsonl", "a.jsonl line 2 is not JSON"),
    "no object": (b"[1]\n", "a.jsonl", "a.jsonl line 1 is no JSON object"),
    "JSON in latin-1": (b'{"text": "Se\xf1or"}\n', "a.jsonl", "a.jsonl line 1 is not UTF-8 (byte 12)"),
    "half a character": (b'{"text": "\\ud83c"}\n', "a.jsonl", "half a surrogate pair"),
    "no gzip": (b"hello", "a.txt.gz", "a.txt.gz cannot be read"),
    "cut gzip": (gzip.compress(b"hello " * 99)[:-9], "a.txt.gz", "a.txt.gz cannot be read"),
    "no Parquet": (b"hello", "a.parquet", "a.parquet"),  # not readable, or not without pyarrow
    "folder without text": ([], ".", "no file in it ends in .txt, .jsonl"),
    "only validation": (b"a", "a.txt --validation a.txt", "nothing is left to train on"),
    "no validation": (b"a", "a.txt --validation-fraction 0.0001", "no document got into the validation split"),
    "two validations": (b"a", "a.txt --validation a.txt --validation-fraction 0.1", "exclude each other"),
    "two tokenizers": (b"a", "a.txt --tokenizer x --train-tokenizer 300", "choose a tokenizer"),
    "no tokenizer": (b"a", "a.txt --tokenizer ./nowhere", "no such folder"),
    "small vocabulary": (b"a", "a.txt --train-tokenizer 100", "too small"),
    "unknown format": (b"a", "a.txt --format xml", "choose from text, jsonl, parquet"),
    "empty separator": (b"a", "a.txt --split-on=", "separator"),
    "fraction": (b"a", "a.txt --validation-fraction 1", "less than 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_line(command, tmp_path, name):
    content, line, words = MISTAKES[name]
    arguments = line.split(" ")
    if content != []:
        (tmp_path / arguments[0]).write_bytes(content)
    status, out, err = command(*arguments)
    assert (status, out) == (2, "") and err.count("\n") == 1 and words in err, err


def test_a_full_folder_is_not_touched(command, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    status, _, err = command("a.txt")
    assert status == 2 and "not empty" in err and (tmp_path / "out" / "mine").exists()


def test_the_line_is_named_after_a_resumed_run_too(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 5 + '{"body": "b"}\n')
    (source,) = find_inputs(str(path))
    with pytest.raises(UserError, match="line 6 has no field"):
        list(source.pieces(3 * 14, "text", None, reading.cut_at_space))


def test_summary(command, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    status, out, err = command("a.txt", "--split-on", r"\n\n", "--validation-fraction", "0.5", "--json")
    assert (status, err) == (0, "")
    splits = json.loads(out)["splits"]
    assert sum(split["documents"] for split in splits.values()) == 3
    status, out, err = command("a.txt", "--split-on", r"\n\n", "--validation-fraction", "0.5")
    assert (status, err) == (0, "")
    assert re.search(r"train +[\d,]+ tokens +\d documents", out) and "validation" in out


def test_transformers_reads_the_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    prepare(Settings((str(AUSTEN / "emma.txt"),), tmp_path / "out", train_tokenizer=600))
    ours = Tokenizer.from_pretrained(tmp_path / "out")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    for text in DOCUMENTS:
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode_plain([text])[0]) == text == ours.decode(ours.encode_plain([text])[0])
    ids = theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id
    assert ids == (0, 1, 2) == (ours.pad_token_id, ours.bos_token_id, ours.eos_token_id)


@given(st.text())
def test_a_trained_tokenizer_loses_nothing(tokenizer, text):
    ours = Tokenizer.from_pretrained(tokenizer)
    assert ours.decode(ours.encode_plain([text])[0]) == text
