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
    "info": "Show what a model is made of and what its cache costs.",
    "convert": "Save a checkpoint in another dtype or split into other files.",
    "doctor": "Show what this machine offers and which fast paths are on.",
}


class Verbs(click.Group):
    """Loads a verb's module when it is called, so that `hymba --help` does not wait for PyTorch."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return getattr(import_module(f"hymba.cli.{name}"), name) if name in VERBS else None

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="hymba %(version)s")
def cli() -> None:
    """Hybrid-head language models: attention heads and Mamba heads side by side in every layer.

    `hymba VERB --help` explains a verb and shows an example.
    """


def main() -> None:
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command -> exit status."""
    try:
        status = cli.main(arguments, prog_name="hymba", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except (click.ClickException, UserError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        return _fail(" ".join(message.split()), 2)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone: nothing is left to be said, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # disk full, no permission: the machine's word, one line
        return _fail(f"{error.filename + ': ' if error.filename else ''}{error.strerror or error}", 2)
    except Exception as error:
        if os.environ.get("HYMBA_TRACEBACK"):
            raise
        first = (str(error).splitlines() or [""])[0]
        return _fail(f"internal error, {type(error).__name__}: {first} (HYMBA_TRACEBACK=1 shows where)", 1)


def _fail(message: str, status: int) -> int:
    print(f"hymba: {message}", file=sys.stderr)
    return status
