"""What `hymba bench` runs: the check, the workloads in turn, and one row of numbers for each."""

import itertools
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from hymba import __version__
from hymba.bench import limits, workloads
from hymba.config import PRESETS, HymbaConfig
from hymba.convert import DTYPES, load_config, resolve
from hymba.model.hymba import Hymba

# tokens that a decoding workload makes in one run; prompt tokens that a prefill reads at a time
STEPS, CHUNK = 4, 512
# a training batch, for the two sizes that fit an everyday machine
TRAIN_TOKENS = 1024


@dataclass(frozen=True)
class Row:
    """One workload's medians."""

    name: str
    tokens_per_second: float
    ms_per_token: float
    fastest_ms: float
    slowest_ms: float
    mb_per_token: float
    gop_per_token: float
    share_of_limit: float | None  # None: what it must cost at least is not known
    read_gb_per_second: float  # the machine's, while this ran
    peak_gop_per_second: float


def shape(model: str) -> HymbaConfig:
    """The architecture of a preset, or of a checkpoint, whose weights are not read."""
    if model in PRESETS:
        return HymbaConfig.preset(model)
    return load_config(resolve(model))[0]


def decode_workloads(
    model: Hymba, precision: str, batches: tuple[int, ...], contexts: tuple[int, ...], kinds: Sequence[str | None]
) -> Iterator[tuple[str, workloads.Workload]]:
    for context, batch, kind in itertools.product(contexts, batches, kinds):
        name = f"decode {precision}, batch {batch}, context {context}{_cache(kind)}"
        yield name, workloads.decoding(model, precision, batch, context, STEPS, kind)


def prefill_workloads(
    model: Hymba, precision: str, contexts: tuple[int, ...], kinds: Sequence[str | None]
) -> Iterator[tuple[str, workloads.Workload]]:
    for length in contexts:
        for kind in kinds:
            name = f"prefill {precision}, {length} tokens{_cache(kind)}"
            yield name, workloads.prefill(model, precision, length, CHUNK, kind)
        if scans := workloads.scans(model, length, CHUNK):
            yield f"  its selective scans, {length} tokens", scans


def _cache(kind: str | None) -> str:
    return f", {kind} cache" if kind else ""


def train_workloads(config: HymbaConfig, precision: str) -> Iterator[tuple[str, workloads.Workload]]:
    work = workloads.training(config, 1, min(TRAIN_TOKENS, config.max_length), DTYPES[precision])
    yield f"training step {precision}, {work.tokens} tokens", work


def measure(
    works: dict[str, workloads.Workload], repeats: int, advance: Callable[[], object] = lambda: None
) -> list[Row]:
    """Run workloads in turn -> a row for each."""
    rows = []
    for name, measured in limits.interleaved(works, repeats, advance).items():
        work, n = works[name], works[name].tokens
        known = bool(work.bytes_read or work.operations)
        rows.append(
            Row(
                name=name,
                tokens_per_second=n / measured.seconds,
                ms_per_token=1e3 * measured.seconds / n,
                fastest_ms=1e3 * measured.spread[0] / n,
                slowest_ms=1e3 * measured.spread[1] / n,
                mb_per_token=work.bytes_read / n / 1e6,
                gop_per_token=work.operations / n / 1e9,
                share_of_limit=measured.share_of_roofline(work.bytes_read, work.operations) if known else None,
                read_gb_per_second=measured.median("bandwidth") / 1e9,
                peak_gop_per_second=measured.median("peak") / 1e9,
            )
        )
    return rows


def machine() -> dict[str, object]:
    """What a number must be read with."""
    return {
        "hymba": __version__,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "kernels": limits.library.status(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(": ", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def as_json(rows: list[Row]) -> list[dict[str, object]]:
    return [{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows]
