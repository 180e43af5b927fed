"""The data of a study: its text and its tasks as prepared folders of one tokenizer, made once, shared by all runs."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hymba.errors import UserError
from hymba.study.study import Study
from hymba.study.tasks import TASKS, Document, Material, Task
from hymba.tokenizer import Tokenizer
from hymba.train.data import Corpus, Source
from hymba.train.prepare import FORMAT, MANIFEST, Settings, prepare, read_manifest

TEXT = "text"  # name of the text among the sources
# documents of a task beyond what training reads, so that no document comes twice; and what bounds a very long study
MARGIN, LONGEST = 1.1, 2**25
VALIDATION_TOKENS = 2**14  # of each task
TRAIN_SEED, VALIDATION_SEED = 0, 1
HAYSTACK = 2**20  # tokens of text from which haystacks are cut


class Data(NamedTuple):
    """What a study reads."""

    sources: list[Source]  # the text, then the tasks, with their shares
    tokenizer: Tokenizer
    tasks: dict[str, Task]

    @property
    def shares(self) -> dict[str, float]:
        """By the names of the folders."""
        return {source.path: source.weight for source in self.sources}


def make(study: Study, folder: Path, job: Callable[[str, int, str], Any] | None = None) -> Data:
    """Make what is missing in `folder`.

    job: shows progress, as `hymba.cli.terminal.job` does
    Raises `UserError` for text that cannot be used, or if the folder belongs to another study.
    """
    text, settings = str(folder / TEXT), study.text
    if settings.prepared:
        text = settings.prepared
    else:
        prepare(
            Settings(
                settings.train,
                output=Path(text),
                validation=settings.validation,
                train_tokenizer=settings.vocab_size,
            ),
            job,
        )
    tokenizer = Tokenizer.from_pretrained(text)
    tasks = make_tasks(study, text)
    for name, task in tasks.items():
        _write_task(folder / name, task, study.tasks[name].share * study.tokens, study.length)
    shares = {name: settings.share for name, settings in study.tasks.items()}
    sources = [Source(text, 1 - sum(shares.values())), *(Source(str(folder / name), x) for name, x in shares.items())]
    return Data(sources, tokenizer, tasks)


def make_tasks(study: Study, text: str) -> dict[str, Task]:
    """The tasks on the text of a prepared folder."""
    tokenizer = Tokenizer.from_pretrained(text)
    material = Material(tokenizer, _beginning(text, "train", tokenizer), _beginning(text, "validation", tokenizer))
    return {name: TASKS[name](material, settings.cells) for name, settings in study.tasks.items()}


def _beginning(text: str, split: str, tokenizer: Tokenizer) -> list[int]:
    """The first tokens of a split, without those that begin and end documents."""
    shards = Corpus(text).split(split)
    ids = np.empty(min(HAYSTACK, int(shards.shard_tokens[0])), np.int64)
    shards.read(0, 0, ids, np.empty(len(ids), bool))
    control = [id for id in (tokenizer.bos_token_id, tokenizer.eos_token_id) if id is not None]
    return ids[~np.isin(ids, control)].tolist()


def _write_task(folder: Path, task: Task, tokens: float, longest: int) -> None:
    splits = {
        "train": (task.training(longest, TRAIN_SEED), min(LONGEST, MARGIN * tokens)),
        "validation": (task.training(longest, VALIDATION_SEED), VALIDATION_TOKENS),
    }
    recipe = f"{task.name} {task.cells} {longest} {tokens} {task.material.tokenizer.fingerprint()}"
    write_documents(folder, task.material.tokenizer, {n: _first(*x) for n, x in splits.items()}, recipe)


def _first(documents: Iterable[Document], tokens: float) -> Iterable[list[int]]:
    """Documents until they have so many tokens."""
    seen = 0
    for document in documents:
        yield document.ids
        seen += len(document.ids)
        if seen >= tokens:
            return


def write_documents(folder: Path, tokenizer: Tokenizer, splits: dict[str, Iterable[list[int]]], recipe: str) -> None:
    """A prepared folder, as `hymba prepare` writes it, of documents that are token ids already.

    splits: documents from BOS to EOS, not none; recipe: what they are made of; a folder of the same recipe is left as
    it is. Raises `UserError` if there is a folder of another recipe.
    """
    recipe = hashlib.sha256(recipe.encode()).hexdigest()
    if (folder / MANIFEST).exists():
        if read_manifest(folder)["recipe"] != recipe:
            raise UserError(f"{folder} was made by another study; choose another --output, or remove it")
        return
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    entries = {}
    for split, documents in splits.items():
        arrays = [np.array(ids, dtype) for ids in documents]
        starts = np.cumsum([0, *map(len, arrays[:-1])], dtype=np.int64)
        tokens, name = np.concatenate(arrays), f"{split}-00000"
        tokens.tofile(aside / f"{name}.bin")
        np.save(aside / f"{name}.docs.npy", starts)
        digest = hashlib.sha256(tokens.tobytes()).hexdigest()
        shard = {"name": name, "tokens": len(tokens), "starts": len(starts), "sha256": digest}
        text = sum(len(tokenizer.token_bytes(id)) for id in tokens.tolist())
        entries[split] = {"tokens": len(tokens), "documents": len(starts), "bytes": text, "shards": [shard]}
    manifest = {
        "format": FORMAT,
        "recipe": recipe,
        "tokenizer": {"sha256": tokenizer.fingerprint(), "vocab_size": tokenizer.vocab_size},
        "dtype": dtype.name,
        "inputs": {split: [f"task {folder.name}"] for split in splits},
        "splits": entries,
    }
    tokenizer.save_pretrained(aside)
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    aside.rename(folder)
