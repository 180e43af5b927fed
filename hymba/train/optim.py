"""AdamW, and Muon for the matrices of the blocks."""

import torch
from torch import Tensor, nn

from hymba.errors import UserError
from hymba.train.config import Optimizer

# two-dimensional, but no matrix that maps one vector to another
NOT_MATRICES = ("A_log", "meta_tokens", "conv_weight")


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
    """The optimisers of a model; every group remembers its peak rate as `peak_lr`, see `set_lr`.

    Muon (Jordan 2024) takes its updates at the root mean square of AdamW's (Liu et al., arXiv 2502.16982), so that both
    understand the same rate. Raises `UserError` where this PyTorch has no Muon.
    """
    s = settings
    matrices, decaying, kept = parameter_groups(model)
    optimizers: list[torch.optim.Optimizer] = []
    if s.name == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"optimizer.name='muon' needs PyTorch 2.9 or newer, this is {torch.__version__}; use adamw")
        muon_lr = s.lr if s.muon_lr is None else s.muon_lr
        optimizers.append(
            torch.optim.Muon(
                [{"params": matrices, "peak_lr": muon_lr}],
                lr=muon_lr,
                momentum=s.momentum,
                weight_decay=s.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
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
