"""`hymba prepare`"""

import json
from pathlib import Path
from typing import Any

import click

from hymba.cli.options import field_options
from hymba.cli.terminal import job
from hymba.train.prepare import Settings
from hymba.train.prepare import prepare as work


@click.command(
    epilog="""\b
    Examples:
      hymba prepare novels/ --validation novels/persuasion.txt --train-tokenizer 2048 -o data
      hymba prepare corpus.jsonl.gz --field content --tokenizer checkpoint --validation-fraction 0.001 -o data
      hymba prepare hf:roneneldan/TinyStories --validation hf:roneneldan/TinyStories::validation \\
          --train-tokenizer 8192 -o stories"""
)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder that is made.")
@field_options(Settings, without=("inputs", "output"))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def prepare(as_json: bool, **options: Any) -> None:
    """Turn text into a folder of token shards to train on.

    An INPUT is a file, a folder, a glob, a dataset of the Hugging Face hub as hf:NAME[:CONFIG[:SPLIT]] or one saved to
    disk, or - for stdin. Files are JSONL (.jsonl, .ndjson), Parquet (.parquet), or else text, also with .gz behind it.
    A text file is one document, unless --split-on says what stands between documents; a line of JSONL is one, and a
    row of a table.

    All inputs go into one mixture, in their order. To mix sources by weight, prepare each into a folder of its own with
    the same --tokenizer, and give the weights in the training config.

    A run that was stopped goes on when the same command is given again, unless it reads stdin.
    """
    if options["split_on"]:  # a shell passes \n on as two characters
        options["split_on"] = options["split_on"].replace("\\n", "\n").replace("\\t", "\t")
    settings = Settings(**options)
    manifest = work(settings, job)
    print(json.dumps(manifest, ensure_ascii=False) if as_json else describe(settings.output, manifest))


def describe(folder: Path, manifest: dict[str, Any]) -> str:
    """A few lines on a prepared folder."""
    vocabulary = manifest["tokenizer"]["vocab_size"]
    lines = [f"{folder}: vocabulary of {vocabulary:,} tokens, {manifest['dtype']}"]
    for name, split in manifest["splits"].items():
        lines.append(
            f"  {name:10} {split['tokens']:15,} tokens  {split['documents']:11,} documents  "
            f"{split['bytes']:15,} bytes  {split['bytes'] / split['tokens']:.2f} bytes a token  "
            f"{len(split['shards'])} shard{'s' * (len(split['shards']) > 1)}"
        )
    return "\n".join(lines)
