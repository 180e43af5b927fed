"""`hymba analyze`"""

from pathlib import Path

import click

from hymba.analysis import ANALYSES, report
from hymba.cli.generate import read_prompts
from hymba.cli.terminal import job, waiting
from hymba.errors import UserError
from hymba.shipped import SHIPPED_MODEL


@click.command(
    epilog="\b\nExamples:\n  hymba analyze\n"
    "  hymba analyze hybrid llama --names Hymba,Llama --text book.txt --out compared\n"
    "  hymba analyze checkpoint --only importance --json"
)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--names", metavar="A,B", help="What to call the models, in their order.  [default: their folders' names]"
)
@click.option("--only", multiple=True, type=click.Choice(ANALYSES), help="May be repeated.  [default: all]")
@click.option("--text", metavar="FILE", help="What the models read; - is stdin.  [default: Austen's prose]")
@click.option("--rows", default=4, show_default=True, type=click.IntRange(1), help="Pieces of the text to read.")
@click.option("--length", default=1024, show_default=True, type=click.IntRange(2), help="Tokens of a piece.")
@click.option("--out", default="analysis", show_default=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, ...; auto: the GPU if any.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as one JSON object, and write no folder.")
def analyze(
    models: tuple[str, ...], names: str | None, only: tuple[str, ...], text: str | None, rows: int, length: int,
    out: Path, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Look inside one or more MODELs (checkpoint folders or hub ids), side by side; without one, inside the model that
    the package ships.

    \b
    attention        what the heads look at: meta tokens, BOS, itself, other tokens; entropy
    meta             which meta tokens prose, numbers and code attend to
    importance       what the loss becomes without the attention or the Mamba heads of a layer
    receptive-field  how far back a token influences the last hidden state
    magnitudes       outputs and learned gates of the two branches
    memory           how long each SSM channel remembers

    Writes a folder: README.md, figures as PNG and SVG, and analysis.json with all numbers. Computes in float32.
    """
    models = models or (SHIPPED_MODEL,)
    labels = _labels(models, names)
    if not as_json:
        report.require_matplotlib()
    read = None if text is None else read_prompts((text,), lines=False)[0]
    only = only or ANALYSES
    found = {}
    for label, folder in zip(labels, models, strict=True):
        with waiting(f"loading {label}"):
            from hymba.analysis.run import analyze, passes
            from hymba.engine.llm import LLM

            llm = LLM(folder, device=device, dtype="float32", max_batch=1)
        with job(f"analyzing {label}", passes(llm.model, only, rows), "passes") as bar:
            found[label] = analyze(
                llm.model, llm.tokenizer, read, only=only, rows=rows, length=length, advance=bar.advance
            )
        del llm  # gone before the next one comes
    if as_json:
        print(report.as_json(found))
    else:
        report.write(found, out)
        print(f"{out}: README.md shows the figures, analysis.json has the numbers")


def _labels(models: tuple[str, ...], names: str | None) -> list[str]:
    labels = [Path(model).name or model for model in models] if names is None else names.split(",")
    if len(labels) != len(models):
        raise UserError(f"--names has {len(labels)} names for {len(models)} models; separate them by commas")
    if len(set(labels)) < len(labels):
        raise UserError(f"models have the same name ({', '.join(labels)}); give different ones with --names")
    return labels
