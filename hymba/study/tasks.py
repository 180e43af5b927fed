"""What the arms are asked, made here from seeds and a text, without downloads: recall in four forms.

A document of a task holds facts and then asks for them. The same documents, drawn from other seeds, are mixed into the
training text: models as small as this learn a task only if they meet it there, and then a single run answers for all of
them. No fact of a test (a pair of key and value, a telephone number) occurs in training, so nothing can be learned by
heart; needles lie in training text in training, and in validation text in tests.

Answers are graded under teacher forcing: one is right if each of its tokens is the model's first choice. That is exact
match of greedy decoding, in one forward pass.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple
from zlib import crc32

from hymba.errors import UserError
from hymba.tokenizer import Tokenizer

TEST_FACTS = 5  # one of so many facts is kept for the tests

words = str.split
FIRST_NAMES = words(
    "Anne Augusta Caroline Catherine Charles Charlotte Diana Edmund Edward Eleanor Elinor Elizabeth Emma Fanny "
    "Frederick George Georgiana Harriet Henry Isabella James Jane John Julia Kitty Lucy Lydia Margaret Maria Marianne "
    "Mary Philip Robert Sophia Susan Thomas Tom Walter William Willoughby"
)
LAST_NAMES = words(
    "Allen Bates Bennet Benwick Bertram Bingley Brandon Churchill Collins Cole Crawford Croft Dalrymple Darcy Dashwood "
    "Elliot Elton Fairfax Ferrars Gardiner Harville Hayter Hurst Jennings Knightley Lucas Martin Middleton Morland "
    "Musgrove Norris Palmer Perry Price Rushworth Russell Smith Thorpe Tilney Wentworth Weston Wickham Woodhouse"
)
PLACES = words(
    "Barton Bath Camden Cleveland Delaford Donwell Everingham Hartfield Highbury Hunsford Kellynch Lambton Longbourn "
    "Lyme Mansfield Meryton Netherfield Northanger Norland Pemberley Portsmouth Randalls Rosings Sotherton Uppercross"
)


class Document(NamedTuple):
    """Token ids, from BOS to EOS, and the places of each answer's tokens among them."""

    ids: list[int]
    answers: list[range]


@dataclass(frozen=True)
class Cell:
    """One setting of a task: how much there is to remember, and where it is."""

    size: int  # pairs, entries, symbols, or tokens of the haystack
    depth: float | None = None  # of the needle: 0 at the beginning, 1 at the end; None: anywhere


class Material(NamedTuple):
    """What documents are made of."""

    tokenizer: Tokenizer
    train: Sequence[int]  # token ids of the training text
    test: Sequence[int]  # of the validation text


class Task(ABC):
    """A kind of question.

    Attributes:
        name: as in study files and results
        text: what is asked, in a sentence
        cells: the settings that are tested
    """

    name: str
    text: str

    def __init__(self, material: Material, cells: Sequence[Cell]) -> None:
        self.material, self.cells = material, tuple(cells)
        tokenizer = material.tokenizer
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise UserError("the tasks need a tokenizer with BOS and EOS")

    def document(self, cell: Cell, split: str, seed: int, number: int) -> Document:
        """Document `number` of a setting: always the same one for the same arguments."""
        draw = random.Random(f"{self.name} {cell} {split} {seed} {number}")
        parts = self._parts(cell, split, draw)
        ids, answers = [self.material.tokenizer.bos_token_id], []
        for part, answer in parts:
            if answer:
                answers.append(range(len(ids), len(ids) + len(part)))
            ids += part
        return Document([*ids, self.material.tokenizer.eos_token_id], answers)

    def training(self, longest: int, seed: int) -> Iterator[Document]:
        """Training documents without end, of all sizes between the smallest and the largest that is tested and fits
        into `longest` tokens, small ones more often; needles at any depth.

        With a few sizes only, a model would learn places by heart instead of looking for what is there.
        Raises `UserError` if no size fits.
        """
        sizes = sorted({cell.size for cell in self.cells})
        sizes = [size for size in sizes if len(self.document(Cell(size), "train", seed, 0).ids) <= longest]
        if not sizes:
            raise UserError(f"no size of the task {self.name} fits into rows of {longest} tokens; add a smaller one")
        draw = random.Random(f"{self.name} sizes {seed}")
        for number in count():
            size = round(math.exp(draw.uniform(math.log(sizes[0]), math.log(sizes[-1]))))
            yield self.document(Cell(size), "train", seed, number)

    def test(self, cell: Cell, number: int) -> list[Document]:
        """The first `number` test documents of a setting."""
        return [self.document(cell, "test", 0, i) for i in range(number)]

    @abstractmethod
    def chance(self, cell: Cell) -> float:
        """Share of answers that are right for someone who knows the task and has forgotten the document's facts, but
        not their values: he picks one of the values that he saw."""

    @abstractmethod
    def _parts(self, cell: Cell, split: str, draw: random.Random) -> Iterator[tuple[list[int], bool]]:
        """Token ids in order, and whether they are an answer."""

    def _encode(self, text: str) -> list[int]:
        return self.material.tokenizer.encode(text, add_special_tokens=False)

    def _symbols(self) -> range:
        """Ids that stand for no control token: with Hymba's and with our own tokenizers those come first."""
        t = self.material.tokenizer
        return range(1 + max(id or 0 for id in (t.bos_token_id, t.eos_token_id, t.pad_token_id)), t.vocab_size)


class AssociativeRecall(Task):
    """Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): pairs of random tokens, then every key
    again, in other orders, each followed by its value. Keys and values are the first and the last of the vocabulary."""

    name = "mqar"
    text = "random pairs of tokens, then the keys again in other orders: which value followed?"
    SYMBOLS = 64  # keys, and as many values, or half of the vocabulary if that is less
    QUESTIONS = 32  # at least, whole rounds of all keys: with few pairs each is asked for often, which is learned first

    def chance(self, cell: Cell) -> float:
        return 1 / cell.size

    def _parts(self, cell: Cell, split: str, draw: random.Random) -> Iterator[tuple[list[int], bool]]:
        symbols = self._symbols()
        known = min(self.SYMBOLS, len(symbols) // 2)
        if cell.size > known:
            raise UserError(f"mqar: there are {known} keys, too few for {cell.size} pairs")
        keys = draw.sample(symbols[:known], cell.size)
        values = {key: _fact(draw, split, lambda key=key: (key, draw.choice(symbols[-known:])))[1] for key in keys}
        for key in keys:
            yield [key, values[key]], False
        for _ in range(-(-self.QUESTIONS // cell.size)):
            draw.shuffle(keys)
            for key in keys:
                yield [key], False
                yield [values[key]], True


class Phonebook(Task):
    """Key-value recall in words (the phonebook of Jelassi et al. 2024, arXiv 2402.01032): names with numbers, then
    questions for some of them, in another order."""

    name = "phonebook"
    text = "a list of names with numbers of four digits, then questions: what number had this name?"
    QUESTIONS = 4  # or as many as there are entries

    def chance(self, cell: Cell) -> float:
        return 1 / cell.size

    def _parts(self, cell: Cell, split: str, draw: random.Random) -> Iterator[tuple[list[int], bool]]:
        pairs = len(FIRST_NAMES) * len(LAST_NAMES)
        if cell.size > pairs:
            raise UserError(f"phonebook: there are names for {pairs} entries at most, not for {cell.size}")
        who = [divmod(i, len(LAST_NAMES)) for i in draw.sample(range(pairs), cell.size)]
        entries = {f"{FIRST_NAMES[i]} {LAST_NAMES[j]}": _number(draw, split) for i, j in who}
        for name, number in entries.items():
            yield self._encode(f"{name}:"), False
            yield self._encode(f" {number}"), False
            yield self._encode("\n"), False
        for name in draw.sample(list(entries), min(self.QUESTIONS, len(entries))):
            yield self._encode(f"{name}:"), False
            yield self._encode(f" {entries[name]}"), True
            yield self._encode("\n"), False


class Needle(Task):
    """A needle in a haystack (Kamradt 2023): a sentence with a number, somewhere in a piece of a novel, and behind it
    the question for the number."""

    name = "needle"
    text = "a sentence with a number, hidden in a piece of a novel, and at the end the question for it"

    def chance(self, cell: Cell) -> float:
        return 0.0  # one of ten thousand numbers, which only the needle names

    def _parts(self, cell: Cell, split: str, draw: random.Random) -> Iterator[tuple[list[int], bool]]:
        place, number = draw.choice(PLACES), _number(draw, split)
        needle, value = self._encode(f" The secret number of {place} is"), self._encode(f" {number}")
        question = self._encode(f"\nWhat is the secret number of {place}? It is")
        text = self.material.train if split == "train" else self.material.test
        hay = cell.size - len(needle) - 2 * len(value) - len(question) - 3  # a dot, BOS and EOS
        if hay < 1 or hay > len(text):
            raise UserError(f"needle: a haystack of {cell.size} tokens is too short, or longer than the text")
        depth = draw.random() if cell.depth is None else cell.depth
        begin, before = draw.randrange(len(text) - hay + 1), round(depth * hay)
        yield list(text[begin : begin + before]), False
        yield [*needle, *value, *self._encode(".")], False
        yield list(text[begin + before : begin + hay]), False
        yield question, False
        yield value, True


class Copy(Task):
    """Copying (Jelassi et al. 2024, arXiv 2402.01032): random letters, a bar, and the same letters again. Every letter
    is an answer."""

    name = "copy"
    text = "a string of random letters, a bar, and the same string again: which letter comes next?"
    LETTERS = "abcdefghijklmnopqrstuvwxyz"

    def chance(self, cell: Cell) -> float:
        return 1 / len(self.LETTERS)

    def _parts(self, cell: Cell, split: str, draw: random.Random) -> Iterator[tuple[list[int], bool]]:
        alphabet = [id for letter in self.LETTERS for id in self._encode(letter)]
        _, string = _fact(draw, split, lambda: (None, draw.choices(alphabet, k=cell.size)))
        yield string, False
        yield self._encode("|"), False
        yield from (([letter], True) for letter in string)


TASKS: dict[str, type[Task]] = {task.name: task for task in (AssociativeRecall, Phonebook, Needle, Copy)}


def _fact(draw: random.Random, split: str, make):
    """Make facts until one is of the split: which one belongs to which is decided by its hash."""
    while True:
        fact = make()
        if (crc32(repr(fact).encode()) % TEST_FACTS == 0) == (split == "test"):
            return fact


def _number(draw: random.Random, split: str) -> str:
    """Four digits."""
    return _fact(draw, split, lambda: f"{draw.randrange(10_000):04}")
