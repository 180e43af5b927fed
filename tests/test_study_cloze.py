"""Cloze tasks: endings cost what they cost alone, and the right ones are found where it is known which those are."""

import pytest
import torch
from conftest import tiny_model

from hymba import Tokenizer
from hymba.errors import UserError
from hymba.shipped import SHIPPED_FOLDER
from hymba.study import cloze
from hymba.study.cloze import Question


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(SHIPPED_FOLDER)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(vocab_size=tokenizer.vocab_size)


PAIRS = [
    ("It is a", " truth"),
    ("It is a truth universally", " acknowledged, that"),
    ("", "It"),
    ("Mr. Bennet", " is so"),
]


def test_an_ending_costs_what_a_pass_over_its_text_alone_says(model, tokenizer):
    together = cloze.costs(model, tokenizer, PAIRS, 4096)
    for (context, ending), cost in zip(PAIRS, together, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer.encode(context + ending, add_special_tokens=False)]
        start = 1 + len(tokenizer.encode(context, add_special_tokens=False))
        with torch.no_grad():
            predicted = model(torch.tensor([ids]))[0].log_softmax(-1)
        nats = -sum(predicted[i - 1, ids[i]].item() for i in range(start, len(ids)))
        assert cost.nats == pytest.approx(nats, rel=1e-4)
        assert cost.bytes == len(ending.encode())
        assert cost.greedy == all(predicted[i - 1].argmax() == ids[i] for i in range(start, len(ids)))


def test_texts_beyond_the_longest_lose_their_beginning(tokenizer):
    short = tiny_model(vocab_size=tokenizer.vocab_size, max_length=16, rope="default")
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    assert cloze.costs(short, tokenizer, [(words, " seventeen")], 64)[0].nats > 0


def test_right_endings_are_those_that_cost_least(model, tokenizer):
    endings = (" truth", " truth universally acknowledged", " number")
    nats = [cost.nats for cost in cloze.costs(model, tokenizer, [("It is a", e) for e in endings], 64)]
    cheapest = min(range(3), key=nats.__getitem__)
    questions = [Question("It is a", endings, i) for i in range(3)]
    for question in questions:
        found = cloze.score(model, tokenizer, [question], 64)
        assert found["accuracy"] == (question.answer == cheapest)
    found = cloze.score(model, tokenizer, questions, 64)
    assert found["accuracy"] == found["accuracy_per_byte"] == pytest.approx(1 / 3)
    assert found["chance"] == pytest.approx(1 / 3) and found["questions"] == 3


def test_a_single_ending_is_right_if_greedy_decoding_writes_it(model, tokenizer):
    ids = [tokenizer.bos_token_id, *tokenizer.encode("It is a", add_special_tokens=False)]
    with torch.no_grad():
        ranks = model(torch.tensor([ids]))[0, -1].argsort(descending=True).tolist()
    text = tokenizer.decode([ranks[0]])
    best, *others = (q for q in (text, " truth", " number"))
    if tokenizer.encode("It is a" + best, add_special_tokens=False) == [*ids[1:], ranks[0]]:
        assert cloze.score(model, tokenizer, [Question("It is a", (best,), 0)], 64)["accuracy"] == 1
    wrong = next(q for q in others if tokenizer.encode("It is a" + q, add_special_tokens=False)[3:] != [ranks[0]])
    assert cloze.score(model, tokenizer, [Question("It is a", (wrong,), 0)], 64)["accuracy"] == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no questions"),
        ("nonsense", "line 1"),
        ('{"context": "a", "endings": ["b"], "answer": 0}\n{"context": "a", "endings": ["b"], "answer": 1}', "line 2"),
        ('{"context": "a", "endings": "bc", "answer": 2}', "line 1"),
        ('{"context": "a", "endings": [], "answer": 0}', "line 1"),
        ('{"context": "a", "endings": ["b", ""], "answer": 0}', "line 1"),
        ('{"context": "a", "endings": ["b"], "answer": true}', "line 1"),
        ("[1]", "line 1"),
    ],
)
def test_files_that_hold_no_questions_are_refused_in_a_line(tmp_path, text, said):
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(UserError, match=said):
        cloze.read(tmp_path / "q.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        cloze.read(tmp_path / "none.jsonl")
