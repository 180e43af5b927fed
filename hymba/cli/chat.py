"""`hymba chat`"""

import contextlib
import sys
from typing import Any

import click

from hymba.cli.options import field_options, model_options
from hymba.engine.sampling import SamplingParams
from hymba.errors import UserError

HELP = """/reset         begin a new conversation
/save FILE     save the conversation, and what the model remembers of it
/load FILE     go on with a saved conversation
/help          this list
/quit          leave (or Ctrl-D); Ctrl-C stops a reply"""


@click.command(epilog="Example:  hymba chat -m checkpoint --system 'Answer in one sentence.' --temperature 0.7")
@model_options
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation begins.")
@field_options(SamplingParams, max_tokens=512)
def chat(system: str | None, **options: Any) -> None:
    """Talk to a model in the terminal. Between turns it keeps what it has read, so a long talk stays fast.

    \b
    /reset         begin a new conversation
    /save FILE     save the conversation, and what the model remembers of it
    /load FILE     go on with a saved conversation
    /help          this list
    /quit          leave (or Ctrl-D); Ctrl-C stops a reply
    """
    params = SamplingParams(**{name: options.pop(name) for name in SamplingParams.__dataclass_fields__})
    if params.n != 1:
        raise UserError(f"n={params.n}: a conversation has one reply at a time")
    from hymba.engine.chat import Chat
    from hymba.engine.llm import LLM

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    llm = LLM(options.pop("model"), max_batch=1, **options)
    session = Chat(llm, params, system)
    interactive = sys.stdin.isatty()
    if interactive:
        click.secho("Say something; /help lists the commands.", dim=True)
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError(f"stdin is not UTF-8 (byte {error.start}); convert it, e.g. with iconv") from None
        except KeyboardInterrupt:  # as in a shell: a fresh line
            print()
            continue
        try:
            if line.strip() == "/quit":
                return
            if line.startswith("/"):
                click.secho(_command(session, line), dim=True)
            elif line.strip():
                _reply(session, line)
        except UserError as error:  # a conversation is not lost by a slip
            click.echo(f"hymba: {error}", err=True)
            if not interactive:
                raise


def _command(session, line: str) -> str:
    """Run a slash command -> what to tell the user."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name == "/help":
        return HELP
    if name == "/reset":
        session.reset()
        return "A new conversation."
    if name in ("/save", "/load") and not argument:
        raise UserError(f"{name} needs a file name")
    if name == "/save":
        try:
            session.save(argument)
        except OSError as error:
            raise UserError(f"{argument}: {error.strerror}") from None
        return f"Saved {len(session.messages)} messages to {argument}."
    if name == "/load":
        session.load(argument)
        return f"Loaded {len(session.messages)} messages from {argument}."
    raise UserError(f"unknown command {name}; /help lists the commands")


def _reply(session, text: str) -> None:
    reply = session.send(text)
    try:
        for piece in reply:
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print()
        click.secho("(stopped)", dim=True)
    finally:
        reply.close()
