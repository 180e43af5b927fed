"""`hymba bench peers`"""

import json
from pathlib import Path
from typing import Any

import click

from hymba.cli.terminal import job
from hymba.config import PRESETS
from hymba.errors import UserError


@click.command(
    epilog="\b\nExamples:\n  hymba bench peers --peer transformers:falcon-h1 --task decode > a.jsonl\n"
    "  hymba bench peers --peer llama.cpp:llama-3b --precision bfloat16 > b.jsonl\n"
    "  hymba bench peers --join a.jsonl --join b.jsonl"
)
@click.option(
    "--peer", "names", multiple=True, metavar="ENGINE:SHAPE",
    help="Engines: transformers, llama.cpp; shapes: llama-1b, llama-3b, falcon-h1, mamba (transformers only). May be "
    "repeated.  [default: all that are installed]",
)  # fmt: skip
@click.option(
    "--task", "tasks", multiple=True, type=click.Choice(("decode", "aggregate", "prefill", "cache")),
    help="decode: batch 1, contexts of 16, 2048, 8192; aggregate: context 8192, batches of 1 to 8, Llama only; "
    "prefill: 512 tokens; cache: bytes. May be repeated.  [default: all]",
)  # fmt: skip
@click.option(
    "--precision", "precisions", multiple=True, type=click.Choice(("bfloat16", "int8", "int4")),
    help="Of the weights; transformers is always in bfloat16. May be repeated.  [default: all]",
)  # fmt: skip
@click.option(
    "--batch", "batches", multiple=True, type=click.Choice((1, 2, 4, 8)),
    help="Of the task aggregate; may be repeated.  [default: all]",
)  # fmt: skip
@click.option("--model", default="1.5B", show_default=True, help=f"Our shape: {', '.join(PRESETS)}, or a checkpoint's.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="Repetitions of each workload.")
@click.option("--threads", type=click.IntRange(1), help="[default: PyTorch's]")
@click.option(
    "--join", "parts", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measure nothing; make the tables of what earlier runs printed. May be repeated.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the JSON line only.")
def peers(parts: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Compare Hymba with other engines on this CPU: random weights, the published shapes, filled caches.

    Hymba and one peer run in turn in one process, and the machine's limits are probed around each repetition, so that
    both have the same weather. A peer's weights are gone before the next one is loaded; llama.cpp's are written to a
    file in the folder for temporary files first, up to 7 GB. Prints Markdown tables and one JSON line.
    """
    import torch

    from hymba.bench import check, limits, suite
    from hymba.bench.peers import compare

    if parts:
        records, cache = compare.load(parts)
        print(compare.tables(records, cache, f"Hymba-{options['model']}"))
        return
    if unknown := set(options["names"]) - set(compare.PEERS):
        raise UserError(f"unknown peer {min(unknown)}; choose from {', '.join(compare.PEERS)}")
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    limits.require_probes()
    names = options["names"] or compare.PEERS
    tasks = options["tasks"] or (*compare.TASKS, "cache")
    precisions = options["precisions"] or compare.PRECISIONS
    timed = [task for task in tasks if task in compare.TASKS]
    absent = {name: why for name, engine in compare.ENGINES.items() if (why := engine.absent())}
    if not as_json:
        for engine in sorted({name.split(":")[0] for name in names} & set(absent)):
            print(f"absent: {engine} ({absent[engine]})")
    present = [name for name in names if name.split(":")[0] not in absent]
    if timed and not present:
        raise UserError(f"no peer is here: {'; '.join(f'{name}: {why}' for name, why in absent.items())}")
    config = suite.shape(options["model"])
    errors = check.fast_against_reference(config)
    ours, records = compare.Ours(config), []
    for name in present if timed else ():
        comparisons = compare.plan(name, timed, precisions, options["batches"])
        total = (options["repeats"] + 1) * sum(len(c.ours) + 1 for c in comparisons)
        with job(f"measuring {name}", total, "runs") as bar:
            records += compare.run(name, ours, comparisons, options["repeats"], bar.advance)
    cache = compare.cache_bytes(ours) if "cache" in tasks else None
    if not as_json:
        print(compare.tables(records, cache, f"Hymba-{options['model']}"))
    machine = suite.machine() | compare.versions()
    print(
        json.dumps(
            {"machine": machine, **options, "relative_error": errors, "cache": cache, "rows": suite.as_json(records)}
        )
    )
