"""`hymba chat`"""

import contextlib
import sys
from pathlib import Path
from typing import Any

import click

from hymba.cli.options import field_options, model_options
from hymba.cli.terminal import dim, printable, waiting
from hymba.engine.sampling import SamplingParams
from hymba.errors import UserError

HELP = """/reset         begin a new conversation
/save FILE     save the conversation, and what the model remembers of it
/load FILE     go on with a saved conversation
/help          this list
/quit          leave (or Ctrl-D); Ctrl-C stops a reply"""


@click.command(epilog="\b\nExample:\n  hymba chat -m checkpoint --system 'Answer in one sentence.' --temperature 0.7")
@model_options
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation begins.")
@field_options(SamplingParams, without=("n", "logprobs"), max_tokens=512)
def chat(system: str | None, **options: Any) -> None:
    """Talk to a model in the terminal. Between turns it keeps what it has read, so a long talk stays fast.

    \b
    /reset         begin a new conversation
    /save FILE     save the conversation, and what the model remembers of it
    /load FILE     go on with a saved conversation
    /help          this list
    /quit          leave (or Ctrl-D); Ctrl-C stops a reply
    """
    params = SamplingParams(
        **{name: options.pop(name) for name in SamplingParams.__dataclass_fields__ if name in options}
    )
    interactive = sys.stdin is not None and sys.stdin.isatty()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    with waiting("loading"):
        from hymba.engine.chat import Chat
        from hymba.engine.llm import LLM

        session = Chat(LLM(options.pop("model"), max_batch=1, **options), params, system)
    if interactive:
        click.secho("Say something; /help lists the commands.", dim=True)
    while True:
        try:
            line = input("> " if interactive else "")
            if line.strip() == "/quit":
                return
            if line.startswith("/"):
                print(dim(_command(session, line)))
            elif line.strip():
                _reply(session, line)
        except EOFError:
            if interactive:
                print()  # the shell's prompt begins a line
            return
        except KeyboardInterrupt:  # as in a shell: a fresh line
            if not interactive:
                raise
            print()
        except UnicodeDecodeError as error:
            raise UserError(f"stdin is not UTF-8 (byte {error.start}); convert it, e.g. with iconv") from None
        except UserError as error:  # a conversation is not lost by a slip
            if not interactive:
                raise
            print(f"hymba: {error}", file=sys.stderr)


def _command(session, line: str) -> str:
    """Run a slash command -> what to tell the user."""
    name, _, argument = line.strip().partition(" ")
    file = Path(argument.strip()).expanduser()
    if name == "/help":
        return HELP
    if name == "/reset":
        session.reset()
        return "A new conversation."
    if name in ("/save", "/load") and not argument.strip():
        raise UserError(f"{name} needs a file name")
    if name == "/save":
        session.save(file)
        return f"Saved {len(session.messages)} messages to {file}."
    if name == "/load":
        session.load(file)
        return f"Loaded {len(session.messages)} messages from {file}."
    raise UserError(f"unknown command {name}; /help lists the commands")


def _reply(session, text: str) -> None:
    reply = session.send(text)
    try:
        for piece in reply:
            print(printable(piece), end="", flush=True)
        print()
    except KeyboardInterrupt:
        print()
        print(dim("(stopped)"))
    finally:
        reply.close()
    if session.finish_reason == "length":
        print(dim("(cut off by --max-tokens, or by the end of the context)"))
