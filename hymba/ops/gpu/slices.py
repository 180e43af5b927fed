"""Slices of a wide projection whose gradients are written side by side.

The backward pass of `torch.split` joins the gradients of the slices, which copies all of them. Here a slice knows its
place in the gradient of the whole, and a kernel that asks for it writes there; the others' gradients are copied.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from hymba.ops import reference

LEAST = 2**22  # elements: of fewer, one kernel that joins all is faster than some that copy what is not in its place


def split(x: Tensor, widths: Sequence[int], shapes: Sequence[tuple[int, int]]) -> list[tuple[Tensor, ...]]:
    """As `reference.split`. Slices of the last part have places; those of meta tokens are small, and read twice."""
    gradient = _Gradient(x, widths, shapes)
    parts = gradient.in_parts(_Split.apply(x, gradient))
    if x.numel() >= LEAST:
        for i, piece in enumerate(parts[-1]):
            piece.gradient_place = partial(gradient.place, i)
    return parts


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


class _Gradient:
    """The gradient of the whole in the making: allocated for the first slice that asks for its place."""

    def __init__(self, x: Tensor, widths: Sequence[int], shapes: Sequence[tuple[int, int]]):
        self.split = partial(reference.split, widths=list(widths), shapes=list(shapes))
        self.width, self.rows = len(widths), [rows * steps for rows, steps in shapes]
        # held until all gradients have come: when autograd lets go of slices, kernels on another stream
        # (`model.beside`) may still read them
        self.x: Tensor | None = x
        self.allocate = partial(torch.empty, x.shape, dtype=x.dtype, device=x.device)
        self.whole: Tensor | None = None
        self.taken: set[int] = set()

    def in_parts(self, slices: Sequence) -> list[Sequence]:
        return [slices[i : i + self.width] for i in range(0, len(slices), self.width)]

    def place(self, i: int) -> Tensor | None:
        """Of slice i of the last part"""
        if i in self.taken:  # a slice that is read twice has a sum as its gradient
            return None
        self.taken.add(i)
        if self.whole is None:
            self.whole = self.allocate()
        return self.split(self.whole)[-1][i]

    def collect(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """gradients: of every slice of every part, None for zero -> of the whole"""
        whole, taken = self.whole, self.taken
        self.x, self.whole, self.taken = None, None, set()
        given = self.in_parts(gradients)
        if whole is None or not all(_same(given[-1][i], self.split(whole)[-1][i]) for i in taken):
            # nothing was written, or somebody made something else of it, and may still read it
            whole, taken = self.allocate(), set()
        written = [set[int]() for _ in given[1:]] + [taken]
        for part in zip(whole.split(self.rows), self.split(whole), given, written, strict=True):
            _copy(*part)
        return whole


def _copy(rows: Tensor, places: Sequence[Tensor], gradients: Sequence[Tensor | None], written: set[int]) -> None:
    """rows: all of a part, places: its slices, where gradients go but for those that are `written`"""
    if not written and all(gradient is not None for gradient in gradients):
        torch.cat([gradient.flatten(0, 1) for gradient in gradients], dim=-1, out=rows)
        return
    for i, (place, gradient) in enumerate(zip(places, gradients, strict=True)):
        if gradient is None:
            place.zero_()
        elif i not in written:
            place.copy_(gradient)


def _same(x: Tensor | None, y: Tensor) -> bool:
    if x is None:
        return False
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gradient):
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        return tuple(piece for part in gradient.split(x) for piece in part)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        return ctx.gradient.collect(gradients), None
