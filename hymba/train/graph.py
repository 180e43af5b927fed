"""A training step's forward and backward pass as one CUDA graph: a small model on a GPU waits for Python otherwise.

Recorded once for rows of one shape, with the addresses of weights, rows and gradients, and replayed with other rows:
the same kernels in the same order, so the same numbers. The optimiser stays outside; its rate changes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hymba.train.data import Rows

WARM_UP = 3  # passes before the recording: kernels are compiled, libraries allocate what they keep


class Recorded:
    """Loss and gradients of rows of one shape."""

    def __init__(self, loss: Callable[[Rows], Tensor], parameters: list[nn.Parameter], rows: Rows):
        self.parameters = parameters
        self.rows = Rows(*(x.clone() for x in rows))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._forget_gradients()  # so that passes write them, and do not add to them
                loss(self.rows).backward()
        torch.cuda.current_stream().wait_stream(stream)
        self._forget_gradients()
        self.graph = torch.cuda.CUDAGraph()
        # another thread places the next rows on the device meanwhile
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            value = loss(self.rows)
            value.backward()
        # without its graph, which would keep the places where gradients are added up, and their stream, for good
        self.loss = value.detach()
        self.gradients = [parameter.grad for parameter in parameters]

    def __call__(self, rows: Rows) -> Tensor:
        """-> the loss, a scalar that the next call overwrites; gradients are where `backward` leaves them"""
        for kept, new in zip(self.rows, rows, strict=True):
            kept.copy_(new)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
