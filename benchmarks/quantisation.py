"""What weights of 8 and 4 bits cost in quality: KL divergence of the predictions, and perplexity, on a text.

python benchmarks/quantisation.py hymba-austen data/austen/persuasion.txt
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from hymba import Hymba, Tokenizer
from hymba.convert import resolve
from hymba.evals import score_text, windows
from hymba.model.hymba import IGNORED_LABEL
from hymba.model.quant import NAMES, quantize_

LENGTH = 512
KL_ROWS = 32


@torch.no_grad()
def log_probabilities(model: Hymba, inputs: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """inputs, counted: (rows, LENGTH) -> (tokens, V) of the counted tokens"""
    return F.log_softmax(model.lm_head(model.hidden(inputs)[counted]).float(), dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_pretrained(resolve(arguments.model))
    ids = torch.tensor(tokenizer.encode(text))
    inputs, targets = (x[:: max(1, len(x) // KL_ROWS)] for x in windows(ids, LENGTH, LENGTH))
    counted = targets != IGNORED_LABEL
    rows, expected = {}, None
    for precision in ("float32", "bfloat16", *NAMES):
        model = Hymba.from_pretrained(arguments.model, dtype="float32" if precision == "float32" else "bfloat16")
        if precision in NAMES:
            quantize_(model, precision)
        score = score_text(model, tokenizer, text, length=LENGTH)
        found = log_probabilities(model, inputs, counted)
        expected = found if expected is None else expected
        kl = float(F.kl_div(found, expected, log_target=True, reduction="batchmean"))
        rows[precision] = {"perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte, "kl_nats": kl}
    base = rows["bfloat16"]["perplexity"]
    print(f"{'':<10}{'perplexity':>12}{'vs bfloat16':>13}{'bits/byte':>11}{'KL to float32':>15}")
    for name, row in rows.items():
        change = row["perplexity"] / base - 1
        print(
            f"{name:<10}{row['perplexity']:>12.4f}{change:>+13.3%}{row['bits_per_byte']:>11.4f}{row['kl_nats']:>15.2e}"
        )
    print(json.dumps({name: {k: float(f"{v:.6g}") for k, v in row.items()} for name, row in rows.items()}))


if __name__ == "__main__":
    main()
