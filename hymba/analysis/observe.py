"""Hear every operation of every layer while a model reads a text: one forward pass, no change to what it computes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hymba import ops
from hymba.model.attention import Attention
from hymba.model.hymba import Hymba
from hymba.model.layout import Layout
from hymba.model.mamba import Mamba, Mamba2

# called with the layer, the operation's name, its arguments by name (see `hymba.ops`), and what it returned
LayerListener = Callable[[int, str, dict[str, Any], Any], None]


@contextmanager
def observe(model: Hymba, *listeners: LayerListener) -> Iterator[None]:
    """Report the operations of all attention and Mamba modules on text; those on the meta tokens are left out."""
    current: int | None = None

    def enter(layer: int) -> Callable[[nn.Module, tuple], None]:
        def hook(heads: nn.Module, arguments: tuple) -> None:
            nonlocal current
            layout = next(x for x in arguments if isinstance(x, Layout))
            current = layer if int(layout.positions[0, 0]) >= model.config.n_meta else None

        return hook

    def leave(heads: nn.Module, arguments: tuple, output: Any) -> None:
        nonlocal current
        current = None

    @torch.no_grad()
    def hear(name: str, arguments: dict[str, Any], output: Any) -> None:
        if current is not None:
            for listener in listeners:
                listener(current, name, arguments, output)

    hooks = [
        hook
        for layer, block in enumerate(model.blocks)
        for heads in block.heads.modules()
        if isinstance(heads, Attention | Mamba | Mamba2)
        for hook in (heads.register_forward_pre_hook(enter(layer)), heads.register_forward_hook(leave))
    ]
    try:
        with ops.observe(hear):
            yield
    finally:
        for hook in hooks:
            hook.remove()
