"""The two branches of a layer side by side: how large their outputs and gates are, and what their removal costs."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hymba.model.hymba import Hymba

BRANCHES = ("attention", "mamba")
OPERATIONS = {"attention": "attention", "selective_scan": "mamba", "ssd": "mamba"}


def has_branch(model: Hymba, layer: int, name: str) -> bool:
    """Whether a layer has attention heads, or Mamba heads."""
    plan = model.config.layers[layer]
    return plan.attends if name == "attention" else plan.recurs


class OutputMeter:
    """Listens to both branches: root mean square over channels of their outputs before the norms, mean over tokens."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], tuple[float, int]] = {}

    def __call__(self, layer: int, name: str, arguments: dict[str, Any], output: Any) -> None:
        if name not in OPERATIONS:
            return
        y = output if isinstance(output, Tensor) else output[0]  # a scan returns its state as well
        sizes = y.flatten(2).double().square().mean(-1).sqrt()
        total, count = self._sums.get((OPERATIONS[name], layer), (0.0, 0))
        self._sums[OPERATIONS[name], layer] = (total + float(sizes.sum()), count + sizes.numel())

    def outputs(self, name: str) -> dict[int, float]:
        """Layer -> magnitude, for the layers that have this branch."""
        return {layer: total / n for (branch, layer), (total, n) in sorted(self._sums.items()) if branch == name}


def gates(model: Hymba, name: str) -> dict[int, Tensor]:
    """Layer -> (E,) magnitudes of the learned gate of a branch, beta of the paper's equation 3.

    It is the weight of the norm behind the branch. Layers with one branch have none.
    """
    norm = {"attention": "attn_norm", "mamba": "ssm_norm"}[name]
    found = {layer: getattr(block.heads, norm, None) for layer, block in enumerate(model.blocks)}
    return {layer: module.weight.detach().abs() for layer, module in found.items() if module is not None}


@contextmanager
def without(model: Hymba, layer: int, name: str) -> Iterator[None]:
    """Remove the attention heads or the Mamba heads of a layer: what they add to the residual stream is zero.

    As in the paper (beta set to zero in equation 3) the other branch keeps its scale: the mean of the two still divides
    by two. The removed branch's norm makes zero of zero. Keys and values that other layers read stay.
    """

    def silence(module: nn.Module, arguments: tuple, output: Any) -> Any:
        if isinstance(output, Tensor):
            return torch.zeros_like(output)
        return (torch.zeros_like(output[0]), *output[1:])  # states pass

    hook = getattr(model.blocks[layer].heads, name).register_forward_hook(silence)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def bits(model: Hymba, rows: Tensor, advance: Callable[[], None] = lambda: None) -> float:
    """Bits that the model needs to write down rows of tokens, the first of each given. rows: (R, T)"""
    nats = 0.0
    for row in rows:
        nats += float(model(row[None], labels=row[None])) * (len(row) - 1)
        advance()
    return nats / math.log(2)
