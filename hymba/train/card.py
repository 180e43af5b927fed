"""final/: the trained model in the official layout, with its tokenizer and card."""

import shutil
from pathlib import Path

from hymba.model.hymba import Hymba
from hymba.tokenizer import Tokenizer
from hymba.train.config import TrainConfig


def write_final(model: Hymba, tokenizer: Tokenizer, config: TrainConfig, folder: Path, name: str) -> None:
    """Write the folder aside and rename it."""
    aside, target = folder / f".{name}.tmp", folder / name
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    if target.exists():
        shutil.rmtree(target)
    aside.rename(target)
