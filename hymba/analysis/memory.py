"""How far back a model looks: the effective receptive field of the whole, the memory of each SSM channel.

B batch, T time, D model width, E channels, N states of a channel
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hymba.model.hymba import Hymba


def influence(
    model: Hymba, rows: Tensor, probes: int = 2, seed: int = 0, advance: Callable[[], None] = lambda: None
) -> Tensor:
    """The influence of the token `distance` steps back on the model's last hidden state: the size of the Jacobian.

        influence(distance) = || d hidden(T - 1) / d embedding(T - 1 - distance) ||_F

    the effective receptive field of Luo et al. (arXiv 1701.04128), root mean square over rows. `hidden` is what the LM
    head reads. The Frobenius norm is estimated by products with random directions v, E |v J|^2 = |J|_F^2.

    rows: (R, T), probes: random directions for each -> (T,) float64, by distance
    """
    generator = torch.Generator().manual_seed(seed)
    before, model.checkpoint_blocks = model.checkpoint_blocks, True  # a long text fits in memory
    embedded: list[Tensor] = []

    def cut(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.embedding.register_forward_hook(cut)
    squares = torch.zeros(rows.shape[1], dtype=torch.float64)
    try:
        for row in rows:
            for _ in range(probes):
                with torch.enable_grad():
                    last = model.hidden(row[None])[0, -1]
                direction = torch.randn(last.shape, generator=generator).to(last)
                (gradient,) = torch.autograd.grad(last, embedded.pop(), direction)  # (1, T, D)
                squares += gradient[0].double().square().sum(-1).flip(0).cpu()
                advance()
    finally:
        hook.remove()
        model.checkpoint_blocks = before
    return (squares / (len(rows) * probes)).sqrt()


def receptive_field(share: Tensor, part: float) -> int:
    """The distance within which `part` of the influence lies. share: (T,) that add up to 1, by distance"""
    return int((share.cumsum(0) < part).sum())


def reach(share: Tensor) -> int:
    """The largest distance at which a token has any influence at all."""
    return int(share.nonzero().max())


class MemoryMeter:
    """Listens to the scans: the average step of every channel, and how fast its states decay.

    A state that decays by exp(delta A) in a step of size delta falls to 1/e in 1 / (mean delta |A|) steps: over a text,
    decays multiply, so it is the mean step that counts.
    """

    def __init__(self) -> None:
        self._steps: dict[int, tuple[Tensor, int]] = {}
        self._rates: dict[int, Tensor] = {}

    def __call__(self, layer: int, name: str, arguments: dict[str, Any], output: Any) -> None:
        if name not in ("selective_scan", "ssd"):
            return
        delta = F.softplus(arguments["dt"].float() + arguments["dt_bias"].float()).double()  # (B, T, E)
        total, count = self._steps.get(layer, (0, 0))
        self._steps[layer] = (total + delta.sum((0, 1)), count + delta.shape[0] * delta.shape[1])
        self._rates[layer] = -arguments["A"].double().reshape(delta.shape[2], -1)  # (E, N); Mamba-2: (S, 1)

    def lengths(self) -> dict[int, Tensor]:
        """Layer -> (E, N) tokens until a state has decayed to 1/e; in Mamba-2 (S, 1), a head's states decay alike."""
        return {
            layer: 1 / (total[:, None] / count * self._rates[layer]).clamp(min=1e-12)
            for layer, (total, count) in sorted(self._steps.items())
        }
