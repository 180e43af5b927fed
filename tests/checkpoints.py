"""Checkpoints for the tests of conversion: whole ones, and ones that are broken on purpose."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hymba import Hymba, UserError
from hymba.convert import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE

__all__ = ["CONFIG_FILE", "INDEX_FILE", "WEIGHTS_FILE", "change_config", "change_header", "files_in", "refused", "same"]


def refused(call: Callable[[], object], *words: str) -> str:
    """The call fails with a `UserError` of one line, not too long, that has these words."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 1000, message
    for word in words:
        assert word in message, message
    return message


def same(a: Hymba, b: Hymba) -> bool:
    """Whether two models are the same: config, and every weight bit for bit."""
    one, two = dict(a.named_parameters()), dict(b.named_parameters())
    return a.config == b.config and one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change_config(folder: Path, **changes) -> None:
    """Set keys of `config.json`; a value of `...` removes the key."""
    path = folder / CONFIG_FILE
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def change_header(path: Path, change: Callable[[dict], object]) -> None:
    """Let `change` edit the header of a safetensors file: tensor name -> dtype, shape, data_offsets."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    path.write_bytes(with_header(json.dumps(header).encode(), data[8 + length :]))


def with_header(header: bytes, body: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + body
