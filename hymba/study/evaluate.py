"""What a trained arm knows: the share of right answers in every setting of every task."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hymba.model.hymba import Hymba
from hymba.study.tasks import Cell, Document, Task


@torch.inference_mode()
def score(
    model: Hymba, task: Task, documents: int, batch_tokens: int, advance: Callable[[], object] = lambda: None
) -> list[dict[str, Any]]:
    """The settings of a task, with the share of answers that are right and that of guesses.

    documents: of each setting; batch_tokens: of one forward pass; advance: called after each setting
    """
    scores = []
    for cell in task.cells:
        right = answers(model, task.test(cell, documents), batch_tokens)
        scores.append(_record(cell, right, task.chance(cell)))
        advance()
    return scores


def answers(model: Hymba, documents: Sequence[Document], batch_tokens: int) -> list[bool]:
    """Whether each answer of each document, in order, is what greedy decoding would write."""
    longest = max(len(document.ids) for document in documents)
    size, right = max(1, batch_tokens // longest), []
    for first in range(0, len(documents), size):
        part = documents[first : first + size]
        # padding stands on the right, where no token that counts can see it
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in part], device=model.norm.weight.device)
        hidden = model.hidden(ids)
        for row, document in enumerate(part):
            right += _right(model, hidden[row], ids[row], document)
    return right


def _right(model: Hymba, hidden: Tensor, ids: Tensor, document: Document) -> list[bool]:
    """hidden: (T, D), ids: (T,)"""
    places = torch.tensor([i for places in document.answers for i in places], device=ids.device)
    hits = (model.lm_head(hidden[places - 1]).argmax(-1) == ids[places]).tolist()
    return [all(hits.pop(0) for _ in places) for places in document.answers]


def _record(cell: Cell, right: list[bool], chance: float) -> dict[str, Any]:
    depth = {} if cell.depth is None else {"depth": cell.depth}
    return {"size": cell.size, **depth, "accuracy": sum(right) / len(right), "answers": len(right), "chance": chance}
