"""`hymba convert`"""

import re
from pathlib import Path

import click

from hymba.cli.terminal import waiting
from hymba.errors import UserError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@click.command(epilog="\b\nExample:\n  hymba convert checkpoint checkpoint-fp32 --dtype float32 --max-shard 2GB")
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--dtype", default="auto", show_default=True,
              type=click.Choice(["auto", "float32", "bfloat16", "float16"]), help="auto: as it is.")  # fmt: skip
@click.option("--quantize", type=click.Choice(["int8", "int4"]), help="Weights of 8 or 4 bits.")
@click.option("--max-shard", metavar="SIZE", help="Largest weight file, e.g. 500MB.  [default: 5GB]")
def convert(source: str, target: Path, dtype: str, quantize: str | None, max_shard: str | None) -> None:
    """Save the checkpoint SOURCE (a folder or hub id) in the folder TARGET, with its tokenizer.

    Both are in the official layout: official tensor names and config, safetensors, one file or shards with an index.
    Quantised weights keep their names, and have their scales beside them; only this package reads them.
    """
    limit = None if max_shard is None else parse_size(max_shard)
    with waiting("converting"):
        from hymba.convert import load_model, resolve
        from hymba.model.quant import quantize_
        from hymba.tokenizer import Tokenizer

        folder = resolve(source)
        model = load_model(folder, device="cpu", dtype=dtype)
        tokenizer = Tokenizer.from_pretrained(folder) if (folder / "tokenizer.json").exists() else None
        if quantize:
            quantize_(model, quantize)
        model.save_pretrained(target, max_shard_bytes=limit)
        if tokenizer:
            tokenizer.save_pretrained(target)
    files = sorted(target.glob("model*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    print(f"{target}: {size / 10**6:,.1f} MB of weights in {len(files)} file{'s' if len(files) > 1 else ''}")


def parse_size(text: str) -> int:
    """`500MB` -> 500000000"""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB)?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2] or "B"]) if match else 0
    if size < 1:
        raise UserError(f"--max-shard {text!r} is no size; write it like 500MB or 2GB")
    return size
