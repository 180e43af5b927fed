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

BLOCK = 16 if INTERPRET else 4096


@triton.jit
def _kernel(logits, targets, losses, V, row_step, ignored, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_step
    target = tl.load(targets + row)
    counts = target != ignored
    v = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        x = tl.load(logits + first + v, mask=first + v < V, other=float("-inf")).to(tl.float32) * LOG2E
        new = tl.maximum(top, x)
        # where all was -inf so far, nothing is to be rescaled
        total = tl.where(new == float("-inf"), 0.0, total * tl.exp2(top - new) + tl.exp2(x - new))
        top = new
    highest = tl.max(top, axis=0)
    lse = highest + tl.log2(tl.sum(tl.where(total > 0, total * tl.exp2(top - highest), 0.0), axis=0))
    at_target = tl.load(logits + tl.where(counts, target, 0)).to(tl.float32) * LOG2E
    tl.store(losses + row, tl.where(counts, (lse - at_target) / LOG2E, 0.0))
    tl.debug_barrier()  # the target's logit was read by all before it is overwritten
    for first in range(0, V, BLOCK):
        real = first + v < V
        x = tl.load(logits + first + v, mask=real, other=float("-inf")).to(tl.float32) * LOG2E
        gradient = tl.exp2(x - lse) - tl.where(first + v == target, 1.0, 0.0)
        tl.store(logits + first + v, tl.where(counts, gradient, 0.0).to(logits.dtype.element_ty), mask=real)


def cross_entropy_(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """As in `reference`; logits may be columns of a wider tensor."""
    if logits.stride(1) != 1:
        raise ValueError("rows of logits must be contiguous")
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _kernel[(logits.shape[0],)](
        logits, targets.contiguous(), losses, logits.shape[1], logits.stride(0), ignored, BLOCK=BLOCK, num_warps=8
    )
    return losses
