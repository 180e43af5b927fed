"""Two processes train what one trains, and read each other's checkpoints."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import corpus, losses, make_config  # noqa: F401

from hymba.train import config as config_file
from hymba.train.config import Run, Stage
from hymba.train.data import Source

pytestmark = pytest.mark.slow
STEPS = 50
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def config(corpus, tmp_path_factory) -> Path:  # noqa: F811
    stage = Stage((Source(corpus),), tokens=128 * STEPS, length=32)
    run = Run(device="cpu", micro_tokens=32, save_every=25, keep=10)
    path = tmp_path_factory.mktemp("config") / "config.toml"
    config_file.save(make_config(corpus, stages=(stage,), dropout=0.0, run=run), path)
    return path


def run(config: Path, folder: Path, processes: int, *settings: str) -> dict[int, float]:
    """Train by the command -> the losses"""
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launch, "hymba", "train", str(config), "--out", str(folder), *settings]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(folder)


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(config, folder, 1)
    return folder


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_learn_as_one_and_share_checkpoints(config, alone, tmp_path, parallel):
    settings = ("--run.parallel", parallel)
    two = run(config, tmp_path / "two", 2, *settings)
    assert list(two) == list(range(1, STEPS + 1)) and two == pytest.approx(losses(alone), abs=1e-4)
    for name, source, processes in (("two to one", tmp_path / "two", 1), ("one to two", alone, 2)):
        folder = tmp_path / name
        shutil.copytree(source / "checkpoints" / "step-00000025", folder / "checkpoints" / "step-00000025")
        shutil.copy(source / "config.toml", folder)
        later = run(config, folder, processes, *settings)
        assert list(later) == list(range(26, STEPS + 1))
        assert later == pytest.approx({n: loss for n, loss in losses(alone).items() if n > 25}, abs=1e-4)
