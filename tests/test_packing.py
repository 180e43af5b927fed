"""Packed rows: each document sees the meta tokens and itself only, in both kinds of head."""

import pytest
import torch
from conftest import (
    VARIANTS,
    WINDOW,
    assert_close,
    assert_same_gradients,
    each_variant,
    gradients,
    random_ids,
    tiny_model,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hymba import Hymba

PACKABLE = {name: changes for name, changes in VARIANTS.items() if changes.get("rope") != "dynamic_ntk"}
variants = st.sampled_from(list(PACKABLE.values()))
# documents shorter than the convolution and longer than the window
documents = st.lists(st.integers(1, 2 * WINDOW), min_size=1, max_size=5)
MIXED = [[1, 2 * WINDOW + 3, 1, 2, WINDOW], [WINDOW + 1, 3, 2]]


def pack(rows: list[list[int]], seed: int = 0) -> tuple[list[list[Tensor]], Tensor, Tensor, Tensor]:
    """Rows of documents of these lengths, filled up on the right -> the documents, ids, document ids, mask

    Ids of documents come back in a row: that neighbours differ is what counts.
    """
    texts = [[random_ids(1, n, seed=seed + 10 * r + d)[0] for d, n in enumerate(row)] for r, row in enumerate(rows)]
    width = max(sum(row) for row in rows)
    ids, document_ids = random_ids(len(rows), width, seed=seed + 99), torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for r, row in enumerate(texts):
        packed = torch.cat(row)
        ids[r, : len(packed)], mask[r, : len(packed)] = packed, 1
        document_ids[r, : len(packed)] = torch.cat([torch.full_like(text, d % 2) for d, text in enumerate(row)])
    return texts, ids, document_ids, mask


def assert_each_document_alone(model: Hymba, logits: Tensor, texts: list[list[Tensor]], mask: Tensor) -> None:
    for row, packed in enumerate(texts):
        parts = logits[row, mask[row] != 0].split([len(text) for text in packed])
        for part, text in zip(parts, packed, strict=True):
            assert_close(part, model(text[None])[0])


@each_variant
@torch.no_grad()
def test_every_variant(changes):
    if changes.get("rope") == "dynamic_ntk":
        pytest.skip("refused, see test_model.py")
    model = tiny_model(**changes)
    texts, ids, document_ids, mask = pack(MIXED)
    assert_each_document_alone(model, model(ids, document_ids=document_ids, attention_mask=mask), texts, mask)


@given(variants, documents)
@torch.no_grad()
def test_packed_documents_equal_the_documents_alone(changes, lengths):
    model = tiny_model(**changes)
    texts, ids, document_ids, mask = pack([lengths])
    assert_each_document_alone(model, model(ids, document_ids=document_ids), texts, mask)


@given(variants, st.data())
@torch.no_grad()
def test_packed_rows_may_be_padded(changes, data):
    """On either side and between documents; ids and document ids of padding do not matter."""
    rows = data.draw(st.lists(documents, min_size=1, max_size=3))
    texts, packed, packed_documents, _ = pack(rows)
    width, generator = packed.shape[1] + 4, torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    ids, mask = random_ids(len(rows), width, seed=5), torch.zeros(len(rows), width, dtype=torch.int64)
    document_ids = torch.randint(3, ids.shape, generator=generator)
    for row, lengths in enumerate(rows):
        n = sum(lengths)
        place = torch.randperm(width, generator=generator)[:n].sort().values
        ids[row, place], document_ids[row, place] = packed[row, :n], packed_documents[row, :n]
        mask[row, place] = 1
    model = tiny_model(**changes)
    logits = model(ids, document_ids=document_ids, attention_mask=mask)
    assert_each_document_alone(model, logits, texts, mask)


@given(st.lists(documents, min_size=1, max_size=2), st.booleans())
def test_loss_and_gradients_are_the_mean_over_all_documents(rows, left):
    """No document's last token predicts the first of the next; documents of one token predict nothing."""
    texts, ids, document_ids, mask = pack(rows)
    if left:
        ids, document_ids, mask = ids.flip(1), document_ids.flip(1), mask.flip(1)
        texts = [[text.flip(0) for text in reversed(row)] for row in texts]
    model = tiny_model()
    pairs = sum(len(text) - 1 for row in texts for text in row)
    alone = [model(text[None], labels=text[None]) * (len(text) - 1) for row in texts for text in row if len(text) > 1]
    packed = model(ids, document_ids=document_ids, attention_mask=mask, labels=ids)
    if not pairs:
        assert packed == 0
        return
    expected = sum(alone) / pairs
    assert_close(packed, expected)
    expected.backward()
    gradients_alone = gradients(model)
    packed.backward()
    assert_same_gradients(gradients(model), gradients_alone)


def test_labels_choose_what_is_learned():
    """-100 is left out, in documents as elsewhere: of the gradient too."""
    model = tiny_model()
    texts, ids, document_ids, _ = pack([[WINDOW, 5, WINDOW + 2]])
    labels = torch.where(torch.arange(ids.shape[1]) < WINDOW + 5, -100, ids)
    model(ids, document_ids=document_ids, labels=labels).backward()
    packed = gradients(model)
    last = texts[0][-1][None]
    model(last, labels=last).backward()
    assert_same_gradients(packed, gradients(model))
