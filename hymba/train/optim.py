"""AdamW, and Muon for the matrices of the blocks."""

import math

import torch
from torch import Tensor, nn

from hymba.train.config import Optimizer

# two-dimensional, but no matrix that maps one vector to another
NOT_MATRICES = ("A_log", "meta_tokens", "conv_weight")
# of Muon's iteration: a quintic that draws all singular values close to 1 in few rounds (Jordan 2024)
QUINTIC, ROUNDS = (3.4445, -4.7750, 2.0315), 5
TOGETHER = 2**22  # entries of matrices that are orthogonalised at once; more of them keep any machine busy alone


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: each matrix moves by as much in all its directions (Jordan 2024,
    kellerjordan.github.io/posts/muon; with Nesterov's momentum, in bfloat16).

    Updates have the root mean square of AdamW's (Liu et al., arXiv 2502.16982), so that both understand the same rate.
    It does what `torch.optim.Muon` does with `adjust_lr_fn="match_rms_adamw"`, but takes matrices of a shape together:
    one by one, a small model's cost a GPU more launches than all of its forward and backward pass.
    """

    def __init__(self, params, lr: float, momentum: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for matrices in self._alike(group["params"]):
                gradients = [matrix.grad for matrix in matrices]
                means = [self._mean(matrix) for matrix in matrices]
                torch._foreach_lerp_(means, gradients, 1 - momentum)
                updates = orthogonal(torch.stack(torch._foreach_lerp(gradients, means, momentum)).bfloat16())
                scale = 0.2 * math.sqrt(max(updates.shape[1:]))
                torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
                torch._foreach_add_(matrices, list(updates.to(matrices[0].dtype).unbind()), alpha=-lr * scale)

    def _alike(self, matrices: list[Tensor]) -> list[list[Tensor]]:
        """Matrices of one shape and type, not too many at once."""
        kinds: dict[tuple, list[Tensor]] = {}
        for matrix in matrices:
            if matrix.grad is not None:
                kinds.setdefault((matrix.shape, matrix.dtype), []).append(matrix)
        parts = []
        for alike in kinds.values():
            size = max(1, TOGETHER // alike[0].numel())
            parts += [alike[i : i + size] for i in range(0, len(alike), size)]
        return parts

    def _mean(self, matrix: Tensor) -> Tensor:
        """Of its gradients."""
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        return state["momentum_buffer"]


def orthogonal(x: Tensor) -> Tensor:
    """Matrices with singular values close to 1 and the singular vectors of those given, by Newton-Schulz iteration.

    x: (K, M, N) -> (K, M, N)
    """
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    a, b, c = QUINTIC
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def parameter_groups(model: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters that are trained -> (matrices of the blocks, others that decay, those that do not).

    Norms, biases, A_log, D and meta tokens do not decay: they are scales and rates, for which 0 is no neutral value.
    The embedding decays: in a tied model it is the LM head, too. So does the convolution's kernel.
    """
    matrices, decaying, kept = [], [], []
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if not parameter.requires_grad:
            continue
        if parameter.ndim != 2 or leaf in ("A_log", "meta_tokens"):
            kept.append(parameter)
        elif name.startswith("blocks.") and leaf not in NOT_MATRICES:
            matrices.append(parameter)
        else:
            decaying.append(parameter)
    return matrices, decaying, kept


def make_optimizers(model: nn.Module, settings: Optimizer) -> list[torch.optim.Optimizer]:
    """The optimisers of a model; every group remembers its peak rate as `peak_lr`, see `set_lr`."""
    s = settings
    matrices, decaying, kept = parameter_groups(model)
    optimizers: list[torch.optim.Optimizer] = []
    if s.name == "muon":
        lr = s.lr if s.muon_lr is None else s.muon_lr
        optimizers.append(Muon([{"params": matrices, "peak_lr": lr}], lr, s.momentum, s.weight_decay))
    else:
        decaying = matrices + decaying
    groups = [
        {"params": decaying, "weight_decay": s.weight_decay, "peak_lr": s.lr},
        {"params": kept, "weight_decay": 0.0, "peak_lr": s.lr},
    ]
    optimizers.append(torch.optim.AdamW(groups, lr=s.lr, betas=(s.beta1, s.beta2), eps=s.eps, fused=True))
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Set all rates to a share of their peaks."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]


def state_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimisers' state under names that depend on the model only: `PARAMETER.KEY`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{key}": value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def allocate_state(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Make the state that optimisers make in their first step, so that a checkpoint can be read into it.

    A step of rate 0 changes no weight.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    set_lr(optimizers, 0.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
