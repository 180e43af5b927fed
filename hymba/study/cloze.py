"""Cloze tasks from a file: which of several endings belongs to a text, by what each costs a model.

This is how EleutherAI's lm-evaluation-harness scores tasks such as HellaSwag, PIQA or ARC, and LAMBADA, whose texts
have one ending only. A study's `[cloze]` names files of questions, one JSON object a line:

    {"context": "She opened the", "endings": [" door.", " sea."], "answer": 0}
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from hymba.errors import UserError
from hymba.model.hymba import IGNORED_LABEL, Hymba
from hymba.tokenizer import Tokenizer


class Question(NamedTuple):
    context: str
    endings: tuple[str, ...]
    answer: int  # the right one


class Cost(NamedTuple):
    """Of an ending."""

    nats: float
    bytes: int  # in UTF-8
    greedy: bool  # whether greedy decoding would write it


def read(path: str | Path) -> list[Question]:
    """The questions of a file. Raises `UserError` if it cannot be read or is empty, or for a line that is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cloze: {path} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    questions = [_question(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise UserError(f"cloze: {path} has no questions")
    return questions


def _question(line: str, where: str) -> Question:
    try:
        record = json.loads(line)
        context, endings, answer = record["context"], tuple(record["endings"]), record["answer"]
    except (ValueError, KeyError, TypeError):
        context, endings, answer = None, (), None
    whole = isinstance(context, str) and endings and all(isinstance(ending, str) and ending for ending in endings)
    if not whole or type(answer) is not int or not 0 <= answer < len(endings):
        raise UserError(
            f'cloze: {where} is no question; write {{"context": "...", "endings": ["...", "..."], "answer": 0}}'
        )
    return Question(context, endings, answer)


def score(model: Hymba, tokenizer: Tokenizer, questions: Sequence[Question], batch_tokens: int) -> dict[str, Any]:
    """The share of questions in which the right ending costs least, in all and per byte; with one ending only, in which
    greedy decoding would write it.

    batch_tokens: of one forward pass
    """
    pairs = [(question.context, ending) for question in questions for ending in question.endings]
    found = iter(costs(model, tokenizer, pairs, batch_tokens))
    right = right_per_byte = chance = 0.0
    for question in questions:
        of = [next(found) for _ in question.endings]
        if len(of) == 1:
            hit = hit_per_byte = of[0].greedy
        else:
            chance += 1 / len(of)
            hit = min(range(len(of)), key=lambda i: of[i].nats) == question.answer
            hit_per_byte = min(range(len(of)), key=lambda i: of[i].nats / of[i].bytes) == question.answer
        right, right_per_byte = right + hit, right_per_byte + hit_per_byte
    n = len(questions)
    return {"accuracy": right / n, "accuracy_per_byte": right_per_byte / n, "chance": chance / n, "questions": n}


@torch.inference_mode()
def costs(model: Hymba, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], batch_tokens: int) -> list[Cost]:
    """What endings cost after their contexts, each pair alone in its row.

    pairs: contexts and endings. They are encoded together, as they would stand in a text; the ending's tokens are those
    after as many as the context has alone. Of what is longer than the model's longest text the beginning is cut off.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = []
    for context, ending in pairs:
        start = len(bos) + len(tokenizer.encode(context, add_special_tokens=False))
        ids = bos + tokenizer.encode(context + ending, add_special_tokens=False)
        start = max(1, min(start, len(ids) - 1))  # something must be predicted, and from something
        cut = max(0, min(start - 1, len(ids) - model.config.max_length))
        rows.append((ids[cut:], start - cut))
    longest = max(len(ids) for ids, _ in rows)
    size, found = max(1, batch_tokens // longest), []
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        # padding stands on the right, where no token that counts can see it
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in part], device=model.norm.weight.device)
        labels = ids[:, 1:].clone()
        for row, (tokens, start) in zip(labels, part, strict=True):
            row[: start - 1], row[len(tokens) - 1 :] = IGNORED_LABEL, IGNORED_LABEL
        logits = model(ids)[:, :-1].float()
        nats = F.cross_entropy(logits.mT, labels, ignore_index=IGNORED_LABEL, reduction="none").sum(1).tolist()
        greedy = ((logits.argmax(-1) == labels) | (labels == IGNORED_LABEL)).all(1).tolist()
        found += zip(nats, greedy, strict=True)
    return [Cost(nats, len(ending.encode()), greedy) for (_, ending), (nats, greedy) in zip(pairs, found, strict=True)]
