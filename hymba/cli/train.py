"""`hymba train`"""

import os
import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import click

from hymba.cli.options import field_comments
from hymba.config import HymbaConfig
from hymba.errors import UserError


class _Keys(click.Command):
    """Lists every key of the config after the options."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(context, formatter)
        from hymba.train.config import TrainConfig

        for title, rows in _keys(TrainConfig, ""):
            with formatter.section(title):
                formatter.write_dl(rows)


@click.command(
    cls=_Keys,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog="""\b
    Examples:
      hymba train austen.toml
      hymba train austen.toml --out runs/b --optimizer.lr 3e-4 --stages.0.tokens 2e6
      torchrun --nproc-per-node 8 -m hymba train big.toml --run.parallel fsdp""",
)
@click.argument("config", metavar="CONFIG.toml", type=click.Path())
@click.option("-o", "--out", type=click.Path(), help="The run folder.  [default: CONFIG without .toml]")
@click.pass_context
def train(context: click.Context, config: str, out: str | None) -> None:
    """Train a model on prepared text, or go on with a run that was interrupted: the same command does both.

    Every key of the config may be given as `--key value` too, which wins over the file. The run folder gets the config
    as resolved, log.jsonl, checkpoints, and at the end final/: a checkpoint that every other verb reads, with its
    tokenizer and model card. Ctrl-C and SIGTERM save before they end it.
    """
    from hymba.train import config as config_file

    parsed = config_file.load(config, _pairs(context.args))
    if out is None and Path(config).suffix != ".toml":
        raise UserError(f"{config} does not end in .toml; name the run folder with --out")
    from hymba.train.trainer import train as run  # after the config is known to be good

    result = run(parsed, out or Path(config).with_suffix(""))
    if result.stopped_by and not result.finished:
        if int(os.environ.get("RANK", 0)) == 0:
            click.echo(
                f"stopped by {result.stopped_by} after step {result.step} of {result.steps}, all is saved; "
                "the same command goes on from there",
                err=True,
            )
        context.exit({"SIGINT": 130}.get(result.stopped_by, 143))


def _pairs(arguments: list[str]) -> list[tuple[str, str]]:
    """--key value and --key=value -> (key, value)"""
    pairs, rest = [], list(arguments)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not re.fullmatch(r"--[a-z][\w.]*", key):
            raise UserError(f"unexpected argument {key!r}; settings are --key value, see `hymba train --help`")
        if not equals:
            if not rest:
                raise UserError(f"{key} needs a value")
            value = rest.pop(0)
        pairs.append((key[2:], value))
    return pairs


def _keys(cls: type, prefix: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """(title, [(key, help)]) of a config and its sections."""
    rows, sections = [], []
    comments = field_comments(cls)
    for field in fields(cls):
        kind, name = field.type, prefix + field.name
        if get_origin(kind) is tuple and is_dataclass(get_args(kind)[0]) and not prefix:
            sections += _keys(get_args(kind)[0], f"{field.name}.N.")
        elif kind is HymbaConfig:
            names = ", ".join(f.name for f in fields(HymbaConfig))
            about = "Preset of the paper's family, or tiny, mini; see `hymba info`."
            start = "Checkpoint whose weights training starts from."
            rows = [("--model.preset", about), ("--model.from", start), ("--model.FIELD", f"{names}.")]
            sections.append(("Model", rows))
            rows = []
        elif is_dataclass(kind):
            sections += _keys(kind, f"{field.name}.")
        elif field.name != "checkpoint":
            rows.append((f"--{name} {_kind(kind)}", comments[field.name] + _default(field)))
    title = (prefix.rstrip(".").partition(".")[0] or "settings").capitalize()
    return [(title, rows), *sections] if prefix else [*sections[:1], (title, rows), *sections[1:]]


def _kind(kind: Any) -> str:
    if isinstance(kind, UnionType):
        kind = next(choice for choice in get_args(kind) if choice is not type(None))
    if get_origin(kind) is tuple:
        return "LIST"
    return {int: "INT", float: "FLOAT", bool: "BOOL", str: "TEXT"}[kind]


def _default(field: Any) -> str:
    if field.default is MISSING or field.default is None or field.default in ("", ()):
        return ""
    default = str(field.default).lower() if isinstance(field.default, bool) else field.default
    return f"  [default: {default}]"
