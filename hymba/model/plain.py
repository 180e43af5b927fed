"""What a fast path may look past: a module whose weight says all that it computes."""

from torch import nn


def is_plain(module: nn.Module) -> bool:
    """Whether a projection is its weight and nothing else: not quantised, adapted or pruned, and without hooks."""
    return type(module) is nn.Linear and not (
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    )
