"""Bits per byte of `persuasion.txt` for compressors that have seen Austen's other five novels.

What an archive of the five novels grows by when Persuasion is added, over the bytes of Persuasion: what a language
model must beat. `pip install pyppmd`, then

    python benchmarks/compressors.py
"""

import json
import lzma
from pathlib import Path

import pyppmd

TEXTS = Path(__file__).resolve().parents[1] / "data" / "austen"
PPMD_ORDER, PPMD_MEMORY = 10, 1 << 30


def xz(data: bytes) -> int:
    """Bytes of `xz -9e`, less its container of a few dozen bytes."""
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def ppmd(data: bytes) -> int:
    """Bytes of 7-Zip's PPMd (variant H)."""
    encoder = pyppmd.Ppmd7Encoder(PPMD_ORDER, PPMD_MEMORY)
    return len(encoder.encode(data)) + len(encoder.flush())


def main() -> None:
    novels = sorted(path for path in TEXTS.glob("*.txt") if path.stem != "persuasion")
    seen = b"".join(path.read_bytes() for path in novels)
    new = (TEXTS / "persuasion.txt").read_bytes()
    growth = {
        name: size(seen + new) - size(seen) for name, size in (("xz -9e", xz), (f"PPMd, order {PPMD_ORDER}", ppmd))
    }
    print(json.dumps({name: round(8 * n / len(new), 4) for name, n in growth.items()}))


if __name__ == "__main__":
    main()
