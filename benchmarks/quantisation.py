"""What weights of 8 and 4 bits, and keys and values of 8, cost in quality: KL divergence of the predictions, and
perplexity, on a text.

python benchmarks/quantisation.py hymba-austen data/austen/persuasion.txt
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from hymba import Hymba, Tokenizer
from hymba.convert import resolve
from hymba.evals import score_text, windows
from hymba.model.cache import KINDS
from hymba.model.hymba import IGNORED_LABEL
from hymba.model.quant import NAMES, quantize_

LENGTH = 512
KL_ROWS = 32
PIECE = 128  # tokens that are read at a time by way of a cache


@torch.no_grad()
def log_probabilities(model: Hymba, inputs: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """inputs, counted: (rows, LENGTH) -> (tokens, V) of the counted tokens"""
    return F.log_softmax(model.lm_head(model.hidden(inputs)[counted]).float(), dim=-1)


def read_by_cache(model: Hymba, kind: str) -> None:
    """From now on rows are read piece by piece, with a cache of this kind."""
    hidden = model.hidden

    def through_cache(inputs: torch.Tensor) -> torch.Tensor:
        cache = model.new_cache(*inputs.shape, kind)
        return torch.cat([hidden(piece, cache=cache) for piece in inputs.split(PIECE, dim=1)], dim=1)

    model.hidden = through_cache


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_pretrained(resolve(arguments.model))
    ids = torch.tensor(tokenizer.encode(text))
    inputs, targets = (x[:: max(1, len(x) // KL_ROWS)] for x in windows(ids, LENGTH, LENGTH))
    counted = targets != IGNORED_LABEL
    rows, expected = {}, None
    precisions = ("float32", "bfloat16", *NAMES)
    for precision, kind in itertools.product(precisions, KINDS):
        model = Hymba.from_pretrained(arguments.model, dtype="float32" if precision == "float32" else "bfloat16")
        if precision in NAMES:
            quantize_(model, precision)
        if kind is not None:
            read_by_cache(model, kind)
        score = score_text(model, tokenizer, text, length=LENGTH)
        found = log_probabilities(model, inputs, counted)
        expected = found if expected is None else expected
        kl = float(F.kl_div(found, expected, log_target=True, reduction="batchmean"))
        name = precision + (f", {kind} cache" if kind else "")
        rows[name] = {"perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte, "kl_nats": kl}
    base = rows["bfloat16"]["perplexity"]
    print(f"{'':<22}{'perplexity':>12}{'vs bfloat16':>13}{'bits/byte':>11}{'KL to float32':>15}")
    for name, row in rows.items():
        change = row["perplexity"] / base - 1
        print(
            f"{name:<22}{row['perplexity']:>12.4f}{change:>+13.3%}{row['bits_per_byte']:>11.4f}{row['kl_nats']:>15.2e}"
        )
    print(json.dumps({name: {k: float(f"{v:.6g}") for k, v in row.items()} for name, row in rows.items()}))


if __name__ == "__main__":
    main()
