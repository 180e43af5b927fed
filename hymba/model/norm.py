"""RMSNorm as a module."""

import torch
from torch import Tensor, nn

from hymba import ops


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension with a learned weight; see `ops.rms_norm`."""

    def __init__(self, *shape: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def branch(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> the normed sum for a branch, and the sum for the residual beside it, whose gradients are added in one go
        then"""
        return ops.branch_norm(x, self.weight, self.eps, added)
