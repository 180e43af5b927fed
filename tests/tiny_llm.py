"""A checkpoint with everything in it: random weights, a byte-level BPE of some lines of Austen, a chat template.

A plugin of pytest; a test module that wants the fixtures says `pytest_plugins = "tiny_llm"`.
"""

from pathlib import Path

import pytest
import torch
from conftest import randomise

from hymba import LLM, Hymba, HymbaConfig, Tokenizer

TEXT = Path(__file__).resolve().parents[1] / "data" / "austen" / "persuasion.txt"
TEMPLATE = """\
{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    lines = TEXT.read_text(encoding="utf-8").splitlines()[:400]
    tokenizer = Tokenizer.train(lines, 400, chat_template=TEMPLATE)
    model = Hymba(HymbaConfig.preset("tiny", vocab_size=tokenizer.vocab_size))
    randomise(model)
    with torch.no_grad():
        model.norm.weight.mul_(0.2)  # or one token would have nearly all of the probability
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def llm(checkpoint: Path) -> LLM:
    return LLM(checkpoint, max_batch=4)
