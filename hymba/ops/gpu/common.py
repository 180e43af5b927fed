"""What the kernel files share."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
# Triton's interpreter runs the kernels on the CPU, slowly: for tests without a GPU, on small tiles
INTERPRET = bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False


def library_op(name: str) -> Callable:
    """Register a function as a PyTorch operator, so that compiled graphs do not break at it."""
    return torch.library.custom_op(f"hymba_gpu::{name}", mutates_args=())


def rows_contiguous(x: Tensor) -> Tensor:
    """x with a contiguous last dimension; kernels take the other strides as they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


@triton.jit
def sigmoid(x):
    return tl.fdiv(1.0, 1.0 + tl.exp2(-LOG2E * x))


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def softplus(x):
    """max(x, 0) + log(1 + exp(-|x|)); the logarithm as 2 atanh(z), z = e / (2 + e) <= 1 / 3.

    The hardware's logarithm has an absolute error, which near 1, where small steps live, is a large relative one.
    """
    e = tl.exp2(-LOG2E * tl.abs(x))
    z = tl.fdiv(e, 2.0 + e)
    s = z * z
    series = 2.0 / 15.0
    series = series * s + 2.0 / 13.0
    series = series * s + 2.0 / 11.0
    series = series * s + 2.0 / 9.0
    series = series * s + 2.0 / 7.0
    series = series * s + 2.0 / 5.0
    series = series * s + 2.0 / 3.0
    series = series * s + 2.0
    return series * z + tl.maximum(x, 0.0)


@triton.jit
def softplus_slope(y):
    """The derivative of softplus at the x where it is y: sigmoid(x) = 1 - exp(-y); a series where that would cancel."""
    series = y * (1.0 - y * (1 / 2 - y * (1 / 6 - y * (1 / 24 - y * (1 / 120)))))
    return tl.where(y < 0.125, series, 1.0 - tl.exp2(-LOG2E * y))
