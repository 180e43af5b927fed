"""From text to a trained model: data, optimiser, schedule, loop, checkpoints."""

from importlib import import_module

_HOMES = {"Result": "hymba.train.trainer", "TrainConfig": "hymba.train.config", "train": "hymba.train.trainer"}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'hymba.train' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
