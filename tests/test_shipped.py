"""The model that the package ships: used where none is named, offline, and as good as its card says."""

import json
import re
from pathlib import Path

import pytest
import torch

from hymba import LLM, SamplingParams, Tokenizer
from hymba.convert import resolve
from hymba.evals import score_ids
from hymba.shipped import SHIPPED_FOLDER, SHIPPED_MODEL

PERSUASION = Path(__file__).resolve().parents[1] / "data" / "austen" / "persuasion.txt"


@pytest.fixture(scope="module")
def llm():
    return LLM(device="cpu", max_batch=2)


def test_it_has_every_part_of_the_architecture(llm):
    c = llm.config
    assert c.is_hymba and c.n_meta and c.window and c.global_layers and c.kv_groups


def test_it_is_small_enough_for_the_wheel():
    assert sum(path.stat().st_size for path in SHIPPED_FOLDER.iterdir()) < 25e6


def test_its_name_is_a_model():
    assert resolve(SHIPPED_MODEL) == SHIPPED_FOLDER


def test_it_writes_words_of_its_books(llm):
    text = llm.generate(["It is a truth"], SamplingParams(max_tokens=100, temperature=0.7, seed=0))[0].text
    books = (PERSUASION.parent / "pride_and_prejudice.txt").read_text() + (PERSUASION.parent / "emma.txt").read_text()
    known = set(re.findall(r"[a-z]+", books.lower()))
    words = re.findall(r"[a-z]+", text.lower())
    assert len(words) > 40 and sum(word in known for word in words) > 0.9 * len(words)


def test_it_predicts_the_validation_novel_as_its_card_says(llm):
    """The first 8% of Persuasion; the card's figure is that of the whole novel."""
    tokenizer = Tokenizer.from_pretrained(SHIPPED_FOLDER)
    text = PERSUASION.read_text(encoding="utf-8")[: 1 << 15]
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)])
    card = (SHIPPED_FOLDER / "README.md").read_text(encoding="utf-8")
    said = float(re.search(r"bits per byte\n +value: ([\d.]+)", card)[1])
    assert score_ids(llm.model, ids, len(text.encode())).bits_per_byte == pytest.approx(said, rel=0.1)


def test_its_config_is_the_official_layout():
    assert json.loads((SHIPPED_FOLDER / "config.json").read_text())["model_type"] == "hymba"
