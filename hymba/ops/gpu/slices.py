"""Slices of a wide projection whose gradients are written side by side.

The backward pass of `torch.split` joins the gradients of the slices, which copies all of them. Here a slice knows its
place in the gradient of the whole, and a kernel that asks for it writes there; the others' gradients are copied.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from hymba.ops import reference

LEAST = 2**22  # elements: of fewer, several copies take longer than one that joins all


def split(x: Tensor, widths: Sequence[int], shapes: Sequence[tuple[int, int]]) -> list[tuple[Tensor, ...]]:
    """As `reference.split`. Slices of the last part have places; those of meta tokens are few, and read twice."""
    if x.numel() < LEAST:
        return reference.split(x, widths, shapes)
    gradient = _Gradient(x, widths, shapes)
    slices = _Split.apply(x, gradient)
    for i in range(len(slices) - len(widths), len(slices)):
        slices[i].gradient_place = partial(gradient.place, i)
    return [slices[i : i + len(widths)] for i in range(0, len(slices), len(widths))]


def place_of(x: Tensor) -> Callable[[], Tensor | None] | None:
    """To be asked in the forward pass: if x is a slice, a function that says, once in the backward pass, where its
    gradient shall be written"""
    return getattr(x, "gradient_place", None)


def heads(x: Tensor, count: int) -> Tensor:
    """As `reference.heads`; the place of the gradient goes along"""
    y, place = reference.heads(x, count), place_of(x)
    if place:
        y.gradient_place = lambda: _heads_of(place(), count)
    return y


def _heads_of(x: Tensor | None, count: int) -> Tensor | None:
    return None if x is None else reference.heads(x, count)


def _slices(x: Tensor, widths: list[int], shapes: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    return tuple(piece for part in reference.split(x, widths, shapes) for piece in part)


class _Gradient:
    """The gradient of the whole in the making: allocated for the first slice that asks for its place."""

    def __init__(self, x: Tensor, widths: Sequence[int], shapes: Sequence[tuple[int, int]]):
        self.slices_of = partial(_slices, widths=list(widths), shapes=list(shapes))
        self.allocate = partial(torch.empty, x.shape, dtype=x.dtype, device=x.device)
        self.whole: Tensor | None = None
        self.taken: set[int] = set()

    def place(self, i: int) -> Tensor | None:
        if i in self.taken:  # a slice that is read twice has a sum as its gradient
            return None
        self.taken.add(i)
        if self.whole is None:
            self.whole = self.allocate()
        return self.slices_of(self.whole)[i]

    def collect(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """gradients: of every slice, None for zero -> of the whole"""
        whole, taken = self.whole, self.taken
        self.whole, self.taken = None, set()
        places = () if whole is None else self.slices_of(whole)
        if whole is None or not all(_same(gradients[i], places[i]) for i in taken):
            # nothing was written, or somebody made something else of it, and may still read it
            whole, taken = self.allocate(), set()
            places = self.slices_of(whole)
        for i, (place, gradient) in enumerate(zip(places, gradients, strict=True)):
            if gradient is None:
                place.zero_()
            elif i not in taken:
                place.copy_(gradient)
        return whole


def _same(x: Tensor | None, y: Tensor) -> bool:
    if x is None:
        return False
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gradient):
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        return gradient.slices_of(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        return ctx.gradient.collect(gradients), None
