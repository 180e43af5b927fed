"""`hymba bench`"""

import json
from typing import Any

import click

from hymba.cli.terminal import job
from hymba.config import PRESETS
from hymba.errors import UserError

WORKLOADS = ("decode", "prefill", "train")
PRECISIONS = ("float32", "bfloat16", "int8", "int4")


class Bench(click.Command):
    """`hymba bench peers` and `hymba bench gpu` are commands of their own; other words are what shall be timed."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args[:1] == ["peers"]:
            from hymba.cli.bench_peers import peers

            return peers.make_context(f"{info_name} peers", args[1:], parent, **extra)
        if args[:1] == ["gpu"]:
            from hymba.cli.bench_gpu import gpu

            return gpu.make_context(f"{info_name} gpu", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


@click.command(
    cls=Bench,
    epilog="\b\nExamples:\n  hymba bench\n"
    "  hymba bench decode --precision int8 --precision int4 --batch 1 --batch 8 --context 2048\n"
    "  hymba bench decode --precision int4 --batch 8 --context 8192 --cache model --cache int8\n"
    "  hymba bench peers --help\n  hymba bench gpu --help",
)
@click.argument("what", nargs=-1, metavar="[decode|prefill|train]...", type=click.Choice(WORKLOADS))
@click.option("--model", default="1.5B", show_default=True, help=f"Shape: {', '.join(PRESETS)}, or a checkpoint's.")
@click.option(
    "--precision", "precisions", multiple=True, type=click.Choice(PRECISIONS), default=("bfloat16",),
    help="Of the weights; may be repeated.  [default: bfloat16]",
)  # fmt: skip
@click.option(
    "--batch", "batches", multiple=True, type=click.IntRange(1), default=(1,),
    help="Rows that decode together; may be repeated.  [default: 1]",
)  # fmt: skip
@click.option(
    "--context", "contexts", multiple=True, type=click.IntRange(1), default=(2048,),
    help="Tokens in the cache when decoding begins, or of the prompt; may be repeated.  [default: 2048]",
)  # fmt: skip
@click.option(
    "--cache", "caches", multiple=True, type=click.Choice(("model", "int8")), default=("model",),
    help="Of keys and values: the model's dtype, or 8 bits; may be repeated.  [default: model]",
)  # fmt: skip
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="Repetitions of each workload.")
@click.option("--threads", type=click.IntRange(1), help="[default: PyTorch's]")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON line only.")
def bench(what: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Time decoding, prefill and training steps of random weights on the CPU, against the machine's limits.

    First the fast path is checked against the reference. Then the workloads run in turn, and the memory's read
    bandwidth and the processor's arithmetic peak are probed around each repetition: what counts is the share of the
    limit, since a shared machine's speed moves. Ends with one JSON line. `hymba bench peers` compares with other
    engines, `hymba bench gpu` measures on a GPU.
    """
    import torch

    from hymba.bench import check, limits, suite, workloads

    if "train" in what and (quantised := set(options["precisions"]) & {"int8", "int4"}):
        raise UserError(
            f"quantised weights ({', '.join(sorted(quantised))}) are not trained; choose another --precision"
        )
    if set(what) == {"train"} and "int8" in options["caches"]:
        raise UserError("training steps use no cache; leave --cache away")
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    limits.require_probes()
    config = suite.shape(options["model"])
    kinds = [None if kind == "model" else kind for kind in dict.fromkeys(options["caches"])]
    errors = {}
    for kind in kinds:
        found = check.fast_against_reference(config, kind)
        errors |= found if kind is None else {f"{dtype}, {kind} cache": error for dtype, error in found.items()}
    if not as_json:
        shown = "; ".join(f"{name} {error:.1e}" for name, error in errors.items())
        print(f"fast path checked against the reference, relative error of the logits: {shown}")
    rows = []
    for precision in options["precisions"]:
        works = {}
        model = workloads.random_model(config, precision) if set(what) != {"train"} else None
        if "decode" in what or not what:
            works |= suite.decode_workloads(model, precision, options["batches"], options["contexts"], kinds)
        if "prefill" in what or not what:
            works |= suite.prefill_workloads(model, precision, options["contexts"], kinds)
        if "train" in what:
            works |= suite.train_workloads(config, precision)
        with job(f"measuring {precision}", (options["repeats"] + 1) * len(works), "runs") as bar:
            rows += suite.measure(works, options["repeats"], bar.advance)
        del works, model  # gone before the next one is made
    if not as_json:
        _show(rows)
    print(json.dumps({"machine": suite.machine(), **options, "relative_error": errors, "rows": suite.as_json(rows)}))


def _show(rows: list) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    for title in ("tokens/s", "ms/token", "spread", "of the limit", "GB/s", "Gop/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.tokens_per_second:,.1f}",
            f"{row.ms_per_token:,.3g}",
            f"{row.fastest_ms:,.3g}-{row.slowest_ms:,.3g}",
            "" if row.share_of_limit is None else f"{row.share_of_limit:.0%}",
            f"{row.read_gb_per_second:.0f}",
            f"{row.peak_gop_per_second:,.0f}",
        )
    console = Console()
    console.width = max(console.width, 110)  # a table that is cut says nothing
    console.print(table)
