"""Documents of the study's tasks: the answers are right, tests do not leak into training, guesses score chance."""

import random
from itertools import islice

import pytest

from hymba import Tokenizer
from hymba.errors import UserError
from hymba.study.tasks import TASKS, Cell, Material

CELLS = {
    "mqar": [Cell(4), Cell(16)],
    "phonebook": [Cell(2), Cell(12)],
    "needle": [Cell(size, depth) for size in (96, 160) for depth in (0.0, 0.5, 1.0)],
    "copy": [Cell(8), Cell(24)],
}
PROSE = "a long walk to Meryton and back was all that the day had to offer; the rain kept them in."


@pytest.fixture(scope="module")
def material() -> Material:
    draw = random.Random(0)
    train, test = (" ".join(draw.choices(PROSE.split(), k=3000)) for _ in range(2))
    tokenizer = Tokenizer.train([train], 320)
    return Material(tokenizer, *(tokenizer.encode(text, add_special_tokens=False) for text in (train, test)))


@pytest.fixture(params=TASKS)
def task(request, material):
    return TASKS[request.param](material, CELLS[request.param])


def text_of(material: Material, ids: list[int]) -> str:
    return material.tokenizer.decode(ids)


def test_documents_are_the_same_every_time(task):
    again = type(task)(task.material, task.cells)
    for cell in task.cells:
        assert task.test(cell, 5) == again.test(cell, 5)
        assert len({tuple(document.ids) for document in task.test(cell, 5)}) == 5
    first, other = (list(islice(task.training(200, seed), 20)) for seed in (1, 2))
    assert first == list(islice(again.training(200, 1), 20))
    assert first != other


def test_a_document_is_framed_and_its_answers_lie_inside(task):
    t = task.material.tokenizer
    for cell in task.cells:
        for document in task.test(cell, 5):
            assert (document.ids[0], document.ids[-1]) == (t.bos_token_id, t.eos_token_id)
            assert not {t.bos_token_id, t.eos_token_id, t.pad_token_id} & set(document.ids[1:-1])
            assert document.answers
            assert all(1 < r.start < r.stop < len(document.ids) for r in document.answers)


@pytest.mark.parametrize(("size", "times"), [(4, 8), (20, 2), (32, 1), (40, 1)])
def test_associative_recall_asks_for_all_keys_equally_often(material, size, times):
    for document in TASKS["mqar"](material, [Cell(size)]).test(Cell(size), 20):
        body = document.ids[1:-1]
        pairs, questions = (list(zip(x[::2], x[1::2], strict=True)) for x in (body[: 2 * size], body[2 * size :]))
        assert sorted(times * pairs) == sorted(questions)
        assert len(dict(pairs)) == size
        assert pairs != questions
        assert [document.ids[r.start] for r in document.answers] == [value for _, value in questions]


def test_the_phonebook_answers_what_it_says(material):
    task = TASKS["phonebook"](material, [Cell(12)])
    for document in task.test(Cell(12), 20):
        lines = text_of(material, document.ids).splitlines()
        book = dict(line.split(": ") for line in lines[:12])
        assert len(book) == 12
        questions = [line.split(": ") for line in lines[12:]]
        assert len({name for name, _ in questions}) == task.QUESTIONS
        assert all(book[name] == number for name, number in questions)
        answers = [text_of(material, [document.ids[i] for i in r]).strip() for r in document.answers]
        assert answers == [number for _, number in questions]


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_needle_lies_at_its_depth_in_held_out_text(material, depth):
    cell = Cell(160, depth)
    for document in TASKS["needle"](material, [cell]).test(cell, 10):
        text = text_of(material, document.ids)
        before, found, rest = text.partition(" The secret number of ")
        place, number = rest.split(" is ")[0], rest.split(" is ")[1][:4]
        after, asked, _ = rest.rpartition("\nWhat is the secret number of ")
        assert found and asked and number.isdigit()
        assert len(document.ids) == 160
        [answer] = document.answers
        assert text_of(material, [document.ids[i] for i in answer]) == f" {number}"
        assert text.endswith(f"What is the secret number of {place}? It is {number}")
        hay = (material.tokenizer.encode(x, add_special_tokens=False) for x in (before, after.partition(".")[2]))
        sizes = [len(x) for x in hay]
        assert sizes[0] / sum(sizes) == pytest.approx(depth, abs=0.05)
        held_out = material.tokenizer.decode(material.test)
        assert before in held_out


def test_copying_repeats_the_string(material):
    task = TASKS["copy"](material, [Cell(24)])
    for document in task.test(Cell(24), 10):
        first, _, second = text_of(material, document.ids).partition("|")
        assert first == second
        assert len(first) == 24 and first.isalpha()
        assert len(document.answers) == 24


def test_nothing_that_is_tested_is_in_training(task):
    """Not the documents, and not one fact: a pair of key and value, a number, a string."""
    facts = {"train": set(), "test": set()}
    documents = {
        "train": list(islice(task.training(200, 0), 400)),
        "test": [document for cell in task.cells for document in task.test(cell, 50)],
    }
    for split, some in documents.items():
        for ids, answers in some:
            if task.name == "copy":
                facts[split].add(tuple(ids[answers[0].start : answers[-1].stop]))
            for r in answers if task.name != "copy" else ():
                asked = ids[r.start - 1] if task.name == "mqar" else None
                facts[split].add((asked, *(ids[i] for i in r)))
    assert len(facts["train"]) > 100
    assert not facts["train"] & facts["test"]


def test_training_has_all_sizes_that_fit_and_needles_at_any_depth(material):
    task = TASKS["needle"](material, CELLS["needle"])
    assert {len(document.ids) for document in islice(task.training(100, 0), 10)} == {96}
    documents = list(islice(task.training(200, 0), 60))
    sizes = {len(document.ids) for document in documents}
    assert min(sizes) < 100 and max(sizes) > 150 and len(sizes) > 25
    where = {text_of(material, document.ids).index("The secret number") for document in documents}
    assert len(where) > 40
    with pytest.raises(UserError, match="no size of the task needle fits into rows of 64 tokens"):
        next(task.training(64, 0))


def test_guessing_scores_chance(task):
    """Someone who picks one of the values that the document shows is right as often as `chance` says."""
    draw = random.Random(0)
    for cell in task.cells:
        right = total = 0
        for ids, answers in task.test(cell, 150):
            values = [tuple(ids[i] for i in r) for r in answers]
            if task.name == "copy":
                choices = [(id,) for letter in task.LETTERS for id in task._encode(letter)]
            elif task.name == "needle":
                choices = [tuple(task._encode(f" {draw.randrange(10_000):04}")) for _ in range(20)]
            elif task.name == "phonebook":
                lines = text_of(task.material, ids).splitlines()[: cell.size]
                choices = [tuple(task._encode(" " + line.split(": ")[1])) for line in lines]
            else:
                choices = [(id,) for id in ids[2 : 2 * cell.size + 1 : 2]]
            right += sum(value == draw.choice(choices) for value in values)
            total += len(values)
        assert right / total == pytest.approx(task.chance(cell), abs=4 * (0.25 / total) ** 0.5)


def test_settings_without_room_are_refused_in_a_line(material):
    for name, cell, problem in (
        ("mqar", Cell(400), "there are 64 keys, too few for 400 pairs"),
        ("phonebook", Cell(5000), "there are names for"),
        ("needle", Cell(20), "a haystack of 20 tokens is too short"),
    ):
        with pytest.raises(UserError, match=problem):
            TASKS[name](material, [cell]).test(cell, 1)
