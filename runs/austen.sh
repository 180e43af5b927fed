#!/usr/bin/env bash
# Trains hymba-austen and the Llama-style model that it is compared with, and scores both on Persuasion.
# Minutes on a GPU; on a CPU leave it running: it can be stopped at any time and goes on where it was.
# What was seen is in hymba/assets/hymba-austen/README.md.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
out=runs/austen

[[ -d $out/data ]] || "$python" -m hymba prepare data/austen/[!p]*.txt data/austen/pride_and_prejudice.txt --validation \
    data/austen/persuasion.txt --train-tokenizer 2048 -o "$out/data"
for name in hymba llama; do
    [[ -d $out/$name/final ]] || "$python" -m hymba train "$out/$name.toml" -o "$out/$name" "$@"
    # half the bytes, for the wheel; the loss changes in the fifth digit
    [[ -d $out/$name/bfloat16 ]] || "$python" -m hymba convert "$out/$name/final" "$out/$name/bfloat16" --dtype bfloat16
    grep '"validation"' "$out/$name/log.jsonl" | tail -n 1
done
"$python" benchmarks/compressors.py  # needs pyppmd
