"""A study from its file to its results: what is done once is not done again, whatever happens in between."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hymba import Hymba, cli
from hymba.errors import UserError
from hymba.study import data, evaluate, results, runner, speed, study
from hymba.study.results import Run
from hymba.study.runner import RESULTS, Runner
from hymba.study.tasks import Cell
from hymba.train.data import TrainingRows

STUDY = """
arms = ["mamba", "hymba"]
seeds = [0, 1]
learning_rates = [1e-3, 4e-3]

[model]
d_model = 16
n_layers = 3
n_heads = 2
n_kv_heads = 1
d_ff = 32
d_state = 4
dt_rank = 2
n_meta = 2
d_ssm_head = 8
window = 16
global_layers = [0, 2]
kv_groups = []
rope = "default"
max_length = 128

[text]
train = ["train.txt"]
validation = ["validation.txt"]
vocab_size = 400

[tasks.mqar]
share = 0.3
sizes = [2, 4]
documents = 4

[tasks.needle]
share = 0.1
sizes = [80, 120]
depths = [0, 1]
documents = 2

[cloze]
ends = "ends.jsonl"

[train]
batch_tokens = 256
stages = [{ tokens = 2048, length = 64 }, { tokens = 1024, length = 100, lr_end = 0.1 }]
validation = { every = 6 }
run = { log_every = 2, save_every = 2 }

[speed]
context = 32
steps = 2
repeats = 1
"""
PROSE = "What is the secret number of Bath? It is a truth that nobody could deny. The secret number of"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    draw = random.Random(0)
    (tmp_path / "ends.jsonl").write_text('{"context": "It is a", "endings": [" truth", " number"], "answer": 0}\n')
    for name, words in (("train", 3000), ("validation", 300)):
        (tmp_path / f"{name}.txt").write_text(" ".join(draw.choices(PROSE.split(), k=words)))
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path / "study.toml"


def command(file: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "hymba", "study", "run", str(file), *options]


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """`hymba study run` that trains in this process, which is quicker."""
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_pool", lambda jobs: ThreadPoolExecutor(1))
        assert cli.run(["study", "run", *arguments]) == 0


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in (file.with_suffix("") / RESULTS).read_text().splitlines()]


def test_a_study_runs_once_and_can_be_extended(file, monkeypatch, capsys):
    run_here(monkeypatch, str(file), "--seeds", "0")
    shown = capsys.readouterr().out
    found = lines(file)
    assert [line["kind"] for line in found] == ["study", *["run"] * 4, "speed"]
    assert {(line["arm"], line["lr"]) for line in found[1:5]} == {
        (a, lr) for a in ("mamba", "hymba") for lr in (1e-3, 4e-3)
    }
    assert "4 of 4" in shown and "tokens/s" in shown
    record = found[1]
    assert [cell["answers"] for cell in record["tasks"]["mqar"]] == [4 * 32, 4 * 32]
    assert [(cell["size"], cell["depth"]) for cell in record["tasks"]["needle"]] == [
        (80, 0),
        (80, 1),
        (120, 0),
        (120, 1),
    ]
    assert set(record["validation"]) == {"text", "mqar", "needle"}
    shares = {"text": 0.6, "mqar": 0.3, "needle": 0.1}
    assert record["objective"] == pytest.approx(
        sum(share * record["validation"][name] for name, share in shares.items())
    )
    assert record["validation_curve"][-1] == [3048, record["bits_per_byte"]]
    # once more: nothing is left to do
    run_here(monkeypatch, str(file), "--seeds", "0")
    assert lines(file) == found
    # all seeds: each arm's better rate on the other one
    run_here(monkeypatch, str(file))
    more = lines(file)[6:]
    assert [(line["kind"], line.get("seed")) for line in more] == [("run", 1), ("run", 1)]
    for line in more:
        losses = {r["lr"]: r["objective"] for r in found[1:5] if r["arm"] == line["arm"]}
        assert line["lr"] == min(losses, key=losses.get)


@pytest.mark.slow
def test_a_killed_study_goes_on_and_ends_as_if_nothing_had_been(file, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    run_here(monkeypatch, str(file), "-o", str(whole), "--arms", "hymba")
    folder = file.with_suffix("")
    # products of matrices differ in their last digits with the number of threads, which is one in tests
    process = subprocess.Popen(
        command(file, "--arms", "hymba"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    second = folder / "runs" / Run("hymba", 4e-3, 0).folder
    deadline = time.monotonic() + 120
    while not list(second.glob("checkpoints/step-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)  # its worker notices, saves, and ends; the next one waits for it
    process.wait()
    assert len([line for line in lines(file) if line["kind"] == "run"]) == 1
    assert cli.run(["study", "run", str(file), "--arms", "hymba"]) == 0
    ours, theirs = results.read(folder / RESULTS).runs, results.read(whole / RESULTS).runs
    assert list(ours) == list(theirs)
    for run, record in ours.items():
        for name in ("bits_per_byte", "validation", "tasks", "curve", "validation_curve"):
            assert json.dumps(record[name]).replace(str(folder), "") == json.dumps(theirs[run][name]).replace(
                str(whole), ""
            )


def test_what_does_not_fit_together_is_said_in_a_line(file, capsys):
    def refused(old: str, new: str, *options: str) -> str:
        file.write_text(STUDY.replace(old, new))
        assert cli.run(["study", "run", str(file), *options]) == 2
        return capsys.readouterr().err

    assert "unknown arm 'mambo'" in refused('"mamba"', '"mambo"')
    assert "unknown task 'mqa'" in refused("tasks.mqar", "tasks.mqa")
    assert "shares must be above 0, and below 1" in refused("share = 0.3", "share = 0.9")
    assert "train.optimizer.lr is chosen from learning_rates" in refused(
        "validation = {", "optimizer = { lr = 1 }\nvalidation = {"
    )
    assert "unknown key tasks.mqar.size; did you mean tasks.mqar.sizes?" in refused("sizes = [2, 4]", "size = [2]")
    assert "text needs train and validation" in refused('validation = ["validation.txt"]', "")
    assert "without sources" in refused("length = 64 }", 'length = 64, sources = ["x"] }')
    assert "learning_rates must name at least one, and none twice" in refused("[1e-3, 4e-3]", "[1e-3, 1e-3]")
    assert "speed.context + speed.steps = 130 tokens are beyond" in refused("context = 32", "context = 128")
    assert "the study has no seed 7; choose from 0, 1" in refused("x", "x", "--seeds", "7")
    assert "the study has no arm llama" in refused("x", "x", "--arms", "llama")
    assert "--seeds 'a' is no seed" in refused("x", "x", "--seeds", "a")
    assert cli.run(["study", "report", str(file.parent)]) == 2
    assert "make it with `hymba study run`" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["study", "laptop"])
def test_the_studies_in_the_documentation_can_be_read(name):
    assert study.load(Path(__file__).parents[1] / "docs" / "study" / f"{name}.toml").arms


def test_the_results_in_the_documentation_are_of_the_study_there(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])  # paths of texts are part of a study
    known = results.read(Path("docs/study/results.jsonl"))
    described = study.load("docs/study/study.toml")
    assert known.study["fingerprint"] == described.fingerprint()
    assert {run.arm for run in known.runs} <= set(described.arms)


def test_results_of_another_study_are_not_mixed_in(file):
    first = Runner(study.load(file), file.parent / "out", ("mamba",), (0,), "cpu")
    first.begin()
    file.write_text(STUDY.replace("d_state = 4", "d_state = 8"))
    with pytest.raises(UserError, match="has results of another study"):
        Runner(study.load(file), file.parent / "out", ("mamba",), (0,), "cpu").begin()
    file.write_text(STUDY.replace("seeds = [0, 1]", "seeds = [0, 1, 2]").replace("[1e-3, 4e-3]", "[1e-3, 2e-3, 4e-3]"))
    Runner(study.load(file), file.parent / "out", ("mamba",), (0,), "cpu").begin()


def test_arms_whose_training_diverged_do_not_stop_the_others(file):
    loaded = study.load(file)
    begun = Runner(loaded, file.parent / "out", loaded.arms, loaded.seeds, "cpu")
    begun.begin()
    failed = lambda arm, lr: results.append(begun.path, {**Run(arm, lr, 0)._asdict(), "kind": "run", "failed": "NaN"})  # noqa: E731
    failed("mamba", 1e-3)
    failed("hymba", 1e-3)
    failed("hymba", 4e-3)
    assert begun.pending() == [Run("mamba", 4e-3, 0)]
    results.append(begun.path, {**Run("mamba", 4e-3, 0)._asdict(), "kind": "run", "objective": 3.0})
    assert begun.pending() == [Run("mamba", 4e-3, 1)]


def test_data_is_made_once_and_mixed_by_shares(file, tmp_path):
    loaded = study.load(file)
    made = data.make(loaded, tmp_path / "data")
    weights = {Path(source.path).name: source.weight for source in made.sources}
    assert weights == pytest.approx({"text": 0.6, "mqar": 0.3, "needle": 0.1})
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*") if path.is_file()}
    data.make(loaded, tmp_path / "data")
    assert before == {path: path.stat().st_mtime_ns for path in before}
    rows = TrainingRows(made.sources, 64, 0).rows(0, 20)
    assert rows.input_ids.shape == (20, 64)
    other = replace(loaded, tasks={"mqar": replace(loaded.tasks["mqar"], sizes=(3,))})
    with pytest.raises(UserError, match="was made by another study"):
        data.make(other, tmp_path / "data")


class Oracle(Hymba):
    """Knows the next token of every document, and says it or anything else."""

    lies = False

    def hidden(self, ids, **_):
        return (-1) ** self.lies * torch.nn.functional.one_hot(ids.roll(-1, 1), self.config.vocab_size).float()


def test_grading_an_oracle_a_liar_and_an_untrained_model(file, tmp_path):
    loaded = study.load(file)
    tasks = data.make(loaded, tmp_path / "data").tasks
    model = Oracle(loaded.build("hymba").config).eval()
    model.lm_head = torch.nn.Identity()
    for task in tasks.values():
        assert all(cell["accuracy"] == 1 for cell in evaluate.score(model, task, 5, 200))
    model.lies = True
    for task in tasks.values():
        assert all(cell["accuracy"] == 0 for cell in evaluate.score(model, task, 5, 200))
    fresh = Hymba(loaded.build("hymba").config).eval()
    cells = evaluate.score(fresh, tasks["mqar"], 40, 4096)
    assert all(cell["accuracy"] < cell["chance"] for cell in cells)  # it does not even know which tokens are values


def test_batches_do_not_change_grades(file, tmp_path):
    loaded = study.load(file)
    task = data.make(loaded, tmp_path / "data").tasks["mqar"]
    model = Hymba(loaded.build("hymba").config).eval()
    documents = [*task.test(Cell(2), 3), *task.test(Cell(4), 4)]
    alone = [right for document in documents for right in evaluate.answers(model, [document], 1)]
    assert evaluate.answers(model, documents, 70) == alone


def test_speed_is_measured_for_all_arms_in_turn(file):
    loaded = study.load(file)
    configs = {arm: loaded.build(arm).config for arm in ("mamba", "hymba", "mamba2")}
    calls = []
    numbers = speed.measure(configs, loaded.speed, torch.device("cpu"), lambda: calls.append(1))
    assert len(calls) == 3 * 2
    for arm, found in numbers.items():
        assert 0 < found["decode"]["slowest"] <= found["decode"]["median"] <= found["decode"]["fastest"]
        timed = speed.Timed(configs[arm], loaded.speed, torch.device("cpu"))
        in_float32 = sum(timed.cache.bytes().values())
        assert found["peak_memory"] > in_float32  # the cache, and what is computed on the way
        assert found["peak_memory"] == timed.peak_memory()  # counted, not sampled
        assert found["cache_bytes"] == speed.cache_bytes(configs[arm], 32) < in_float32


def test_list_explains_every_arm(capsys):
    assert cli.run(["study", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 17
    assert rows[-1]["arm"] == "samba" and rows[-1]["where"] == "3"
    assert cli.run(["study", "list"]) == 0
    assert "branches concatenated instead of averaged" in capsys.readouterr().out


def test_list_in_the_sizes_of_a_study(file, capsys):
    assert cli.run(["study", "list", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "mamba" in shown and "samba" not in shown


@pytest.mark.slow
def test_processes_of_torchrun_train_every_run_together(file):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = [*command(file)[2:], "--arms", "hymba", "--seeds", "0"]
    subprocess.run([*torchrun, *options], check=True, env=environment, timeout=240)
    assert [line["kind"] for line in lines(file)] == ["study", "run", "run", "speed"]
