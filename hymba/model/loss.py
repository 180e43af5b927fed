"""Cross entropy of a linear layer's outputs, without ever holding the logits of a long text.

The logits of a chunk of tokens are computed, turned into their gradient in place, and multiplied on to the gradients of
hidden states and weight, all in the forward pass: nothing is kept but those two, and nothing is computed twice. (The
idea is that of Liger Kernel's fused linear cross entropy; Hsu et al., arXiv 2410.10989.)

    T tokens, D model width, V vocabulary
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hymba import ops
from hymba.model.plain import is_plain

# tokens whose logits are held at a time: at 32001 entries, 131 MB in float32; a GPU is filled by more
CHUNK, GPU_CHUNK = 1024, 4096
# a GPU multiplies matrices of other widths at a third of the speed: a vocabulary of 32001 is padded there
GPU_WIDTH = 64
IGNORED_LABEL = -100


def head_cross_entropy(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross entropies of head(hidden) with targets, in nats.

    head: as `nn.Linear`, hidden: (T, D), targets: (T,) int64, -100 where there is none -> float32 scalar
    """
    # a head that is not just a product (quantised, adapted, sharded by hooks) is called, and called again backwards
    if not is_plain(head):

        def total(hidden: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(head(hidden).float(), targets, ignore_index=IGNORED_LABEL, reduction="sum")

        chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        return torch.stack([checkpoint(total, h, t, use_reentrant=False) for h, t in chunks]).sum()
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(hidden, head.weight, targets)
    return _run(hidden, head.weight, targets, False, False)[0]


def _run(hidden: Tensor, weight: Tensor, targets: Tensor, for_hidden: bool, for_weight: bool):
    """-> loss, gradient of hidden or None, of weight or None"""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    V, on_gpu = weight.shape[0], device == "cuda"
    chunk = GPU_CHUNK if on_gpu else CHUNK
    with torch.autocast(device, enabled=False):
        w, losses, d_hidden, d_weight = weight.to(dtype), [], [], None
        if on_gpu and V % GPU_WIDTH:
            w = torch.cat([w, w.new_zeros(-V % GPU_WIDTH, w.shape[1])])  # logits of 0, which get no gradient
        for h, t in zip(hidden.to(dtype).split(chunk), targets.split(chunk), strict=True):
            logits = F.linear(h, w)
            losses.append(ops.cross_entropy_(logits[:, :V], t, IGNORED_LABEL).sum())
            if for_hidden:
                d_hidden.append(logits @ w)
            if for_weight:  # chunks are added up in the weight's own precision
                if d_weight is None:
                    d_weight = (logits.T @ h).to(weight.dtype)
                elif weight.dtype == dtype:
                    d_weight.addmm_(logits.T, h)
                else:
                    d_weight.add_(logits.T @ h)
        d_hidden = torch.cat(d_hidden).to(hidden.dtype) if for_hidden else None
        return torch.stack(losses).sum(), d_hidden, d_weight[:V] if for_weight else None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        loss, *gradients = _run(hidden, weight, targets, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return (*(None if d is None else d * g.to(d.dtype) for d in ctx.saved_tensors), None)
