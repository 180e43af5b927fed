"""Options that several verbs share, and options made from the fields of a dataclass."""

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from types import UnionType
from typing import Any, get_args, get_origin

import click

from hymba.shipped import SHIPPED_MODEL


def model_options(command: Callable) -> Callable:
    """Which model, where and in what precision."""
    dtypes = click.Choice(["auto", "float32", "bfloat16", "float16"])
    cache_help = "Keys and values of 8 bits: half the memory; on a GPU slower."
    context_help = "Tokens of prompt and completion together.  [default: the model's context]"
    for option in reversed(
        [
            click.option(
                "-m",
                "--model",
                default=SHIPPED_MODEL,
                show_default=True,
                metavar="PATH",
                help="Checkpoint folder or hub id.",
            ),
            click.option("--device", default="auto", show_default=True, help="cpu, cuda, ...; auto: the GPU if any."),
            click.option("--dtype", default="auto", show_default=True, type=dtypes, help="auto: the checkpoint's."),
            click.option("--quantize", type=click.Choice(["int8", "int4"]), help="Weights of 8 or 4 bits."),
            click.option("--cache", type=click.Choice(["int8"]), help=cache_help),
            click.option("--max-length", type=click.IntRange(1), help=context_help),
        ]
    ):
        command = option(command)
    return command


def field_options(cls: type, *, without: tuple[str, ...] = (), **defaults: Any) -> Callable[[Callable], Callable]:
    """An option for every field of a dataclass; its help is the comment behind the field.

    without: fields that get none; defaults: where the command line's default is another than the field's
    """
    comments = field_comments(cls)

    def decorate(command: Callable) -> Callable:
        for field in reversed([field for field in fields(cls) if field.name not in without]):
            command = _option(field, comments[field.name], defaults)(command)
        return command

    return decorate


def _option(field: Field, comment: str, defaults: dict[str, Any]) -> Callable:
    kind = field.type
    if isinstance(kind, UnionType):
        kind = next(choice for choice in get_args(kind) if choice is not type(None))
    default = defaults.get(field.name, None if field.default is MISSING else field.default)
    settings: dict[str, Any] = {"default": default, "show_default": default is not None, "help": comment}
    if kind is bool:
        settings["is_flag"] = True
    elif get_origin(kind) is tuple:
        help_text = f"{comment} May be given several times."
        settings |= {"type": get_args(kind)[0], "multiple": True, "show_default": False, "help": help_text}
    else:
        settings["type"] = kind
    return click.option(f"--{field.name.replace('_', '-')}", field.name, **settings)


def field_comments(cls: type) -> dict[str, str]:
    """The comment behind each field in the class's source."""
    comments = {}
    for line in inspect.getsource(cls).splitlines():
        if match := re.match(r"\s+(\w+): [^#]*(?:#\s*(.*))?$", line):
            comment = match[2] or ""
            comments.setdefault(match[1], comment[:1].upper() + comment[1:] + ("." if comment else ""))
    return comments
