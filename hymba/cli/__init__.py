"""The command `hymba`: one verb a job.

Exit status: 0 success, 2 a user's mistake (one clear line on stderr), 1 a fault of ours, 130 interrupted.
"""

import os
import sys
from importlib import import_module

import click

from hymba import __version__
from hymba.errors import UserError

VERBS = {
    "generate": "Continue texts.",
    "chat": "Talk to a model in the terminal.",
    "train": "Train a model on prepared text.",
    "info": "Show what a model is made of and what its cache costs.",
    "convert": "Save a checkpoint in another dtype, quantised, or in other files.",
    "prepare": "Turn text into token shards to train on.",
    "study": "Repeat the paper's comparison of architectures.",
    "analyze": "Show what the heads of models do: attention, importance, memory.",
    "bench": "Time decoding, prefill and training against this machine's limits.",
    "doctor": "Show what this machine offers and which fast paths are on.",
}


class Verbs(click.Group):
    """Loads a verb's module when it is called, so that `hymba --help` does not wait for PyTorch."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            raise UserError(f"unknown verb {name!r}; choose from {', '.join(VERBS)}")
        return getattr(import_module(f"hymba.cli.{name}"), name)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=Verbs,
    subcommand_metavar="VERB ...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, message="hymba %(version)s")
def cli() -> None:
    """Hybrid-head language models: attention heads and Mamba heads side by side in every layer.

    `hymba VERB --help` explains a verb and shows an example.
    """


def main() -> None:
    for stream in (sys.stdin, sys.stdout):  # as for files, whatever the locale says
        if stream is not None:
            stream.reconfigure(encoding="utf-8", errors="strict")
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command -> exit status."""
    try:
        return _invoke(arguments or ["--help"])
    except click.UsageError as error:
        verb = error.ctx.command_path if error.ctx else "hymba"
        return _fail(f"{error.format_message()} See `{verb} --help`.", 2)
    except (click.ClickException, UserError) as error:
        return _fail(error.format_message() if isinstance(error, click.ClickException) else str(error), 2)
    except (click.Abort, KeyboardInterrupt):
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the terminal wrote ^C
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone: nothing is left to be said, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as if the signal had ended us
    except OSError as error:  # disk full, no permission: the machine's word, one line
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error), 2)
    except Exception as error:
        if os.environ.get("HYMBA_TRACEBACK"):
            raise
        first = (str(error).splitlines() or [""])[0]
        return _fail(f"internal error, {type(error).__name__}: {first} (HYMBA_TRACEBACK=1 shows where)", 1)


def _invoke(arguments: list[str]) -> int:
    try:
        # not click's main(), which has its own answers to Ctrl-C and to a reader who has gone
        with cli.make_context("hymba", arguments) as context:
            cli.invoke(context)
        status = 0
    except click.exceptions.Exit as done:  # --help, --version
        status = done.exit_code
    if sys.stdout is not None:
        sys.stdout.flush()
    return status


def _fail(message: str, status: int) -> int:
    print(f"hymba: {' '.join(message.split())}", file=sys.stderr)
    return status
