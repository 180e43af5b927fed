"""A run that is killed again and again, at random moments and while it saves, ends with the same weights."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from test_train import WEIGHTS, corpus, losses, make_config, undisturbed  # noqa: F401

from hymba.train import train

pytestmark = pytest.mark.slow
KILLS = 50


def start(config, folder: Path) -> int:
    """Train in a child that has everything imported already -> its process id"""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            status = 0 if train(config, folder).finished else 3
        finally:
            os._exit(status)
    return child


def saving(folder: Path) -> bool:
    """Whether a checkpoint, or final/, is being written or put in place."""
    return any(folder.glob("checkpoints/.step-*")) or any(folder.glob(".final*"))


def wait(child: int, moment: float, folder: Path, during_save: bool) -> int | None:
    """Kill the child after `moment` seconds, or so long after it was seen saving -> its status, None if killed"""
    begin = None if during_save else time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if begin is None and saving(folder):
            begin = time.monotonic()
        if begin is not None and time.monotonic() - begin >= moment:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.0005)


def test_killed_runs_end_as_the_one_that_was_not(corpus, undisturbed, tmp_path):  # noqa: F811
    config, chance = make_config(corpus), random.Random(0)
    began = time.monotonic()
    assert wait(start(config, tmp_path / "timed"), 1e9, tmp_path, False) == 0
    whole = time.monotonic() - began
    kills = kills_in_save = runs = 0
    while kills < KILLS:
        folder = tmp_path / str(runs)
        while True:
            during_save = chance.random() < 0.5
            child = start(config, folder)
            # half of the kills come within a moment of the beginning of a save
            status = wait(child, chance.uniform(0, 0.02 if during_save else whole), folder, during_save)
            if status is not None:
                assert status == 0
                break
            kills += 1
            kills_in_save += saving(folder)
        runs += 1
        assert (folder / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()
        assert losses(folder) == losses(undisturbed)
        assert not saving(folder)
    assert kills_in_save >= KILLS // 10
    print(f"{runs} runs, killed {kills} times, {kills_in_save} of these while saving")
