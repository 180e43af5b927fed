"""`hymba generate`"""

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from hymba.cli.options import field_options, model_options
from hymba.cli.terminal import dim, job, printable, waiting
from hymba.engine.sampling import SamplingParams
from hymba.errors import UserError


@click.command(
    epilog="""\b
    Examples:
      hymba generate "It is a truth" "Emma was" --max-tokens 64
      hymba generate -m checkpoint --file prompts.txt --lines --json > completions.jsonl"""
)
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@model_options
@click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    type=click.Path(),
    help="Read a prompt from a file; - is stdin. May be given several times.",
)
@click.option("--lines", is_flag=True, help="Each line of the files or of stdin is a prompt.")
@click.option("--max-batch", default=8, show_default=True, type=click.IntRange(1), help="Prompts at the same time.")
@click.option("--stream", is_flag=True, help="Show the text while it is made.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print a JSON object a completion, or with --stream a piece, on a line of its own.",
)
@field_options(SamplingParams)
def generate(
    prompts: tuple[str, ...], files: tuple[str, ...], lines: bool, stream: bool, as_json: bool, **options: Any
) -> None:
    """Continue texts: the PROMPTs, those in files, or what comes on stdin.

    Many prompts are worked on together, and each gets the same text as it would get alone.
    """
    if options["logprobs"] is not None and (stream or not as_json):
        raise UserError("--logprobs are shown by --json without --stream only")
    params = SamplingParams(**{name: options.pop(name) for name in SamplingParams.__dataclass_fields__})
    sources = files or (() if prompts else ("-",))
    if lines and not sources:
        raise UserError("--lines is about files and stdin, but the prompts are arguments")
    texts = [*prompts, *read_prompts(sources, lines)]
    options["max_batch"] = min(options["max_batch"], len(texts) * params.n)
    with waiting("loading"):
        from hymba.engine.llm import LLM  # after the arguments are known to be good: PyTorch takes its time

        llm = LLM(options.pop("model"), **options)
    if stream and as_json:
        for chunk in llm.stream(texts, params):
            print(json.dumps(asdict(chunk), ensure_ascii=False), flush=True)
    elif stream and len(texts) * params.n == 1:
        print(printable(texts[0]), end="", flush=True)
        for chunk in llm.stream(texts, params):
            print(printable(chunk.text), end="", flush=True)
        print()
    elif stream:
        _stream_many(llm, texts, params)
    else:
        _complete(llm, texts, params, as_json)


def read_prompts(files: Iterable[str], lines: bool) -> list[str]:
    """Prompts from files, `-` being stdin: a file is one prompt, or with `lines` every line that is not blank."""
    texts = []
    for name in files:
        if name == "-" and (sys.stdin is None or sys.stdin.isatty()):
            raise UserError("there is no prompt; give one as an argument, with --file, or on stdin")
        where = "stdin" if name == "-" else name
        try:
            data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
            text = data.decode("utf-8-sig")  # some editors put a byte order mark in front
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv") from None
        except OSError as error:
            raise UserError(f"{where} cannot be read: {error.strerror}") from None
        found = [line for line in re.split("\r?\n", text) if line.strip()] if lines else [text.removesuffix("\n")]
        if not any(found):
            raise UserError(f"{where} is empty; a prompt needs at least one character")
        texts += found
    return texts


def _complete(llm, texts: list[str], params: SamplingParams, as_json: bool) -> None:
    """Generate behind a progress bar; a prompt's completions are printed when they and all before them are whole."""
    requests = llm.submit(texts, params)
    sequences = [s for request in requests for s in request]
    printed = 0
    with job("generating", len(sequences) * params.max_tokens, "tokens") as bar:
        for advanced in llm.run(sequences):
            # one that ends early counts as if it had gone on
            bar.advance(sum(1 + s.finished * (params.max_tokens - len(s.token_ids)) for s in advanced))
            while printed < len(requests) and all(s.finished for s in requests[printed]):
                for j, s in enumerate(requests[printed]):
                    if as_json:
                        bar.print(_json(texts[printed], s, printed, j))
                        continue
                    if len(sequences) > 1:
                        bar.print(dim(f"--- prompt {printed + 1}" + (f", completion {j + 1}" if params.n > 1 else "")))
                    bar.print(printable(texts[printed] + s.text))
                printed += 1


def _json(prompt: str, s, prompt_index: int, completion_index: int) -> str:
    record = {"prompt_index": prompt_index, "completion_index": completion_index, "prompt": prompt, "text": s.text}
    record |= {"token_ids": s.token_ids, "finish_reason": s.finish_reason}
    if s.params.logprobs is not None:
        record["logprobs"] = [vars(entry) for entry in s.logprobs]
    return json.dumps(record, ensure_ascii=False)


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
            print(f"[{label}] {printable(line)}", flush=True)
        open_lines[owner] = rest
