"""`hymba info`"""

import json
from typing import Any

import click

from hymba.config import PRESETS, HymbaConfig
from hymba.errors import UserError

MB = 10**6


@click.command(epilog="Example:  hymba info 1.5B --context 8192 --batch 8")
@click.argument("model")
@click.option("--context", type=click.IntRange(1), help="Text tokens a row may hold.  [default: the model's context]")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="Rows.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: the checkpoint's]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(model: str, context: int | None, batch: int, dtype: str | None, as_json: bool) -> None:
    """Show what MODEL is made of and what its cache costs, next to Llama-3.2-3B at the same context.

    MODEL is a checkpoint folder, a hub id, or one of the paper's family: 125M, 350M, 1.5B. No weights are read.
    """
    if model in PRESETS:
        config, stored = HymbaConfig.preset(model), "bfloat16"
    else:
        from hymba.convert import load_config, resolve

        config, named = load_config(resolve(model))
        stored = str(named or "float32").removeprefix("torch.")
    context = context or config.max_length
    if context > config.max_length:
        raise UserError(f"--context {context} is longer than the model's context of {config.max_length}")
    facts = describe(config, context, batch, dtype or stored)
    print(json.dumps(facts, indent=2)) if as_json else _print(config, facts)


def describe(config: HymbaConfig, context: int, batch: int, dtype: str) -> dict[str, Any]:
    """Everything that `hymba info` shows, as numbers."""
    from hymba.cost import LLAMA_3B, cache_bytes, parameters

    size = 4 if dtype == "float32" else 2
    parts, cache = parameters(config), cache_bytes(config, batch, context, size)
    # the paper counts meta tokens as if every sequence stored their keys and values
    meta_kv = cache["meta"] - (cache["conv"] + cache["ssm"]) // batch
    llama = LLAMA_3B.kv_bytes(batch, context, size)
    total = sum(parts.values())
    return {
        "parameters": {**parts, "total": total},
        "weight_bytes": total * size,
        "dtype": dtype,
        "context": context,
        "batch": batch,
        "cache_bytes": {
            **cache,
            "rows": cache["kv"] + cache["conv"] + cache["ssm"],
            "kv_if_meta_were_stored_per_sequence": cache["kv"] + batch * meta_kv,
        },
        "llama_3_2_3b_kv_bytes": llama,
        "kv_ratio": llama / cache["kv"],
        "rows_ratio": llama / (cache["kv"] + cache["conv"] + cache["ssm"]),
    }


def _print(config: HymbaConfig, facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    c, console = config, Console()
    producers = sum(plan.produces_kv for plan in c.layers)
    full = sum(plan.window is None for plan in c.layers)
    console.print(
        f"{c.n_layers} layers of width {c.d_model}: {c.n_heads} query heads on {c.n_kv_heads} key/value heads beside "
        f"Mamba heads of width {c.d_inner}, state {c.d_state}\n"
        f"{full} layers see everything, the others {c.window} tokens back and {c.n_meta} meta tokens; "
        f"{producers} of {c.n_layers} layers store keys and values\n"
        f"context {c.max_length}, vocabulary {c.vocab_size}, RoPE {c.rope}"
    )
    table = Table("parameters", title=None, box=None, header_style="bold")
    table.add_column("", justify="right")
    table.add_column("share", justify="right")
    total = facts["parameters"]["total"]
    for name, count in facts["parameters"].items():
        style = "bold" if name == "total" else None
        table.add_row(name, f"{count:,}", f"{count / total:.1%}", style=style)
    console.print(table)
    console.print(f"weights in {facts['dtype']}: {facts['weight_bytes'] / MB:,.1f} MB\n")

    cache, batch = facts["cache_bytes"], facts["batch"]
    rows = f"{batch} row{'s' if batch > 1 else ''} of {facts['context']} tokens"
    table = Table(f"cache, {rows}, {facts['dtype']}", box=None, header_style="bold")
    table.add_column("MB", justify="right")
    table.add_row("keys and values", f"{cache['kv'] / MB:,.2f}")
    table.add_row("conv states", f"{cache['conv'] / MB:,.2f}")
    table.add_row("SSM states (float32)", f"{cache['ssm'] / MB:,.2f}")
    table.add_row("all rows", f"{cache['rows'] / MB:,.2f}", style="bold")
    table.add_row("meta tokens, once for all rows", f"{cache['meta'] / MB:,.2f}")
    table.add_row("keys and values, if every sequence stored the meta tokens",
                  f"{cache['kv_if_meta_were_stored_per_sequence'] / MB:,.2f}")  # fmt: skip
    table.add_row("Llama-3.2-3B, keys and values", f"{facts['llama_3_2_3b_kv_bytes'] / MB:,.2f}")
    console.print(table)
    console.print(
        f"Llama-3.2-3B's is {facts['kv_ratio']:.2f} times larger than our keys and values, "
        f"{facts['rows_ratio']:.2f} times larger than all that a row holds."
    )
