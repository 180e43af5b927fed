"""The trainer: what a run computes depends on its config alone, whatever happens to it on the way."""

import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import refused
from conftest import TINY, VARIANTS, assert_close, assert_same_gradients, gradients, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba import LLM, Hymba, HymbaConfig, SamplingParams, Tokenizer
from hymba.cli import run as command
from hymba.train import config as config_file
from hymba.train import train
from hymba.train.config import Optimizer, Run, Samples, Stage, TrainConfig, Validation
from hymba.train.data import Source
from hymba.train.optim import make_optimizers, parameter_groups
from hymba.train.parallel import World
from hymba.train.prepare import Settings, prepare
from hymba.train.report import read_log
from hymba.train.schedule import Schedule
from hymba.train.trainer import Trainer

TEXT = Path(__file__).resolve().parents[1] / "data" / "austen" / "persuasion.txt"
WEIGHTS = "final/model.safetensors"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Paragraphs of Austen, of very different lengths, a few of them for validation."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text(TEXT.read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    prepare(
        Settings(
            inputs=(str(folder / "text.txt"),),
            output=folder / "prepared",
            train_tokenizer=320,
            split_on="\n\n",
            validation_fraction=0.1,
        )
    )
    return str(folder / "prepared")


def make_config(corpus: str, **changes) -> TrainConfig:
    """Twelve steps in two stages, with everything that has a state: dropout, averaged weights, warmup."""
    source = (Source(corpus),)
    values = {
        "model": replace(TINY, vocab_size=320, max_length=128),
        "stages": (
            Stage(source, tokens=1024, length=32, lr_end=0.5),
            Stage(source, tokens=512, length=64, name="longer", lr_start=0.5, lr_end=0.0),
        ),
        "batch_tokens": 128,
        "warmup_tokens": 256,
        "dropout": 0.1,
        "ema": 0.9,
        "optimizer": Optimizer(lr=1e-2),
        "validation": Validation(every=6, length=64),
        "run": Run(device="cpu", log_every=4, save_every=3, micro_tokens=64),
    }
    return TrainConfig(**(values | changes))


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_log(folder / "log.jsonl") if r["kind"] == "step"}


@pytest.fixture(scope="session")
def undisturbed(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert train(make_config(corpus), folder).finished
    return folder


def die_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal when a step is done."""
    step_of = Trainer._step

    def with_signal(self, *arguments):
        if self.done + 1 == step:
            os.kill(os.getpid(), number)
        return step_of(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", with_signal)


# ----------------------------------------------------------------------------------------------------------- the config


def test_unknown_keys_and_wrong_values_are_refused(corpus):
    table = config_file.as_table(make_config(corpus))
    refused(lambda: config_file.from_table(table | {"optimiser": {}}), "unknown key optimiser", "optimizer")
    refused(lambda: config_file.from_table(table | {"optimizer": {"learning": 1}}), "unknown key optimizer.learning")
    refused(lambda: config_file.from_table(table | {"seed": "one"}), "seed='one' must be int")
    refused(lambda: config_file.from_table(table | {"dropout": True}), "dropout=True must be float")
    refused(lambda: config_file.from_table(table | {"dropout": 1.0}), "dropout=1.0 must be from 0 to below 1")
    refused(lambda: config_file.from_table(table | {"stages": []}), "no stage")
    refused(lambda: config_file.from_table(table | {"stages": [{"length": 8}]}), "stages.0.sources is missing")
    refused(lambda: config_file.from_table({k: v for k, v in table.items() if k != "stages"}), "stages is missing")
    long = {"stages": [{"sources": [corpus], "tokens": 9, "length": 129}]}
    refused(lambda: config_file.from_table(table | long), "stages.0.length=129", "max_length=128")


def test_a_saved_config_is_read_back(corpus, tmp_path):
    config = make_config(corpus, samples=Samples(prompts=('a "quote"\n', "\u007f\N{GRINNING FACE}")), seed=7)
    config = replace(config, model=replace(config.model, window=None, global_layers=(), kv_groups=()))
    config_file.save(config, tmp_path / "config.toml")
    assert config_file.load(tmp_path / "config.toml") == config


def test_overrides_win_over_the_file(corpus, tmp_path):
    config_file.save(make_config(corpus), tmp_path / "config.toml")
    pairs = [("optimizer.lr", "3e-4"), ("stages.1.tokens", "2e3"), ("run.device", "cpu"), ("optimizer.muon_lr", "none")]
    config = config_file.load(tmp_path / "config.toml", pairs)
    assert (config.optimizer.lr, config.stages[1].tokens, config.run.device) == (3e-4, 2000, "cpu")
    refused(lambda: config_file.load(tmp_path / "config.toml", [("stages.2.tokens", "1")]), "stages.2.tokens")
    refused(lambda: config_file.load(tmp_path / "missing.toml"), "missing.toml")


def test_the_vocabulary_is_the_tokenizer_s(corpus):
    stages = [{"sources": [corpus], "tokens": 10, "length": 8}]
    config = config_file.from_table({"model": {"preset": "tiny"}, "stages": stages})
    assert config.model.vocab_size == Tokenizer.from_pretrained(corpus).vocab_size
    assert config.model == HymbaConfig.preset("tiny", vocab_size=config.model.vocab_size)


# ------------------------------------------------------------------------------------------------- schedule, optimisers


@given(
    st.lists(
        st.tuples(st.integers(1, 5000), st.integers(2, 64), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=3
    ),
    st.integers(0, 3000),
)
def test_steps_cover_every_row_once_and_rates_are_continuous(stages, warmup):
    stages = tuple(Stage((Source("x"),), *rest, lr_start=a, lr_end=b) for *rest, a, b in stages)
    config = TrainConfig(TINY, stages, batch_tokens=128, warmup_tokens=warmup)
    schedule = Schedule(config)
    steps = [schedule[i] for i in range(len(schedule))]
    rows, tokens = [0] * len(stages), 0
    for step in steps:
        stage = stages[step.stage]
        assert step.first_row == rows[step.stage] and step.length == stage.length
        rows[step.stage] += step.rows
        tokens += step.rows * step.length
        assert step.tokens == tokens
        assert 0 <= step.lr <= max(stage.lr_start, stage.lr_end)
        assert tokens <= warmup or min(stage.lr_start, stage.lr_end) <= step.lr
        if step.first_row == 0 and tokens > warmup:
            assert step.lr == pytest.approx(stage.lr_start)
    for stage, count in zip(stages, rows, strict=True):  # to within half a step
        assert abs(count * stage.length - stage.tokens) <= max(128, count * stage.length / 2)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_is_in_one_group(changes):
    model = tiny_model(**changes)
    groups = parameter_groups(model)
    flat = [p for group in groups for p in group]
    assert {id(p) for p in flat} == {id(p) for p in model.parameters()} and len(flat) == len(set(map(id, flat)))
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, decaying, kept = ([names[id(p)] for p in group] for group in groups)
    for name in kept:
        assert "norm" in name or name.rpartition(".")[2] in {"A_log", "D", "dt_bias", "conv_bias", "meta_tokens"}, name
    for name in (*matrices, *decaying):
        assert "norm" not in name and name.rpartition(".")[2] not in {"A_log", "D", "meta_tokens"}, name
    assert all(name.startswith("blocks.") and "conv" not in name for name in matrices)


def test_muon_moves_the_matrices_as_pytorch_s_does(monkeypatch):
    """Which takes them one by one, whereas ours takes those of one shape together, here three at most."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    model, other = tiny_model(), tiny_model()
    monkeypatch.setattr("hymba.train.optim.TOGETHER", 3 * 64 * 64)
    ours = make_optimizers(model, Optimizer(name="muon", lr=1e-2))[0]
    matrices, others = parameter_groups(model)[0], parameter_groups(other)[0]
    theirs = torch.optim.Muon(others, lr=1e-2, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for matrix, same in zip(matrices, others, strict=True):
            matrix.grad = torch.randn_like(matrix)
            same.grad = matrix.grad.clone()
        ours.step()
        theirs.step()
    for matrix, same in zip(matrices, others, strict=True):
        torch.testing.assert_close(matrix, same, rtol=0, atol=1e-4)


def test_weights_that_do_not_decay_stay_without_gradient():
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = make_optimizers(model, Optimizer(lr=0.1, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    decayed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert "embedding.weight" in decayed and "blocks.0.heads.in_proj.weight" in decayed
    assert not [n for n in decayed if "norm" in n or "A_log" in n or n.endswith(".D") or "bias" in n or "meta" in n]


# --------------------------------------------------------------------------------------------------- the loss of a step


@settings(max_examples=10)
@given(st.integers(0, 1000), st.integers(1, 5), st.sampled_from([16, 32, 64, 128]))
def test_packed_rows_cost_what_their_documents_cost_alone(corpus, first, count, micro_tokens):
    """Through the trainer's own path: rows as they are loaded, parts as they are accumulated."""
    config = make_config(corpus, run=Run(device="cpu", micro_tokens=micro_tokens), dropout=0.0)
    trainer = Trainer(config, Path("unused"), World("cpu", "ddp"))
    rows = trainer.rows[0].rows(first, count)
    parts = [(part, int((part.labels != -100).sum())) for part in trainer._parts(rows)]
    targets = sum(n for _, n in parts)
    packed = sum(trainer._loss(trainer.model, part) * n for part, n in parts) / targets
    alone = []
    for ids, documents, labels in zip(*rows, strict=True):
        for document in documents.unique():
            mine = documents == document
            text, label = ids[mine][None], labels[mine][None]
            if (label[:, 1:] != -100).any():
                alone.append(trainer.model(text, labels=label) * (label[:, 1:] != -100).sum())
    separate = sum(alone) / targets
    assert_close(packed, separate)
    separate.backward()
    expected = gradients(trainer.model)
    packed.backward()
    assert_same_gradients(gradients(trainer.model), expected)


def test_accumulation_changes_nothing(corpus, tmp_path):
    """Parts of a batch have different numbers of targets; tokens weigh the same nevertheless."""
    runs = []
    for micro_tokens in (32, 128):
        config = make_config(corpus, dropout=0.0, run=Run(device="cpu", micro_tokens=micro_tokens, log_every=1))
        train(config, tmp_path / str(micro_tokens))
        runs.append(losses(tmp_path / str(micro_tokens)))
    assert runs[0] == pytest.approx(runs[1], abs=2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_recorded_step_is_the_same_step(corpus, tmp_path):
    run = Run(device="cuda", log_every=4)
    config = make_config(corpus, dropout=0.0, run=run)
    train(config, tmp_path / "eager")
    train(replace(config, run=replace(run, graph=True)), tmp_path / "graph")
    assert losses(tmp_path / "graph") == losses(tmp_path / "eager")


def test_a_graph_without_a_gpu_is_refused(corpus, tmp_path):
    config = make_config(corpus, run=Run(device="cpu", graph=True))
    refused(lambda: train(config, tmp_path / "run"), "run.graph needs a GPU")


def test_dropout_is_for_training_only(corpus):
    model, ids = tiny_model(), torch.arange(1, 33)[None]
    expected = model(ids)
    model.dropout = 0.5
    assert torch.equal(model(ids), expected)
    assert not torch.equal(model.train()(ids), expected)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_blocks", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_batch_is_learned_by_heart(corpus, tmp_path, optimizer, precision, checkpoint_blocks, monkeypatch):
    config = make_config(
        corpus,
        stages=(Stage((Source(corpus),), tokens=64 * 200, length=32, lr_end=0.0),),
        batch_tokens=64,
        precision=precision,
        dropout=0.0,
        ema=0.0,
        optimizer=Optimizer(name=optimizer, lr=1e-2, weight_decay=0.0),
        validation=Validation(every=1000),
        run=Run(device="cpu", checkpoint_blocks=checkpoint_blocks, save_every=1000),
    )
    load = Trainer._load
    monkeypatch.setattr(Trainer, "_load", lambda self, number: load(self, 0))
    train(config, tmp_path)
    assert losses(tmp_path)[200] < 0.01


# ------------------------------------------------------------------------------------------------ stopping and going on


def test_a_run_leaves_a_model_that_every_verb_reads(corpus, undisturbed):
    model = Hymba.from_pretrained(undisturbed / "final")
    assert model.config == make_config(corpus).model
    assert LLM(undisturbed / "final").generate("It", SamplingParams(max_tokens=3))[0].token_ids
    log = read_log(undisturbed / "log.jsonl")
    assert [r["step"] for r in log if r["kind"] == "step"] == list(range(1, 13))
    assert [r["step"] for r in log if r["kind"] == "validation"] == [6, 12]
    assert config_file.load(undisturbed / "final" / "train.toml") == make_config(corpus)
    card = (undisturbed / "final" / "README.md").read_text()
    for words in ("library_name: hymba", "bits per byte", "## Data", "## Recipe", "## Limits and risks", "reproduce"):
        assert words in card
    assert sorted(p.name for p in (undisturbed / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]


def test_validation_is_the_mean_over_the_split_with_averaged_weights(corpus, undisturbed):
    from hymba.train.data import ValidationRows

    model, data = Hymba.from_pretrained(undisturbed / "final"), ValidationRows(corpus, 64)
    nats = 0.0
    with torch.no_grad():
        for rows in data.batches(1):
            if count := int((rows.labels != -100).sum()):
                nats += float(model(rows.input_ids, document_ids=rows.document_ids, labels=rows.labels)) * count
    last = [r for r in read_log(undisturbed / "log.jsonl") if r["kind"] == "validation"][-1]
    assert last["loss"] == pytest.approx(nats / data.tokens, rel=1e-5)
    assert last["bits_per_byte"] == pytest.approx(data.bits_per_byte(nats), rel=1e-5)


@pytest.mark.parametrize(("step", "number"), [(1, signal.SIGTERM), (6, signal.SIGINT), (10, signal.SIGTERM)])
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(corpus, undisturbed, tmp_path, monkeypatch, step, number):
    with monkeypatch.context() as patch:
        die_after(patch, step, number)
        result = train(make_config(corpus), tmp_path)
    assert result.step == step and not result.finished and result.stopped_by == signal.Signals(number).name
    assert train(make_config(corpus), tmp_path).finished
    assert (tmp_path / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()
    assert losses(tmp_path) == losses(undisturbed)


def test_the_same_call_again_does_nothing(corpus, undisturbed):
    before = (undisturbed / WEIGHTS).stat().st_mtime_ns
    assert train(make_config(corpus), undisturbed).finished
    assert (undisturbed / WEIGHTS).stat().st_mtime_ns == before


def test_muon_goes_on_too(corpus, tmp_path, monkeypatch):
    config = make_config(corpus, optimizer=Optimizer(name="muon", lr=1e-2))
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        die_after(patch, 7)
        train(config, tmp_path / "parts")
    train(config, tmp_path / "parts")
    assert (tmp_path / "parts" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_another_config_is_refused(corpus, tmp_path, monkeypatch):
    config = make_config(corpus)
    with monkeypatch.context() as patch:
        die_after(patch, 2)
        train(config, tmp_path)
    changed = replace(config, optimizer=replace(config.optimizer, lr=2e-2))
    refused(lambda: train(changed, tmp_path), "optimizer.lr = 0.01, now 0.02")
    refused(lambda: train(replace(config, stages=config.stages[:1]), tmp_path), "stages")
    assert train(replace(config, run=replace(config.run, log_every=5)), tmp_path).finished  # how is not what


@pytest.mark.parametrize("damage", ["cut", "flip", "manifest", "missing"])
def test_a_damaged_checkpoint_is_passed_over(corpus, undisturbed, tmp_path, monkeypatch, capfd, damage):
    with monkeypatch.context() as patch:
        die_after(patch, 6)
        train(make_config(corpus), tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000006"
    data = next(newest.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    if damage == "cut":
        data.write_bytes(content[:-100])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "missing":
        data.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    capfd.readouterr()
    assert train(make_config(corpus), tmp_path).finished
    said = capfd.readouterr().err
    assert "step-00000006 is damaged" in said and "going on after step 3" in said
    assert (tmp_path / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()
    assert losses(tmp_path) == losses(undisturbed)


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew_silently(corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        die_after(patch, 2)
        train(make_config(corpus), tmp_path)
    for path in tmp_path.glob("checkpoints/*/manifest.json"):
        path.unlink()
    refused(lambda: train(make_config(corpus), tmp_path), "no checkpoint", "whole")


@pytest.mark.parametrize("value", [float("nan"), 1e4])
def test_a_loss_that_makes_no_sense_stops_the_run(corpus, tmp_path, monkeypatch, value):
    loss = Trainer._loss
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_loss", lambda self, *a: loss(self, *a) * (value if self.done == 6 else 1))
        refused(lambda: train(make_config(corpus), tmp_path), "at step 7", "'general', rows 24 to 27", "step-00000006")
    assert read_log(tmp_path / "log.jsonl")[-1]["kind"] == "stopped"
    assert train(make_config(corpus), tmp_path).finished


def test_a_full_disk_stops_the_run_and_spoils_nothing(corpus, undisturbed, tmp_path, monkeypatch):
    """A limit on the size of files stands for the end of the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    step_of = Trainer._step

    def with_limit(self, *arguments):
        if self.done == 4:
            self.checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        return step_of(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", with_limit)
        try:
            refused(lambda: train(make_config(corpus), tmp_path), "cannot write a checkpoint", "step-00000003")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert train(make_config(corpus), tmp_path).finished
    assert (tmp_path / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()


def test_training_may_start_from_a_checkpoint(corpus, undisturbed, tmp_path):
    table = config_file.as_table(make_config(corpus))
    table["model"] = {"from": str(undisturbed / "final"), "max_length": 64}
    config = config_file.from_table(table)
    trainer = Trainer(config, tmp_path, World("cpu", "ddp"))
    started = dict(trainer.model.named_parameters())
    for name, p in Hymba.from_pretrained(undisturbed / "final").named_parameters():
        assert torch.equal(started[name], p)
    table["model"]["d_ff"] = 64
    refused(lambda: Trainer(config_file.from_table(table), tmp_path, World("cpu", "ddp")), "model.from", "mlp")


def test_samples_and_tensorboard(corpus, tmp_path):
    pytest.importorskip("tensorboard")
    config = make_config(corpus, samples=Samples(prompts=("It", "She was"), max_tokens=4, every=6))
    config = replace(config, run=replace(config.run, tensorboard=True))
    train(config, tmp_path)
    samples = [r for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "sample"]
    assert [(r["step"], r["prompt"]) for r in samples] == [(n, p) for n in (6, 12) for p in ("It", "She was")]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_the_command(corpus, tmp_path, capsys):
    config_file.save(make_config(corpus), tmp_path / "small.toml")
    arguments = ["train", str(tmp_path / "small.toml"), "--stages.0.tokens", "256", "--run.log_every=2"]
    assert command(arguments) == 0
    assert json.loads((tmp_path / "small" / "log.jsonl").read_text().splitlines()[-1])["step"] == 6
    assert command([*arguments, "--seed", "1"]) == 2
    assert "seed = 0, now 1" in capsys.readouterr().err
    assert command(["train", str(tmp_path / "small.toml"), "--nonsense", "1"]) == 2
    assert command(["train", "--help"]) == 0
    assert "--optimizer.lr" in capsys.readouterr().out
