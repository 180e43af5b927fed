"""`hymba info`"""

import json
from dataclasses import asdict
from typing import Any

import click

from hymba.cli.terminal import bold
from hymba.config import PRESETS, HymbaConfig
from hymba.errors import UserError
from hymba.shipped import SHIPPED_MODEL

MB = 10**6


@click.command(epilog="\b\nExample:\n  hymba info 1.5B --context 8192 --batch 8")
@click.argument("model", default=SHIPPED_MODEL)
@click.option("--context", type=click.IntRange(1), help="Text tokens a row may hold.  [default: the model's context]")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="Rows.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: the checkpoint's]")
@click.option("--cache", "kind", type=click.Choice(["int8"]), help="Keys and values of 8 bits.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(model: str, context: int | None, batch: int, dtype: str | None, kind: str | None, as_json: bool) -> None:
    """Show what MODEL is made of and what its cache costs, next to Llama-3.2-3B at the same context.

    MODEL is a checkpoint folder, a hub id, or one of the paper's family: 125M, 350M, 1.5B; without it, the model that
    the package ships. No weights are read.
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
    facts = describe(config, context, batch, dtype or stored, kind)
    print(json.dumps(facts, indent=2)) if as_json else _print(model, config, facts)


def describe(config: HymbaConfig, context: int, batch: int, dtype: str, kind: str | None = None) -> dict[str, Any]:
    """Everything that `hymba info` shows, as numbers."""
    from hymba.cost import LLAMA_3B, cache_bytes, parameters

    size = 4 if dtype == "float32" else 2
    parts, cache = parameters(config), cache_bytes(config, batch, context, size, kind)
    # the paper counts meta tokens as if every sequence stored their keys and values
    meta_kv = cache["meta"] - (cache["conv"] + cache["ssm"]) // batch
    llama = LLAMA_3B.kv_bytes(batch, context, size)
    total = sum(parts.values())
    return {
        "config": asdict(config),
        "parameters": {**parts, "total": total},
        "weight_bytes": total * size,
        "dtype": dtype,
        "context": context,
        "batch": batch,
        "kv_dtype": kind or dtype,
        "cache_bytes": {
            **cache,
            "rows": cache["kv"] + cache["conv"] + cache["ssm"],
            "kv_if_meta_were_stored_per_sequence": cache["kv"] + batch * meta_kv,
        },
        "llama_3_2_3b_kv_bytes": llama,
        "kv_ratio": llama / cache["kv"] if cache["kv"] else None,
        "rows_ratio": llama / (cache["kv"] + cache["conv"] + cache["ssm"]),
    }


def _print(model: str, config: HymbaConfig, facts: dict[str, Any]) -> None:
    parts, cache, batch = facts["parameters"], facts["cache_bytes"], facts["batch"]
    dtype, kv = facts["dtype"], facts["kv_dtype"]
    mb = lambda count: f"{count / MB:,.2f}"  # noqa: E731
    # bytes of all rows -> what is shown of them
    per_row = lambda count: (mb(count / batch), mb(count)) if batch > 1 else (mb(count),)  # noqa: E731
    rows = ("a row", f"{batch} rows") if batch > 1 else ("a row",)

    print(bold(model))
    for title, text in _outline(config):
        print(f"  {title:<12}{text}")
    _table(
        ("Parameters", "count", "share"), [(part, f"{n:,}", f"{n / parts['total']:.1%}") for part, n in parts.items()]
    )
    print(f"  weights in {dtype}: {facts['weight_bytes'] / MB:,.1f} MB")
    _table(
        (f"Cache for {facts['context']} tokens in {dtype}, MB", *rows),
        [
            ("keys and values" + f" ({kv})" * (kv != dtype), *per_row(cache["kv"])),
            ("conv states", *per_row(cache["conv"])),
            ("SSM states (float32)", *per_row(cache["ssm"])),
            ("total", *per_row(cache["rows"])),
        ],
    )
    print(f"  and once, whatever the number of rows, the meta tokens: {mb(cache['meta'])} MB")
    _table(
        ("Keys and values in comparison, MB", *rows),
        [
            ("with the meta tokens in every row", *per_row(cache["kv_if_meta_were_stored_per_sequence"])),
            ("Llama-3.2-3B" + f" ({dtype})" * (kv != dtype), *per_row(facts["llama_3_2_3b_kv_bytes"])),
        ],
    )
    ours, all_of_it = facts["kv_ratio"], facts["rows_ratio"]
    times = lambda ratio: f"{ratio:,.2f}" if ratio < 1000 else f"{ratio:,.0f}"  # noqa: E731
    ours = "" if ours is None else f" {times(ours)} times as large as ours,"
    print(f"  Llama-3.2-3B's are{ours} {times(all_of_it)} times all of a row")
    if kv != dtype:
        print(f"  (theirs in {dtype}, ours in {kv})")


def _outline(c: HymbaConfig) -> list[tuple[str, str]]:
    attending = [plan for plan in c.layers if plan.attends]
    full = sum(plan.window is None for plan in attending)
    stores = sum(plan.produces_kv for plan in attending)
    meta = f" and the {c.n_meta} meta tokens" if c.n_meta else ""
    local = f", else {c.window} tokens back{meta}" if full < len(attending) else ""
    mixers = "" if c.mixers == ("hybrid",) else f": {', '.join(c.mixers)}" + ", ..." * (len(c.mixers) < c.n_layers)
    lines = [("layers", f"{c.n_layers} of width {c.d_model}{mixers}{'' if c.d_ff else ', without MLP'}")]
    if attending:
        lines += [
            ("heads", f"{c.n_heads} for queries, {c.n_kv_heads} for keys and values, of size {c.d_key}"),
            ("attention", f"full in {full} layers{local}"),
            ("sharing", f"{stores} of {len(attending)} layers store keys and values, the others read theirs"),
        ]
    if "mamba2" in c.mixers:
        lines.append(("Mamba-2", f"{c.n_ssm_heads} heads of width {c.d_ssm_head}, state {c.d_state}"))
    elif any(plan.recurs for plan in c.layers):
        lines.append(("Mamba", f"width {c.d_inner}, state {c.d_state}"))
    if "hybrid" in c.mixers:
        lines.append(("fusion", f"{c.fusion} of the normed branches"))
    return [*lines, ("context", f"{c.max_length} tokens, RoPE {c.rope}"), ("vocabulary", f"{c.vocab_size}")]


def _table(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> None:
    print("\n" + bold(f"{header[0]:<44}" + "".join(f"{title:>16}" for title in header[1:])))
    for name, *values in lines:
        line = f"  {name:<42}" + "".join(f"{value:>16}" for value in values)
        print(bold(line) if name == "total" else line)
