"""`hymba bench gpu`"""

import json

import click

from hymba.errors import UserError
from hymba.files import atomic_write

SECTIONS = ("check", "kernels", "decode", "prefill", "train", "operators", "peers")


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
    "--seconds", default=540.0, show_default=True, type=click.FloatRange(0),
    help="Begin nothing new after that time; each section has its share, and what it leaves goes to the next.",
)  # fmt: skip
@click.option("--json", "file", type=click.Path(dir_okay=False), help="Write the JSON object here, too.")
def gpu(sections: tuple[str, ...], batches: tuple[int, ...], seconds: float, file: str | None) -> None:
    """Check the kernels for GPUs on this card, and time them, decoding, prefill and training of random weights.

    First every operation, a step of decoding and one of training are compared with the reference. Then kernels are
    held against the limits of the card; Hymba-1.5B decodes from filled caches of 8K tokens and reads prompts; the
    three sizes are trained; the operators that the released code needs run beside ours, where they are installed; and
    transformers, if it is installed, decodes with the shapes of Llama-3.2-3B and 1B, Falcon-H1-1.5B and Mamba-1.4B.
    What fails costs a line, not the run. Ends with one JSON line.
    """
    from hymba.bench.gpu import suite

    suite.require_gpu()
    if len(set(batches)) < len(batches):
        raise UserError("--batch was given twice with the same number")
    line = json.dumps(suite.run(list(sections), sorted(batches), seconds))
    if file:
        with atomic_write(file) as temporary:
            temporary.write_text(line + "\n")
    print(line)
