"""Timing on a GPU, and the limits of the card that times are held against."""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from hymba.train.speed import peak_operations

EXPONENTIALS_PER_CLOCK = 16  # of one multiprocessor
GPU = torch.device("cuda")


def timed(work: Callable[[], object], least: int = 10, seconds: float = 0.3, warm: int = 3) -> float:
    """Median seconds of one call, by events."""
    for _ in range(warm):
        work()
    torch.cuda.synchronize()
    spans, began = [], time.perf_counter()
    while len(spans) < least or time.perf_counter() - began < seconds:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        spans.append(start.elapsed_time(end) / 1e3)
    return statistics.median(spans)


def captured(work: Callable[[], object]) -> Callable[[], None]:
    """The kernels of `work` as a CUDA graph: what it costs without the time that Python takes to launch them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()  # not `free`: what was compiled is what is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def limits() -> dict[str, float]:
    """Bytes a second of a copy (read and written), operations of a product in bfloat16, measured and by the maker's
    data sheet (MFU is a share of that), exponentials."""
    x = torch.randn(1 << 29, device=GPU, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy = 2 * x.nbytes / timed(lambda: y.copy_(x))
    a = torch.randn(8192, 8192, device=GPU, dtype=torch.bfloat16)
    product = 2 * 8192**3 / timed(lambda: a @ a)
    properties = torch.cuda.get_device_properties(GPU)
    clock = properties.clock_rate * 1e3 if hasattr(properties, "clock_rate") else 1.755e9
    return {
        "copy": copy, "product": product, "peak": peak_operations(GPU, "bfloat16"),
        "exponentials": properties.multi_processor_count * EXPONENTIALS_PER_CLOCK * clock,
    }  # fmt: skip


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=GPU).to(dtype)


def free() -> None:
    """Between measurements: memory, and compiled forms of functions, of which PyTorch keeps eight at most."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def largest(batch: int, measure: Callable[[int], dict]) -> dict:
    """`measure`, with the batch halved until it fits."""
    while True:
        with suppress(torch.OutOfMemoryError):  # which holds what was allocated, until it is gone
            return {"batch": batch, **measure(batch)}
        free()
        if batch == 1:
            return {"batch": 0}
        batch //= 2


def apart(seconds: float, work: Callable[..., Iterable], *arguments: object) -> Iterator:
    """What `work(*arguments)` yields, from a process of its own: what fails there while a graph is captured spoils
    nothing here. Raises `TimeoutError` when it takes longer, and `RuntimeError` for what it raised."""
    free()
    end, context = time.perf_counter() + seconds, get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, work, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        while ours.poll(max(0.0, end - time.perf_counter())):
            over, value = ours.recv()
            if over and value:
                raise RuntimeError(value)
            if over:
                return
            yield value
        raise TimeoutError(f"it took longer than {seconds:.0f} s")
    except EOFError:
        raise RuntimeError("its process ended") from None
    finally:
        process.kill()
        process.join()


def _send(pipe: Connection, work: Callable[..., Iterable], arguments: tuple) -> None:
    """(False, value) for each value, then (True, what failed or "")"""
    failed = ""
    try:
        for value in work(*arguments):
            pipe.send((False, value))
    except Exception as error:
        failed = f"{type(error).__name__} {str(error)[:300]}"
    pipe.send((True, failed))


def by_importance(batches: list[int]) -> list[int]:
    """The largest decides, and one row alone is what a person waits for; the others follow while there is time."""
    first, *rest = sorted(batches, reverse=True)
    return [first, *rest[-1:], *rest[:-1]]


def shown(row: dict) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
    )
