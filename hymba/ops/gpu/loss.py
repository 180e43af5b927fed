"""Cross entropy that turns logits into their gradient, as a Triton kernel.

Tiling: a program owns one row and walks over it twice: for the greatest logit and the sum of exponentials, and then to
write softmax minus the target's 1 over the logits. The second walk reads what the first has left in the L2 cache.

float32: everything between load and store.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.gpu.common import INTERPRET, LOG2E

LINES, LANES = (2, 8) if INTERPRET else (4, 1024)


@triton.jit
def _seen(x, top, total):
    """x: (LINES, LANES) more logits -> the greatest of each lane so far, and the sum of exponentials below it"""
    new = tl.maximum(top, tl.max(x, axis=0))
    some = new > float("-inf")  # where all was -inf so far, nothing is to be rescaled
    more = tl.sum(tl.exp2(x - tl.where(some, new, 0.0)[None, :]), axis=0)
    return new, tl.where(some, total * tl.exp2(top - new), 0.0) + more


@triton.jit
def _gradient(x, lse, here, counts):
    return tl.where(counts, tl.exp2(x - lse) - tl.where(here, 1.0, 0.0), 0.0)


@triton.jit
def _kernel(logits, targets, losses, V, row_step, ignored, LINES: tl.constexpr, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_step
    target = tl.load(targets + row)
    counts = target != ignored
    target = target.to(tl.int32)
    lane = tl.arange(0, LANES)[None, :]
    v = tl.arange(0, LINES)[:, None] * LANES + lane
    BLOCK: tl.constexpr = LINES * LANES
    top = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    # whole blocks without a mask: under one, logits of an odd number would be read one by one
    rest = V // BLOCK * BLOCK
    for first in range(0, rest, BLOCK):
        top, total = _seen(tl.load(logits + first + v).to(tl.float32) * LOG2E, top, total)
    for first in range(rest, V, LANES):
        x = tl.load(logits + first + lane, mask=first + lane < V, other=float("-inf")).to(tl.float32) * LOG2E
        top, total = _seen(x, top, total)
    highest = tl.max(top, axis=0)
    lse = highest + tl.log2(tl.sum(tl.where(total != 0, total * tl.exp2(top - highest), 0.0), axis=0))
    at_target = tl.load(logits + tl.where(counts, target, 0)).to(tl.float32) * LOG2E
    tl.store(losses + row, tl.where(counts, (lse - at_target) / LOG2E, 0.0))
    tl.debug_barrier()  # the target's logit was read by all before it is overwritten
    TYPE: tl.constexpr = logits.dtype.element_ty
    for first in range(0, rest, BLOCK):
        x = tl.load(logits + first + v).to(tl.float32) * LOG2E
        tl.store(logits + first + v, _gradient(x, lse, first + v == target, counts).to(TYPE))
    for first in range(rest, V, LANES):
        real = first + lane < V
        x = tl.load(logits + first + lane, mask=real, other=float("-inf")).to(tl.float32) * LOG2E
        tl.store(logits + first + lane, _gradient(x, lse, first + lane == target, counts).to(TYPE), mask=real)


def cross_entropy_(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """As in `reference`; logits may be columns of a wider tensor."""
    if logits.stride(1) != 1:
        raise ValueError("rows of logits must be contiguous")
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _kernel[(logits.shape[0],)](
        logits,
        targets.contiguous(),
        losses,
        logits.shape[1],
        logits.stride(0),
        ignored,
        LINES=LINES,
        LANES=LANES,
        num_warps=4,
    )
    return losses
