"""`hymba generate`"""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from hymba.cli.options import field_options, model_options
from hymba.engine.sampling import SamplingParams
from hymba.errors import UserError


@click.command(
    epilog='Example:  hymba generate -m checkpoint "It is a truth" "Emma was" --max-tokens 64 --temperature 0'
)
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@model_options
@click.option("-f", "--file", "files", multiple=True, type=click.Path(), help="Read a prompt from a file; - is stdin.")
@click.option("--lines", is_flag=True, help="Every line of a file or of stdin is a prompt of its own.")
@click.option("--max-batch", default=8, show_default=True, type=click.IntRange(1), help="Prompts at the same time.")
@click.option("--stream", is_flag=True, help="Show the text while it is made.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a completion, in the order of the prompts.")
@field_options(SamplingParams)
def generate(
    prompts: tuple[str, ...], files: tuple[str, ...], lines: bool, stream: bool, as_json: bool, **options: Any
) -> None:
    """Continue texts: the PROMPTs, those in files, or what comes on stdin.

    Many prompts are worked on together, and each gets the same text as it would get alone.
    """
    texts = [*prompts, *read_prompts(files or (() if prompts else ("-",)), lines)]
    if not texts:
        raise UserError("there is no prompt; give one as an argument, with --file, or on stdin")
    params = SamplingParams(**{name: options.pop(name) for name in SamplingParams.__dataclass_fields__})
    from hymba.engine.llm import LLM  # after the arguments are known to be good: PyTorch takes its time

    llm = LLM(options.pop("model"), **options)
    if stream and as_json:
        for chunk in llm.stream(texts, params):
            print(json.dumps(asdict(chunk), ensure_ascii=False), flush=True)
    elif stream and len(texts) * params.n == 1:
        print(texts[0], end="", flush=True)
        for chunk in llm.stream(texts, params):
            print(chunk.text, end="", flush=True)
        print()
    elif stream:
        _stream_many(llm, texts, params)
    else:
        _show(texts, _with_progress(llm, texts, params), as_json)


def read_prompts(files: Iterable[str], lines: bool) -> list[str]:
    """Prompts from files, `-` being stdin: a file is one prompt, or with `lines` every line that is not blank."""
    texts = []
    for name in files:
        if name == "-" and sys.stdin.isatty():
            raise UserError("there is no prompt; give one as an argument, with --file, or on stdin")
        where = "stdin" if name == "-" else name
        try:
            text = (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv") from None
        except OSError as error:
            raise UserError(f"{where}: {error.strerror}") from None
        if lines:
            texts += [line for line in text.splitlines() if line.strip()]
        else:
            texts.append(text.removesuffix("\n"))
            if not texts[-1]:
                raise UserError(f"{where} is empty; a prompt needs at least one character")
    return texts


def _with_progress(llm, texts: list[str], params: SamplingParams) -> list[list]:
    """Generate behind a progress bar on a terminal -> the sequences of every prompt."""
    from rich.console import Console
    from rich.progress import track

    requests = llm.submit(texts, params)
    sequences = [s for request in requests for s in request]

    def done() -> Iterable[None]:
        finished = 0
        while finished < len(sequences):
            llm.engine.step()
            now = sum(s.finished for s in sequences)
            yield from [None] * (now - finished)
            finished = now

    console = Console(stderr=True)
    bar = console.is_terminal and len(sequences) > 1
    for _ in track(done(), "generating", total=len(sequences), console=console, transient=True, disable=not bar):
        pass
    return requests


def _show(texts: list[str], requests: list[list], as_json: bool) -> None:
    for i, (text, request) in enumerate(zip(texts, requests, strict=True)):
        for j, s in enumerate(request):
            if as_json:
                record = {"prompt": text, "text": s.text, "token_ids": s.token_ids, "finish_reason": s.finish_reason}
                if s.params.logprobs is not None:
                    record["logprobs"] = [vars(entry) for entry in s.logprobs]
                print(json.dumps(record, ensure_ascii=False))
            else:
                if len(texts) * len(request) > 1:
                    click.secho(f"--- prompt {i + 1}" + (f", completion {j + 1}" if len(request) > 1 else ""), dim=True)
                print(text + s.text)


def _stream_many(llm, texts: list[str], params: SamplingParams) -> None:
    """Several completions share a terminal: a line is printed when it is whole, with its owner in front."""
    open_lines: dict[tuple[int, int], str] = {}
    for chunk in llm.stream(texts, params):
        owner = (chunk.prompt_index, chunk.completion_index)
        *whole, rest = (open_lines.get(owner, texts[chunk.prompt_index]) + chunk.text).split("\n")
        if chunk.finish_reason:
            whole.append(rest)
        label = f"{owner[0] + 1}" + (f".{owner[1] + 1}" if params.n > 1 else "")
        for line in whole:
            print(f"[{label}] {line}", flush=True)
        open_lines[owner] = rest
