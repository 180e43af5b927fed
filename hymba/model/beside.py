"""Work that runs beside other work on a GPU."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor


def fork(like: Tensor, *given: Tensor) -> torch.cuda.Stream | None:
    """While a CUDA graph is recorded, a stream that has waited for all work so far; None otherwise.

    What is computed on it (`on`) and what is computed outside do not wait for each other until `join`. So it is in the
    backward pass, which PyTorch computes on the streams of the forward pass, and where memory must not be given away
    while the other stream reads it: `given` are tensors that were made outside and are read there (not slices of
    `ops.split`, which holds the whole until their gradients have come).
    """
    if not like.is_cuda or torch.compiler.is_compiling() or not torch.cuda.is_current_stream_capturing():
        return None
    stream = _stream(like.device)
    stream.wait_stream(torch.cuda.current_stream(like.device))
    for x in given:
        x.record_stream(stream)
    return stream


def on(stream: torch.cuda.Stream | None) -> AbstractContextManager:
    return nullcontext() if stream is None else _on(stream)


@contextmanager
def _on(stream: torch.cuda.Stream) -> Iterator[None]:
    # casts that autocast kept would be read outside, too, and given away too early
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.set_autocast_cache_enabled(kept)


def join(stream: torch.cuda.Stream | None, *made: Tensor | None) -> None:
    """Wait for what was computed on the stream. made: what of it is read outside"""
    if stream is not None:
        outside = torch.cuda.current_stream(stream.device)
        outside.wait_stream(stream)
        for x in made:
            if x is not None:
                x.record_stream(outside)


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
