"""What the kernel files share."""

from collections.abc import Callable
from functools import lru_cache, wraps

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an older Triton
    gdc_launch_dependents = gdc_wait = None

LOG2E = tl.constexpr(1.4426950408889634)
# Triton's interpreter runs the kernels on the CPU, slowly: for tests without a GPU, on small tiles
INTERPRET = bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False


@lru_cache
def overlap(device: torch.device) -> dict[str, bool]:
    """Options of a kernel whose launch may overlap with the kernel before it (programmatic dependent launch).

    Such a kernel reads nothing that an earlier one of its step wrote before it has called `inputs_ready`.
    """
    able = gdc_wait is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if able else {"PDL": False}


def library_op(name: str) -> Callable:
    """Register a function as a PyTorch operator, so that compiled graphs do not break at it.

    Eager code that wants no gradients calls the function itself, since the way through the operator takes as long as
    launching a kernel.
    """

    def register(function: Callable) -> Callable:
        operator = torch.library.custom_op(f"hymba_gpu::{name}", mutates_args=())(function)

        @wraps(function)
        def call(*inputs):
            tensors = [x for x in inputs if isinstance(x, Tensor)]
            plain = {type(x) for x in tensors} <= {Tensor, nn.Parameter}  # and not fake ones, say
            as_operator = needs_grad(*tensors) or torch.compiler.is_compiling() or not plain
            return (operator if as_operator else function)(*inputs)

        call.register_fake, call.register_autograd = operator.register_fake, operator.register_autograd
        return call

    return register


def rows_contiguous(x: Tensor) -> Tensor:
    """x with a contiguous last dimension; kernels take the other strides as they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Of rows and steps of each (B, T, ..)."""
    return [stride for x in tensors for stride in (x.stride(0), x.stride(1))]


def state_row(state: Tensor) -> int:
    """Distance of the states of rows, 0 if they share one."""
    return 0 if state.shape[0] == 1 else state.stride(0)


@triton.jit
def _add_up_kernel(parts, first, second, third, P, n, end_1, end_2, BP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for p0 in range(0, P, BP):
        p = p0 + tl.arange(0, BP)
        at = parts + p[:, None].to(tl.int64) * n + i[None, :]
        total += tl.sum(tl.load(at, mask=(p < P)[:, None] & (i < n)[None, :], other=0.0), axis=0)
    tl.store(first + i, total.to(first.dtype.element_ty), mask=i < end_1)
    tl.store(second + i - end_1, total.to(second.dtype.element_ty), mask=(i >= end_1) & (i < end_2))
    tl.store(third + i - end_2, total.to(third.dtype.element_ty), mask=(i >= end_2) & (i < n))


def add_up(parts: Tensor, *like: Tensor) -> list[Tensor]:
    """Sums over partial sums, always in the same order, and their rounding, in one kernel.

    parts: (P, ..) float32 -> up to three tensors, shaped and typed as `like`, of the sums' elements one after another
    """
    sums = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in like]
    places = [*sums, *sums[-1:] * (3 - len(sums))]
    P, ends = parts.shape[0], [sum(x.numel() for x in sums[:i]) for i in (1, 2, 3)]
    BP = min(max(triton.next_power_of_2(P), 8), 8 if INTERPRET else 128)
    BLOCK = (128 if INTERPRET else 2048) // BP
    _add_up_kernel[(triton.cdiv(ends[2], BLOCK),)](
        parts, *places, P, ends[2], ends[0], ends[1], BP=BP, BLOCK=BLOCK, num_warps=4
    )
    return sums


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


@triton.jit
def let_next_begin(PDL: tl.constexpr):
    """The next kernel may come onto the card as soon as there is room."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def inputs_ready(PDL: tl.constexpr):
    """Wait until the kernels before this one are done, and what they wrote can be read."""
    if PDL:
        gdc_wait()


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
