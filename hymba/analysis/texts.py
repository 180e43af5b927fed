"""What the analyses read: prose, numbers and code, so that they need no download."""

import random
from importlib.resources import files

import torch
from torch import Tensor

from hymba.errors import UserError
from hymba.tokenizer import Tokenizer

CODE = ("hymba.py", "attention.py", "mamba.py", "cache.py", "layout.py")


def prose() -> str:
    """The first four chapters of Jane Austen's Persuasion (1818), which no model of this package was trained on."""
    return (files("hymba") / "assets" / "prose.txt").read_text(encoding="utf-8")


def numbers(lines: int = 1500, seed: int = 0) -> str:
    """A table of measurements and sums: every line a date, three counts, their total, and a mean."""
    draw = random.Random(seed)
    rows = ["date,first,second,third,total,mean"]
    for _ in range(lines):
        date = f"{draw.randint(1990, 2029)}-{draw.randint(1, 12):02}-{draw.randint(1, 28):02}"
        counts = [draw.randint(0, 10 ** draw.randint(1, 5)) for _ in range(3)]
        rows.append(f"{date},{','.join(map(str, counts))},{sum(counts)},{sum(counts) / 3:.2f}")
    return "\n".join(rows) + "\n"


def code() -> str:
    """This package's model, in Python."""
    return "\n".join((files("hymba") / "model" / name).read_text(encoding="utf-8") for name in CODE)


KINDS = {"prose": prose, "numbers": numbers, "code": code}


def encode(tokenizer: Tokenizer, text: str, rows: int, length: int) -> Tensor:
    """The beginning of a text in rows of equal length; BOS, where there is one, begins every row.

    -> (R, T): `rows` and `length`, or less of a short text. Raises `UserError` if it has no two tokens.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer.encode(text, add_special_tokens=False)
    piece = min(length - len(bos), len(ids))
    if len(bos) + piece < 2:
        raise UserError("the text is too short to be analyzed; give one of several hundred words")
    count = min(rows, len(ids) // piece)
    return torch.tensor([bos + ids[i * piece : (i + 1) * piece] for i in range(count)])


def text_bytes(tokenizer: Tokenizer, rows: Tensor) -> int:
    """Bytes of text that are predicted in `rows`: all tokens but the first of each."""
    return sum(len(tokenizer.token_bytes(id)) for id in rows[:, 1:].flatten().tolist())
