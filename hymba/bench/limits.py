"""What the machine can do at this moment, and timing that means something on a machine whose speed moves.

A shared machine changes its memory bandwidth and its cores' speed within minutes, so a time alone says little. `timed`
probes read bandwidth and arithmetic peak before and after every repetition; results are shares of those limits.
"""

import mmap
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from hymba.errors import UserError
from hymba.ops import library

if TYPE_CHECKING:
    from hymba.bench.workloads import Workload

KINDS = {"float32": 0, "bfloat16": 1, "int8": 2}
READ_BYTES = 256 << 20  # far more than any cache holds
PEAK_ROUNDS = 400_000  # 20 ms or so


@dataclass(frozen=True)
class Sample:
    """One repetition."""

    seconds: float
    bandwidth: float  # bytes a second, mean of the probes before and after
    peak: float  # operations a second, of the kind that was asked for


@dataclass(frozen=True)
class Measurement:
    """Repetitions of one workload; medians are what is reported."""

    samples: tuple[Sample, ...]

    @property
    def seconds(self) -> float:
        return statistics.median(s.seconds for s in self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """Fastest and slowest repetition, seconds."""
        return min(s.seconds for s in self.samples), max(s.seconds for s in self.samples)

    def median(self, field: str) -> float:
        return statistics.median(getattr(s, field) for s in self.samples)

    def share_of_roofline(self, bytes_read: float, operations: float) -> float:
        """Median of (the least time that the limits allow) / (time taken), limits probed around each repetition."""
        return statistics.median(
            max(bytes_read / s.bandwidth, operations / s.peak if operations else 0) / s.seconds for s in self.samples
        )


def require_probes() -> None:
    """Raises `UserError` where the limits cannot be measured."""
    if not library.available():
        raise UserError(f"hymba bench measures against limits that the native library probes: {library.status()}")


@lru_cache(maxsize=1)
def _buffer() -> torch.Tensor:
    memory = mmap.mmap(-1, READ_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux: as weights are laid out
        memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    return buffer.fill_(1)


def read_bandwidth() -> float:
    """Bytes a second that all threads together read from memory."""
    buffer, total = _buffer(), torch.zeros(1, dtype=torch.int64)
    began = time.perf_counter()
    library.call("probe_read", buffer.data_ptr(), READ_BYTES, total.data_ptr(), library.threads())
    return READ_BYTES / (time.perf_counter() - began)


def matrix_peak(kind: str) -> float:
    """Operations a second in registers, two for a multiply-add; float32's where the processor lacks the kind."""
    operations = torch.zeros(1, dtype=torch.float64)
    for number in dict.fromkeys((KINDS[kind], KINDS["float32"])):
        began = time.perf_counter()
        library.call("probe_peak", number, PEAK_ROUNDS, operations.data_ptr(), library.threads())
        seconds = time.perf_counter() - began
        if operations.item():
            return operations.item() / seconds
    raise RuntimeError("float32 multiply-adds were not counted")


def sample(work: Callable[[], object], kind: str = "bfloat16") -> Sample:
    """Run `work` once, with probes before and after it."""
    before = read_bandwidth(), matrix_peak(kind)
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    after = read_bandwidth(), matrix_peak(kind)
    return Sample(seconds, (before[0] + after[0]) / 2, (before[1] + after[1]) / 2)


def interleaved(
    workloads: Mapping[str, "Workload"], repeats: int, advance: Callable[[], object] = lambda: None
) -> dict[str, Measurement]:
    """Time several workloads in turn, A B C A B C ..., after one warm-up of each, so that they share the weather.

    advance: called after each run, the warm-ups included
    """
    samples: dict[str, list[Sample]] = {name: [] for name in workloads}
    for repeat in range(repeats + 1):
        for name, work in workloads.items():
            taken = sample(work.run, work.kind)
            if repeat:
                samples[name].append(taken)
            advance()
    return {name: Measurement(tuple(taken)) for name, taken in samples.items()}
