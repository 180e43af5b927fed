"""final/: the trained model in the official layout, with its tokenizer, its model card, curves and config."""

import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hymba import __version__
from hymba.cost import parameters
from hymba.model.hymba import Hymba
from hymba.tokenizer import Tokenizer
from hymba.train import config as config_file
from hymba.train.config import TrainConfig
from hymba.train.data import Corpus
from hymba.train.report import LOG, read_log
from hymba.train.schedule import Schedule

CURVES = "curves.png"
# validations that a table of a card shows at most
TABLE_ROWS = 12


def write_final(model: Hymba, tokenizer: Tokenizer, config: TrainConfig, folder: Path, name: str) -> None:
    """Write the folder aside and rename it."""
    aside, target = folder / f".{name}.tmp", folder / name
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    config_file.save(config, aside / "train.toml")
    log = read_log(folder / LOG)
    pictured = _draw(log, aside / CURVES)
    card(config, log, config.card.name or folder.resolve().name, pictured).save(aside / "README.md")
    if target.exists():
        shutil.rmtree(target)
    aside.rename(target)


def card(config: TrainConfig, log: list[dict[str, Any]], name: str, pictured: bool) -> ModelCard:
    """The model card of a run, from its config and its log (Mitchell et al., arXiv 1810.03993).

    pictured: whether there is a picture of the curves beside it
    """
    c, corpora = config, [Corpus(path) for path in config.sources]
    validations = [record for record in log if record["kind"] == "validation"]
    last = {record["source"]: record for record in validations}
    results = [
        EvalResult("text-generation", "text", f"{Path(source).name} (validation)", kind, round(record[key], 4))
        for source, record in last.items()
        for kind, key in (("bits per byte", "bits_per_byte"), ("loss, nats per token", "loss"))
    ]
    data = ModelCardData(
        language=c.card.language or None,
        license=c.card.license or None,
        library_name="hymba",
        pipeline_tag="text-generation",
        tags=["hymba", "hybrid-head", "mamba", "attention"],
        model_name=name,
        eval_results=results or None,
    )
    count = sum(parameters(c.model).values())
    sections = [
        f"# {name}",
        f"A hybrid-head language model (attention heads and Mamba heads side by side in every layer, after "
        f"[Hymba](https://arxiv.org/abs/2411.13676)) of {count / 1e6:.1f} million parameters, trained with "
        f"[hymba](https://pypi.org/project/hymba) {__version__}.",
        f'```\nhymba generate -m {name} "Once"\n```',
        "## Data",
        c.card.data or "The card does not say where the texts are from and under which licence they are.",
        _data_table(corpora),
        "## Recipe",
        _recipe(c),
        "## Curves",
        f"![Training and validation loss]({CURVES})" if pictured else "",
        _curve_table(validations),
        "## Evaluation",
        _evaluation(last),
        _samples(log),
        "## Intended use",
        c.card.intended_use or "Research on small language models. It has not been tuned to follow instructions.",
        "## Limits and risks",
        f"The context is {c.model.max_length} tokens. What the model writes resembles its training data and is not "
        "knowledge: it states false things fluently. Text that was not curated holds prejudice, abuse and private "
        "matters, and a model trained on it can repeat them; texts from other times hold the views of those times. It "
        "can repeat passages of its training data word for word. Nobody has tested it for safety. Do not rely on it "
        "for advice, and do not use it where its text can harm someone without a person checking it first.",
        c.card.notes,
        "## How to reproduce it",
        f"Prepare the data as in the table above (`hymba prepare`), then, with `train.toml` from this folder:\n\n"
        f"```\nhymba train train.toml\n```\n\n"
        f"hymba {__version__}, PyTorch {torch.__version__}, seed {c.seed}. On a CPU of the same kind, with one process "
        "and the same number of threads, the weights come out the same to the bit.",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def _data_table(corpora: list[Corpus]) -> str:
    rows = []
    for corpus in corpora:
        for split, entry in corpus.manifest["splits"].items():
            inputs = [Path(name).name for name in corpus.manifest["inputs"].get(split, [])]
            shown = ", ".join(inputs[:8]) + (f" and {len(inputs) - 8} more" if len(inputs) > 8 else "")
            counts = [f"{entry[key]:,}" for key in ("documents", "tokens", "bytes")]
            rows.append([corpus.path.name, split, shown, *counts])
    head = ["folder", "split", "inputs", "documents", "tokens", "bytes of text"]
    return _table(head, rows) + "\n\nInputs of the validation split are left out of the training split."


def _recipe(c: TrainConfig) -> str:
    o = c.optimizer
    rows = []
    for stage in c.stages:
        sources = ", ".join(f"{Path(source.path).name} ({source.weight:g})" for source in stage.sources)
        rates = f"{stage.lr_start * o.lr:.3g} to {stage.lr_end * o.lr:.3g}"
        rows.append([stage.name, f"{stage.tokens:,}", str(stage.length), sources, rates])
    optimizer = f"AdamW (betas {o.beta1}, {o.beta2})"
    if o.name == "muon":
        optimizer = f"Muon (peak rate {o.muon_lr or o.lr:g}) for the matrices of the blocks, {optimizer} for the rest"
    parts = [
        f"{Schedule(c).tokens:,} tokens in {len(Schedule(c)):,} steps of {c.batch_tokens:,}",
        f"warmup over {c.warmup_tokens:,} tokens",
        optimizer,
        f"weight decay {o.weight_decay:g}, gradients clipped at {o.clip:g}",
        f"dropout {c.dropout:g}" if c.dropout else "",
        f"weights averaged with decay {c.ema:g}" if c.ema else "",
        f"products in {c.precision}, weights in float32",
        f"started from {c.checkpoint}" if c.checkpoint else "",
    ]
    m = c.model
    shape = (
        f"{m.n_layers} layers of width {m.d_model}, {m.n_heads} query and {m.n_kv_heads} key heads, MLP {m.d_ff}, "
        f"SSM state {m.d_state}, {m.n_meta} meta tokens, window {m.window} but in layers {list(m.global_layers)}, "
        f"vocabulary {m.vocab_size}"
    )
    head = ["stage", "tokens", "row length", "sources (weight)", "learning rate"]
    return f"{shape}.\n\n{_table(head, rows)}\n\n" + "; ".join(filter(None, parts)) + "."


def _evaluation(last: dict[str, dict[str, Any]]) -> str:
    if not last:
        return "No validation split was given, so nothing was measured."
    rows = [[Path(path).name, f"{r['loss']:.4f}", f"{r['bits_per_byte']:.4f}"] for path, r in last.items()]
    return "At the end of training, on the validation splits:\n\n" + _table(
        ["data", "nats per token", "bits per byte"], rows
    )


def _curve_table(validations: list[dict[str, Any]]) -> str:
    every = -(-len(validations) // TABLE_ROWS) or 1
    rows = [
        [str(r["step"]), Path(r["source"]).name, f"{r['loss']:.4f}", f"{r['bits_per_byte']:.4f}"]
        for r in reversed(validations[::-1][::every])
    ]
    return _table(["step", "validation data", "nats per token", "bits per byte"], rows) if rows else ""


def _samples(log: list[dict[str, Any]]) -> str:
    samples = [record for record in log if record["kind"] == "sample"]
    if not samples:
        return ""
    last = [record for record in samples if record["step"] == samples[-1]["step"]]
    # as code: nothing that a model writes is markup
    quotes = ("\n".join("    " + line for line in (r["prompt"] + r["text"]).splitlines()) for r in last)
    return "What it writes:\n\n" + "\n\n---\n\n".join(quotes)


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _draw(log: list[dict[str, Any]], path: Path) -> bool:
    """A picture of the losses, if matplotlib is there."""
    if not find_spec("matplotlib"):
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [record for record in log if record["kind"] == "step"]
    axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], linewidth=0.6, alpha=0.6, label="training")
    for source in dict.fromkeys(r["source"] for r in log if r["kind"] == "validation"):
        points = [r for r in log if r["kind"] == "validation" and r["source"] == source]
        name = f"validation: {Path(source).name}"
        axes.plot([r["step"] for r in points], [r["loss"] for r in points], marker=".", label=name)
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return True
