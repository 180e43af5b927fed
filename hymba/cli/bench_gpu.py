"""`hymba bench gpu`"""

import json
import sys
from contextlib import nullcontext, redirect_stdout

import click

from hymba.errors import UserError

SECTIONS = ("check", "kernels", "decode", "prefill", "peers", "train")


@click.command(
    epilog="\b\nExamples:\n  hymba bench gpu\n  hymba bench gpu --only check --only decode --batch 1 --batch 128"
)
@click.option(
    "--only", "sections", multiple=True, type=click.Choice(SECTIONS), default=SECTIONS,
    help="What to do; may be repeated.  [default: all]",
)  # fmt: skip
@click.option(
    "--batch", "batches", multiple=True, type=click.IntRange(1), default=(1, 8, 32, 128),
    help="Rows that decode together, halved until they fit; may be repeated.  [default: 1, 8, 32, 128]",
)  # fmt: skip
@click.option(
    "--seconds", default=3600.0, show_default=True, type=click.FloatRange(0), help="Begin no section after that time."
)
@click.option("--json", "as_json", is_flag=True, help="Print the JSON line only; the rest goes to stderr.")
def gpu(sections: tuple[str, ...], batches: tuple[int, ...], seconds: float, as_json: bool) -> None:
    """Check the kernels for GPUs on this card, and time them, decoding, prefill and training of random weights.

    First every operation and a step of decoding are compared with the reference. Then kernels are held against the
    limits of the card; Hymba-1.5B decodes from filled caches of 8K tokens, beside Llama-3.2-3B and 1B of
    transformers, if that is installed, in its static cache and compiled; prompts are read, and the three sizes are
    trained. Ends with one JSON line. The first run compiles for minutes.
    """
    from hymba.bench.gpu import suite

    suite.require_gpu()
    if len(set(batches)) < len(batches):
        raise UserError("--batch was given twice with the same number")
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        report = suite.run(list(sections), sorted(batches), seconds)
    print(json.dumps(report))
