"""Work that runs beside other work on a GPU."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor


def fork(like: Tensor, *given: Tensor) -> torch.cuda.Stream | None:
    """While a CUDA graph is recorded, a stream that has waited for all work so far; None otherwise.

    What is computed on it (`on`) and what is computed outside do not wait for each other until `join`. So it is in the
    backward pass, which PyTorch computes on the streams of the forward pass, and where memory must not be given away
    while the other stream reads it: `given` are tensors that were made outside and are read there (not slices of
    `ops.split`, which holds the whole until their gradients have come), and weights that are used there must not be
    ones that autocast casts and keeps.
    """
    if not like.is_cuda or torch.compiler.is_compiling() or not torch.cuda.is_current_stream_capturing():
        return None
    stream = _stream(like.device)
    stream.wait_stream(torch.cuda.current_stream())
    for x in given:
        x.record_stream(stream)
    return stream


def on(stream: torch.cuda.Stream | None) -> AbstractContextManager:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def join(stream: torch.cuda.Stream | None, *made: Tensor | None) -> None:
    """Wait for what was computed on the stream. made: what of it is read outside"""
    if stream is not None:
        torch.cuda.current_stream().wait_stream(stream)
        for x in made:
            if x is not None:
                x.record_stream(torch.cuda.current_stream())


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
