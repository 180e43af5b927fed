"""`hymba study`"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import click

from hymba.cli.terminal import job
from hymba.errors import UserError

TITLES = ("run", "arm", "lr", "seed", "bits/byte", "recall", "tokens/s")
WIDTHS = ("<9", "<20", ">8", ">4", ">9", ">7", ">9")


@click.group(
    epilog="\b\nExamples:\n  hymba study list\n  hymba study run study.toml --jobs 2\n"
    "  hymba study report study --output report"
)
def study() -> None:
    """The paper's controlled study at any size: one recipe, many architectures, compared row for row.

    `hymba study COMMAND --help` explains a command.
    """


@study.command(name="list", epilog="\b\nExamples:\n  hymba study list\n  hymba study list study.toml --json")
@click.argument("study_file", metavar="[STUDY.toml]", required=False, type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_arms(study_file: str | None, as_json: bool) -> None:
    """Explain the architectures, in the sizes of a study, or of the paper's 350M model."""
    from hymba.config import HymbaConfig
    from hymba.study import report
    from hymba.study.arms import ARMS, build
    from hymba.study.study import load

    loaded = load(study_file) if study_file else None
    hymba = loaded.model if loaded else HymbaConfig.preset("350M")
    names = loaded.arms if loaded else tuple(ARMS)
    rows = [report.describe(build(name, hymba)) for name in names]
    if as_json:
        print(json.dumps(rows))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("arm", "table", "differs from", "by", "parameters", "adjusted", "cache, bytes a row"):
        table.add_column(title, justify="right" if title.startswith(("param", "cache")) else "left")
    for row in rows:
        table.add_row(
            row["arm"], row["where"], row["neighbour"] or "", row["change"], f"{row['parameters']:,}", row["adjusted"],
            f"{row['cache_bytes']:,}",
        )  # fmt: skip
    console = Console()
    console.width = max(console.width, 150)
    console.print(table)
    print(f"\nSizes of {study_file or 'the paper’s 350M model'}; caches at {rows[0]['context']} tokens, 16 bits.")


@study.command(
    epilog="\b\nExamples:\n  hymba study run study.toml --jobs 2\n"
    "  hymba study run study.toml --arms hymba,mamba,llama --seeds 0 --device cuda --jobs 8\n"
    "  torchrun --nproc-per-node 8 -m hymba study run large.toml"
)
@click.argument("study_file", metavar="STUDY.toml", type=click.Path())
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder.  [default: STUDY without .toml]")
@click.option("--arms", metavar="A,B", help="Which of the study's.  [default: all]")
@click.option("--seeds", metavar="0,1", help="Which of the study's; the first one always.  [default: all]")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda; auto: the GPU if any.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="Runs side by side.")
def run(study_file: str, output: Path | None, arms: str | None, seeds: str | None, device: str, jobs: int) -> None:
    """Train and test all arms, or go on where an earlier call stopped: the same command does both.

    Every arm is trained at each learning rate on the first seed, and at the best of them on the others. Then all arms
    are timed side by side. The folder gets results.jsonl, the data, and a training run for each.

    Under torchrun all processes train each run together; `--jobs` runs several side by side, on as many GPUs as there
    are.
    """
    if output is None and Path(study_file).suffix != ".toml":
        raise UserError(f"{study_file} does not end in .toml; name the folder with --output")
    together = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if together and jobs > 1:
        raise UserError("torchrun has started all processes already; leave out --jobs")
    from hymba.study.runner import Interrupted, Runner
    from hymba.study.study import load

    loaded = load(study_file)
    runner = Runner(
        loaded,
        output or Path(study_file).with_suffix(""),
        arms.split(",") if arms else loaded.arms,
        [_number(seed) for seed in seeds.split(",")] if seeds else loaded.seeds,
        device,
    )
    first = int(os.environ.get("RANK", 0)) == 0
    if first:
        runner.begin()
        if runner.pending():
            print(_line(TITLES), flush=True)
    try:
        if together:
            runner.run_together(_show)
        else:
            runner.run(jobs, job, _show)
    except Interrupted:
        raise click.Abort from None  # all is saved
    if first:
        runner.measure(job)
        print(f"{runner.path}: show it with `hymba study report {runner.folder}`")


@study.command(epilog="\b\nExample:\n  hymba study report study --output report")
@click.argument("results", metavar="RESULTS", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder.  [default: report, beside RESULTS]")
def report(results: Path, output: Path | None) -> None:
    """Write a report: README.md with its figures, and report.html, which has everything in one file.

    RESULTS is a study's folder, or its results.jsonl.
    """
    from hymba.study import report as writer
    from hymba.study.results import read
    from hymba.study.runner import RESULTS

    path = results / RESULTS if results.is_dir() else results
    folder = output or path.parent / "report"
    writer.write(read(path), folder)
    print(f"{folder}: README.md with figures, and report.html")


def _number(text: str) -> int:
    if not text.strip().isdigit():
        raise UserError(f"--seeds {text!r} is no seed; write numbers, separated by commas")
    return int(text)


def _show(record: dict, number: int, total: int, say: Callable[[str], object]) -> None:
    """A line of the table of finished runs."""
    from hymba.study.results import recall

    if "failed" in record:
        result = ("diverged", "", "")
    else:
        speed = record["training_tokens_per_second"]
        result = (f"{record['bits_per_byte']:.3f}", f"{recall(record):.1%}", f"{speed:,.0f}")
    say(_line((f"{number} of {total}", record["arm"], f"{record['lr']:g}", str(record["seed"]), *result)))


def _line(cells: tuple[str, ...]) -> str:
    return "  ".join(f"{cell:{width}}" for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()
