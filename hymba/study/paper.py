"""What the paper measured: Dong et al., arXiv 2411.13676. Their data, their recipe, NVIDIA A100."""

from typing import NamedTuple


class Row(NamedTuple):
    """A row of table 1: models of 300M parameters, trained on 100B tokens with one recipe."""

    number: int
    configuration: str
    ratio: str  # parameters of attention heads : parameters of Mamba heads
    general: float  # commonsense reasoning, mean accuracy in percent
    recall: float  # recall-intensive tasks, mean accuracy in percent
    tokens_per_second: float
    cache_mb: float


TABLE_1 = {
    row.number: row
    for row in (
        Row(1, "Mamba heads only", "0:1", 42.98, 19.23, 4720.8, 1.87),
        Row(2, "Mamba + 4 attention heads", "1:8.48", 44.20, 44.65, 3278.1, 99.09),
        Row(3, "Mamba + 8 attention heads", "1:4.24", 44.95, 52.53, 1816.5, 197.39),
        Row(4, "Mamba + 16 attention heads", "1:2.12", 45.08, 56.46, 656.6, 394.00),
        Row(5, "4 + GQA", "1:3.64", 45.19, 49.90, 876.7, 148.24),
        Row(6, "attention heads only (Llama)", "1:0", 44.08, 39.98, 721.1, 414.72),
        Row(7, "5 + all layers sliding window", "1:3.64", 44.42, 29.78, 4485.1, 5.51),
        Row(8, "5 + sliding window + 3 full layers", "1:3.64", 44.56, 48.79, 2399.7, 41.19),
        Row(9, "8 + cross-layer KV sharing", "1:5.23", 45.16, 48.04, 2756.5, 39.42),
        Row(10, "6 + the same KV compression", "1:0", 43.60, 28.18, 3710.0, 28.98),
        Row(11, "9, fusing by concatenation instead of mean", "1:5.82", 44.56, 48.94, 1413.9, 39.42),
        Row(12, "1 + meta tokens", "0:1", 44.01, 19.34, 4712.8, 1.87),
        Row(13, "9 + meta tokens (= Hymba)", "1:5.23", 45.53, 51.79, 2695.8, 40.01),
    )
}
