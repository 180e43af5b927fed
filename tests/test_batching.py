"""Batching changes nothing: a prompt alone and in any batch gives the same logits and the same tokens."""

import pytest
import torch
from conftest import VARIANTS, WINDOW, assert_close, each_variant, random_ids, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hymba import Hymba

LONGEST = 3 * WINDOW
# the promise is 1e-4 in float32; what the order of sums alone does is less than the usual 2e-5
variants = st.sampled_from(list(VARIANTS.values()))
lengths = st.lists(st.integers(1, LONGEST), min_size=1, max_size=4)


def ragged(lengths: list[int], seed: int = 0) -> list[Tensor]:
    return [random_ids(1, length, seed=100 * seed + row)[0] for row, length in enumerate(lengths)]


def padded(texts: list[Tensor], places: list[list[int]], width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Texts at the given places of their rows, among ids that mean something elsewhere -> ids, mask"""
    ids, mask = random_ids(len(texts), width, seed=seed), torch.zeros(len(texts), width, dtype=torch.int64)
    for row, (text, place) in enumerate(zip(texts, places, strict=True)):
        ids[row, place], mask[row, place] = text, 1
    return ids, mask


def side(lengths: list[int], width: int, left: bool) -> list[list[int]]:
    """Places of texts that are padded on one side."""
    return [list(range(width - n, width)) if left else list(range(n)) for n in lengths]


@st.composite
def padded_batches(draw) -> tuple[list[Tensor], Tensor, Tensor]:
    """Texts of one to three windows, padded left, right, on both sides, or anywhere in the middle."""
    sizes = draw(lengths)
    width, seed = max(sizes) + draw(st.integers(0, 3)), draw(st.integers(0, 99))
    places = []
    for n in sizes:
        first = draw(st.integers(0, width - n))
        block = list(range(first, first + n))
        anywhere = st.sets(st.integers(0, width - 1), min_size=n, max_size=n).map(sorted)
        places.append(draw(st.just(block) | anywhere))
    texts = ragged(sizes, seed)
    return texts, *padded(texts, places, width, seed)


# --------------------------------------------------------------------------------------------------------- one forward


@given(variants, padded_batches())
@torch.no_grad()
def test_a_padded_batch_equals_its_rows_alone(changes, batch):
    texts, ids, mask = batch
    model = tiny_model(**changes)
    logits = model(ids, attention_mask=mask)
    for row, text in enumerate(texts):
        assert_close(logits[row, mask[row] != 0], model(text[None])[0])


@each_variant
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@torch.no_grad()
def test_every_variant_padded(changes, left):
    sizes = [LONGEST, 1, WINDOW + 1]
    texts, model = ragged(sizes), tiny_model(**changes)
    ids, mask = padded(texts, side(sizes, LONGEST, left), LONGEST, seed=7)
    logits = model(ids, attention_mask=mask.bool())
    for row, text in enumerate(texts):
        assert_close(logits[row, mask[row] != 0], model(text[None])[0])


@given(padded_batches(), st.integers(0, 99))
@torch.no_grad()
def test_what_stands_in_the_padding_is_not_read(batch, seed):
    """To the last bit."""
    _, ids, mask = batch
    model = tiny_model()
    other = torch.where(mask != 0, ids, random_ids(*ids.shape, seed=seed))
    first, second = model(ids, attention_mask=mask), model(other, attention_mask=mask)
    assert torch.equal(first[mask != 0], second[mask != 0])


@torch.no_grad()
def test_dynamic_ntk_rotates_every_row_by_its_own_length():
    """Past `rope_original_length` the base depends on the length, for the meta tokens' keys too."""
    sizes = [5, LONGEST, 12]
    model = tiny_model(rope="dynamic_ntk", rope_original_length=9)
    texts = ragged(sizes)
    ids, mask = padded(texts, side(sizes, LONGEST, left=True), LONGEST, seed=7)
    logits = model(ids, attention_mask=mask)
    for row, text in enumerate(texts):
        assert_close(logits[row, mask[row] != 0], model(text[None])[0])
        # as if the model had been made for a context of this row's length
        reach = {"rope": "default"} if len(text) + 3 <= 9 else {"rope": "ntk", "max_length": len(text) + 3}
        assert_close(logits[row, mask[row] != 0], tiny_model(**reach, rope_original_length=9)(text[None])[0])


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_the_loss_of_a_padded_batch_is_the_mean_over_its_tokens(left):
    sizes = [LONGEST, 1, 2, WINDOW + 1]
    texts, model = ragged(sizes), tiny_model()
    ids, mask = padded(texts, side(sizes, LONGEST, left), LONGEST, seed=7)
    alone = [model(text[None], labels=text[None]) * (len(text) - 1) for text in texts]
    assert_close(model(ids, attention_mask=mask, labels=ids), sum(alone) / sum(n - 1 for n in sizes))


# ---------------------------------------------------------------------------------------------------------- with cache


@given(variants, st.data())
@torch.no_grad()
def test_any_schedule_of_cached_calls_equals_the_rows_alone(changes, data):
    """Each call brings each row any number of its next tokens, none included, at any place among padding."""
    rows, calls = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    model = tiny_model(**changes)
    cache = model.new_cache(rows, max_length=60)
    texts = [random_ids(1, 60, seed=row)[0] for row in range(rows)]
    seen: list[list[Tensor]] = [[] for _ in range(rows)]
    for call in range(calls):
        width = data.draw(st.integers(1, 10))
        ids, mask = random_ids(rows, width, seed=call), torch.zeros(rows, width, dtype=torch.int64)
        for row in range(rows):
            place = sorted(data.draw(st.sets(st.integers(0, width - 1))))
            first = int(cache.lengths[row])
            ids[row, place], mask[row, place] = texts[row][first : first + len(place)], 1
        logits = model(ids, attention_mask=mask, cache=cache)
        for row in range(rows):
            seen[row].append(logits[row, mask[row] != 0])
    for row, text in enumerate(texts):
        length = int(cache.lengths[row])
        if length:
            assert_close(torch.cat(seen[row]), model(text[None, :length])[0])


def assert_same_text(model: Hymba, prompt: Tensor, logits: list[Tensor]) -> None:
    """What a batch chose token by token is what a full forward pass over the prompt alone chooses after each token."""
    chosen = torch.stack(logits)
    tokens = chosen.argmax(-1)
    alone = model(torch.cat([prompt, tokens[:-1]])[None])[0, len(prompt) - 1 :]
    assert_close(chosen, alone)
    assert float((chosen - alone).abs().max()) < 1e-4
    assert torch.equal(tokens, alone.argmax(-1))


@given(lengths, st.booleans(), st.integers(0, 99))
@torch.no_grad()
def test_greedy_text_of_a_padded_batch(sizes, left, seed):
    """Prompts of one to three windows, padded on either side, then decoded together."""
    model, texts, width = tiny_model(), ragged(sizes, seed), max(sizes)
    places = side(sizes, width, left)
    ids, mask = padded(texts, places, width, seed)
    cache = model.new_cache(len(texts), max_length=width + 8)
    logits = model(ids, attention_mask=mask, cache=cache)
    steps = [logits[torch.arange(len(texts)), [place[-1] for place in places]]]
    for _ in range(7):
        steps.append(model(steps[-1].argmax(-1, keepdim=True), cache=cache)[:, -1])
    for row, text in enumerate(texts):
        assert_same_text(model, text, [step[row] for step in steps])


@given(st.lists(st.tuples(st.integers(1, LONGEST), st.integers(0, 6)), min_size=2, max_size=4), st.integers(0, 99))
@torch.no_grad()
def test_greedy_text_of_rows_admitted_at_different_times(requests, seed):
    """A prompt joins a batch that is already decoding: it is read into a free row, and the next step takes it along."""
    requests = sorted(requests, key=lambda request: request[1])  # (length of the prompt, step of admission)
    model, prompts = tiny_model(), ragged([length for length, _ in requests], seed)
    cache = model.new_cache(len(requests), max_length=LONGEST + 20)
    logits: list[list[Tensor]] = []
    for step in range(12):
        running = len(logits)
        if running:
            ids = torch.stack([row[-1].argmax()[None] for row in logits])
            for row, new in zip(logits, model(ids, cache=cache.rows(0, running))[:, -1], strict=True):
                row.append(new)
        for row in range(running, len(requests)):
            if requests[row][1] == step:
                logits.append([model(prompts[row][None], cache=cache.rows(row, row + 1))[0, -1]])
    for prompt, row in zip(prompts, logits, strict=True):
        assert_same_text(model, prompt, row)


@torch.no_grad()
def test_greedy_text_of_rows_that_take_the_place_of_finished_ones():
    """The last running row moves to the place of a finished one, and a new prompt is read into the row that it left."""
    model, prompts = tiny_model(), ragged([5, LONGEST, WINDOW, WINDOW + 1])
    cache = model.new_cache(3, max_length=LONGEST + 20)
    logits = {i: [model(prompts[i][None], cache=cache.rows(i, i + 1))[0, -1]] for i in range(3)}
    rows = [0, 1, 2]  # which prompt is in which row

    def decode(steps: int) -> None:
        for _ in range(steps):
            ids = torch.stack([logits[i][-1].argmax()[None] for i in rows])
            for i, new in zip(rows, model(ids, cache=cache.rows(0, len(rows)))[:, -1], strict=True):
                logits[i].append(new)

    decode(3)
    cache.copy(2, 0)  # prompt 0 is done
    rows[:] = [2, 1]
    decode(4)
    cache.reset(2)
    logits[3] = [model(prompts[3][None], cache=cache.rows(2, 3))[0, -1]]
    rows.append(3)
    decode(5)
    for i, steps in logits.items():
        assert_same_text(model, prompts[i], steps)
