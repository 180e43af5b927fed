"""Weights of 8 and 4 bits.

    int8: one scale for each output channel, W[r][i] = scale[r] q[r][i]
    int4: one scale for each 32 inputs of a channel, W[r][i] = scale[r][i / 32] LEVELS[q[r][i]]

What is quantised are the large products: input and output projection, MLP, x_proj, embedding and LM head (one matrix if
they are tied). Under int4 the last three stay at 8 bits: they are 4% of Hymba-1.5B, and what they compute (which token,
how far the SSM steps) suffers most. Everything small keeps its dtype.

A quantised model only computes: its weights have no gradient, though gradients flow through it to other parameters.
On a CPU with the native library, activations are quantised too, to int8, in groups of 64 beside int8 weights and of 32
beside int4 (`hymba/csrc/matvec_blocks.h`); without it, or elsewhere, weights are expanded a slice at a time.
"""

import mmap
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hymba.config import brief
from hymba.errors import UserError
from hymba.ops import library

if TYPE_CHECKING:
    from hymba.model.hymba import Hymba

GROUP = 32  # inputs that share an int4 scale
BLOCK = 16  # rows that the kernels' layout keeps together
# The least-squares quantiser of normally distributed weights whose groups are scaled by their own best scale, in units
# of 1 / 127: 0.9 dB better than 16 equal steps, 1.7 dB for weights with heavier tails. As in csrc/matvec_blocks.h.
LEVELS = (-127, -101, -79, -62, -48, -34, -22, -9, 2, 14, 25, 37, 50, 65, 83, 107)
# which multiple of a level the largest weight of a group is tried at; scales are then refined by least squares
_ANCHORS = (-127 * 1.1, -127, -127 * 0.93, -127 * 0.86, 107 * 1.1, 107, 107 * 0.92)
SLICE = 1 << 24  # weights that are expanded or quantised at a time
HUGE_PAGE = 2 << 20

NAMES = {"int8": 8, "int4": 4}
_DENSE, _INT8, _INT4 = library.DTYPES, 2, 3  # formats as csrc/matvec.h numbers them


class Matrix(NamedTuple):
    """A matrix as the kernels see it: struct Matrix of csrc/matvec.h."""

    format: int
    rows: int
    cols: int
    data: int
    scale: int


def matrix(owner: nn.Module | nn.Parameter) -> tuple[Matrix, list[Tensor]]:
    """What a layer or a parameter multiplies by, and the tensors that the struct points into."""
    if isinstance(owner, QuantLinear | QuantEmbedding):
        return owner.matrix.described()
    weight = (owner if isinstance(owner, Tensor) else owner.weight).detach()
    if not weight.is_contiguous():
        raise UserError("the native decoder reads weights where they are, so they must be contiguous")
    return Matrix(_DENSE[weight.dtype], *weight.shape, weight.data_ptr(), 0), [weight]


class QuantMatrix(nn.Module):
    """A quantised matrix in the layout of the kernels: blocks of 16 rows, groups of 32 columns, an even number
    of them in int8, padded with zeros."""

    def __init__(self, bits: int, rows: int, cols: int):
        super().__init__()
        self.bits, self.rows, self.cols = bits, rows, cols
        self.groups, self.n_blocks = -(-cols // GROUP), -(-rows // BLOCK)
        if bits == 8:
            self.groups += self.groups % 2
        self.scale_bytes = -(-self.groups * BLOCK * 2 // 64) * 64 if bits == 4 else 0
        size = self.scale_bytes + self.groups * BLOCK * GROUP * bits // 8
        self.register_buffer("blocks", torch.empty(self.n_blocks, size, dtype=torch.uint8, device="meta"))
        # int8 only: int4 keeps its scales beside the weights
        self.register_buffer("scale", torch.empty(self.n_blocks * BLOCK if bits == 8 else 0, device="meta"))

    @classmethod
    def quantise(cls, weight: Tensor, bits: int) -> "QuantMatrix":
        """weight: (rows, cols), a floating type"""
        self = cls(bits, *weight.shape)
        self._allocate(weight.device)
        for first, last in self._slices():
            self._put(first, last, *_quantise(weight[first:last].detach().float(), bits))
        return self

    # -- as stored: codes and scales in rows

    def stored(self) -> tuple[Tensor, Tensor]:
        """-> int8: (rows, cols) int8, scales (rows,) float32; int4: (rows, groups * 16) uint8, the code of an even
        column in the low nibble, scales (rows, groups) bfloat16"""
        parts = [self._get(first, last) for first, last in self._slices()]
        codes, scales = (torch.cat(x) for x in zip(*parts, strict=True))
        if self.bits == 8:
            return codes[:, : self.cols].contiguous(), scales
        return codes[:, ::2] | codes[:, 1::2] << 4, scales

    def stored_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of what `stored` gives."""
        if self.bits == 8:
            return (self.rows, self.cols), (self.rows,)
        return (self.rows, self.groups * GROUP // 2), (self.rows, self.groups)

    def load_stored(self, codes: Tensor, scales: Tensor, device: torch.device | str = "cpu") -> None:
        """Take what `stored` gave."""
        self._allocate(device)
        for first, last in self._slices():
            part = codes[first:last]
            if self.bits == 4:
                part = torch.stack([part & 15, part >> 4], dim=-1).flatten(1)
            self._put(first, last, part.to(device), scales[first:last].to(device))

    # -- as numbers

    def rows_of(self, ids: Tensor) -> Tensor:
        """Rows by number: ids (...) -> (..., cols) float32"""
        flat = ids.flatten()
        codes, scales = self._views()
        codes = self._unpack(codes[flat // BLOCK, :, :, flat % BLOCK])
        scales = self.scale[flat] if self.bits == 8 else scales[flat // BLOCK, :, flat % BLOCK]
        return _expand(codes, scales, self.bits)[:, : self.cols].view(*ids.shape, self.cols)

    def expanded(self, first: int, last: int) -> Tensor:
        """Rows first .. last - 1 as (last - first, cols) float32; first is a multiple of 16"""
        return _expand(*self._get(first, last), self.bits)[:, : self.cols]

    def product(self, x: Tensor) -> Tensor:
        """x: (..., cols) -> (..., rows) in x's dtype"""
        native = (
            library.available() and x.device.type == "cpu" and x.dtype in library.DTYPES
            and not (torch.is_grad_enabled() and x.requires_grad)
        )  # fmt: skip
        if not native:
            parts = [F.linear(x, self.expanded(first, last).to(x.dtype)) for first, last in self._slices()]
            return torch.cat(parts, dim=-1)
        x = x.detach().contiguous()
        y = x.new_empty(*x.shape[:-1], self.rows)
        described, _ = self.described()
        library.call(
            "quantised_linear", *described, library.DTYPES[x.dtype], x.data_ptr(), x.numel() // self.cols, y.data_ptr(),
            library.threads(),
        )  # fmt: skip
        return y

    def described(self) -> tuple[Matrix, list[Tensor]]:
        if self.scale.dtype != torch.float32:  # the whole model was cast
            self.scale = self.scale.float()
        format_ = _INT8 if self.bits == 8 else _INT4
        fields = Matrix(format_, self.rows, self.cols, self.blocks.data_ptr(), self.scale.data_ptr())
        return fields, [self.blocks, self.scale]

    # -- layout: block, group, step of 4 columns, row of 16, column of 4; two steps of int4 share their bytes

    def _allocate(self, device: torch.device | str) -> None:
        self.blocks = empty(self.blocks.shape, torch.uint8, device)
        self.scale = torch.zeros(self.scale.shape, device=device)

    def _slices(self) -> Iterator[tuple[int, int]]:
        step = max(SLICE // (self.groups * GROUP) // BLOCK, 1) * BLOCK
        return ((first, min(first + step, self.rows)) for first in range(0, self.rows, step))

    def _put(self, first: int, last: int, codes: Tensor, scales: Tensor) -> None:
        """codes: (rows, cols) int8 values or uint8 levels, scales: (rows,) or (rows, groups)"""
        n, zero = -(-(last - first) // BLOCK), 128 if self.bits == 8 else 0
        x = codes.view(torch.uint8) ^ zero
        x = F.pad(x, (0, self.groups * GROUP - x.shape[1], 0, n * BLOCK - x.shape[0]), value=zero)
        x = x.view(n, BLOCK, self.groups, GROUP // 4, 4).permute(0, 2, 3, 1, 4)
        blocks = self.blocks[first // BLOCK : first // BLOCK + n]
        if self.bits == 8:
            blocks.copy_(x.reshape(n, -1))
            self.scale[first:last] = scales
            return
        blocks[:, self.scale_bytes :].copy_((x[:, :, ::2] | x[:, :, 1::2] << 4).reshape(n, -1))
        s = F.pad(scales.to(torch.bfloat16), (0, 0, 0, n * BLOCK - scales.shape[0]))
        s = s.view(n, BLOCK, self.groups).transpose(1, 2).reshape(n, -1).view(torch.uint8)
        blocks[:, : self.scale_bytes].copy_(F.pad(s, (0, self.scale_bytes - s.shape[1])))

    def _get(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """-> codes and scales of rows first .. last - 1, as `_put` takes them, padding columns included"""
        part = slice(first // BLOCK, -(-last // BLOCK))
        codes, scales = (x[part] for x in self._views())
        codes = self._unpack(codes.permute(0, 3, 1, 2, 4).flatten(0, 1)[: last - first])
        if self.bits == 8:
            return codes, self.scale[first:last]
        return codes, scales.transpose(1, 2).flatten(0, 1)[: last - first]

    def _views(self) -> tuple[Tensor, Tensor]:
        """-> codes (blocks, groups, steps, 16 rows, 4 columns), int4's scales (blocks, groups, 16 rows)"""
        codes = self.blocks[:, self.scale_bytes :].view(self.n_blocks, self.groups, -1, BLOCK, 4)
        used = self.groups * BLOCK * 2 if self.bits == 4 else 0
        return codes, self.blocks[:, :used].view(torch.bfloat16).view(self.n_blocks, -1, BLOCK)

    def _unpack(self, codes: Tensor) -> Tensor:
        """codes: (n, groups, steps, 4) -> (n, columns)"""
        if self.bits == 8:
            return (codes ^ 128).view(torch.int8).flatten(1)
        return torch.stack([codes & 15, codes >> 4], dim=-2).flatten(1)

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.cols}, bits={self.bits}"


def _quantise(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """w: (rows, cols) float32 -> what `QuantMatrix._put` takes"""
    if bits == 8:
        scale = w.abs().amax(dim=1) / 127
        return torch.round(w / scale.clamp(min=1e-30)[:, None]).to(torch.int8), scale
    w = F.pad(w, (0, -w.shape[1] % GROUP)).unflatten(1, (-1, GROUP)).contiguous()
    if not library.available() or w.device.type != "cpu":
        return _quantise_int4(w)
    levels, anchors = torch.tensor(LEVELS, dtype=torch.float32), torch.tensor(_ANCHORS)
    codes, scales = torch.empty(w.shape, dtype=torch.uint8), torch.empty(w.shape[:2], dtype=torch.bfloat16)
    library.call(
        "quantise_int4", w.data_ptr(), w.shape[0] * w.shape[1], levels.data_ptr(), anchors.data_ptr(), len(_ANCHORS),
        codes.data_ptr(), scales.data_ptr(), library.threads(),
    )  # fmt: skip
    return codes.flatten(1), scales


def _quantise_int4(w: Tensor) -> tuple[Tensor, Tensor]:
    """w: (rows, groups, 32) float32 -> codes (rows, columns), scales (rows, groups) with the least squared error"""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=w.device)
    midpoints = (levels[1:] + levels[:-1]) / 2
    top = w.gather(2, w.abs().argmax(dim=2, keepdim=True))
    best, least = torch.zeros_like(top), torch.full_like(top, torch.inf)
    codes_for = lambda inverse: torch.bucketize(w * inverse.nan_to_num(0, 0, 0), midpoints)  # noqa: E731
    for anchor in _ANCHORS:
        q = levels[codes_for(anchor / top)]
        scale = ((w * q).sum(2, keepdim=True) / q.square().sum(2, keepdim=True)).to(torch.bfloat16).float()
        error = (w - scale * levels[codes_for(1 / scale)]).square().sum(2, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return codes_for(1 / best).to(torch.uint8).flatten(1), best.squeeze(2).to(torch.bfloat16)


def _expand(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """codes: (n, columns), scales: (n,) or (n, groups) -> (n, columns) float32"""
    if bits == 8:
        return codes.float() * scales[:, None]
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=codes.device)
    return (levels[codes.int()].unflatten(1, (-1, GROUP)) * scales[..., None].float()).flatten(1)


class QuantLinear(nn.Module):
    """nn.Linear without bias, with a quantised weight."""

    def __init__(self, matrix: QuantMatrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix.product(x)


class QuantEmbedding(nn.Module):
    """nn.Embedding with a quantised weight, which the LM head may share."""

    def __init__(self, matrix: QuantMatrix, dtype: torch.dtype):
        super().__init__()
        self.matrix, self.dtype = matrix, dtype

    def forward(self, ids: Tensor) -> Tensor:
        return self.matrix.rows_of(ids).to(self.dtype)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Like torch.empty; large tensors on the CPU lie in huge pages where the system gives them, which read faster."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if torch.device(device).type != "cpu" or size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size + HUGE_PAGE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    x = torch.frombuffer(memory, dtype=torch.uint8)
    start = -x.data_ptr() % HUGE_PAGE
    return x[start : start + size].view(dtype).view(shape)


# ------------------------------------------------------------------------------------------------------- whole models


def quantize_(model: "Hymba", kind: str) -> None:
    """Replace a model's large weights by quantised ones, one at a time, in place. kind: "int8" or "int4".

    Raises `UserError` for another kind, or if the model is quantised already.
    """
    if kind not in NAMES:
        raise UserError(f"quantize={kind!r} is not supported; choose from {', '.join(NAMES)}")
    if quantisation(model):
        raise UserError(f"the model is quantised already, to {quantisation(model)}")
    _replace(model, NAMES[kind], QuantMatrix.quantise)


def quantisation(model: "Hymba") -> str | None:
    """ "int8", "int4", or None if the weights are not quantised"""
    first = model.blocks[0].heads.in_proj
    return f"int{first.matrix.bits}" if isinstance(first, QuantLinear) else None


def matrices(model: "Hymba") -> Iterator[tuple[str, QuantMatrix]]:
    """The quantised matrices of a model, a tied one once -> (name of the weight it stands for, matrix)"""
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding) and id(module.matrix) not in seen:
            seen.add(id(module.matrix))
            yield f"{name}.weight", module.matrix


def _replace(model: "Hymba", bits: int, make: Callable[[Tensor, int], QuantMatrix]) -> None:
    for block in model.blocks:
        for path, linear in [(path, x) for path, x in block.named_modules() if isinstance(x, nn.Linear)]:
            owner, _, name = path.rpartition(".")
            quantised = QuantLinear(make(linear.weight, 8 if name == "x_proj" else bits))
            setattr(block.get_submodule(owner), name, quantised)
    weight = model.embedding.weight
    embedding = make(weight, 8)
    head = embedding if model.lm_head.weight is weight else make(model.lm_head.weight, 8)
    model.embedding, model.lm_head = QuantEmbedding(embedding, weight.dtype), QuantLinear(head)


# -------------------------------------------------------------------------------------------------------- checkpoints
# `hymba.convert` stores codes under a weight's own name and scales under that name with this suffix.

SCALE_SUFFIX = "_scale"


def settings(kind: str) -> dict[str, Any]:
    """What config.json says of a quantised checkpoint."""
    shared = {"bits": NAMES[kind], "embedding_bits": 8, "x_proj_bits": 8}
    return shared if kind == "int8" else shared | {"group": GROUP, "levels": list(LEVELS)}


def parse_settings(values: Any) -> str:
    """The same read back -> kind. Raises `UserError` that names a setting which is not supported."""
    bits = values.get("bits") if isinstance(values, dict) else None
    kind = next((kind for kind, n in NAMES.items() if type(bits) is int and n == bits), None)
    if kind is None:
        raise UserError(f"quantization must be an object with bits 8 or 4, not {brief(values)}")
    expected = settings(kind)
    for key in sorted(set(values) | set(expected)):
        if values.get(key) != expected.get(key):
            raise UserError(
                f"quantization: {key}={brief(values.get(key))} is not supported, "
                f"only {expected.get(key)}; convert the original checkpoint with this version"
            )
    return kind


def prepare(model: "Hymba", kind: str, dtype: torch.dtype) -> None:
    """Make a model without storage (device "meta") one whose quantised matrices are then loaded.

    dtype: what it computes in
    """
    _replace(model, NAMES[kind], lambda weight, bits: QuantMatrix(bits, *weight.shape))
    model.embedding.dtype = dtype
