"""Calls the matrix-vector product in CUDA C++ (gemv.cu); `step.gemv` has its forms, and a Triton kernel otherwise."""

from pathlib import Path

import torch
import triton
from torch import Tensor

from hymba.ops.gpu import cuda
from hymba.ops.gpu.common import INTERPRET

SOURCE = Path(__file__).with_name("gemv.cu")
WARPS, WARP = 4, 32  # of a block, lanes of a warp
TILE = 25600  # bytes of weights that a block holds: eight blocks on a multiprocessor of an H100
SUMS = 8  # of a thread at most: one for each row of each matrix


def fits(x, x_norm, x2, squares, heads, w, w2, residual, y, rows, eps) -> bool:
    """Whether gemv.cu computes this: a card with bulk copies; one type, float32 or bfloat16; whole pieces of 16 bytes,
    and rows that a block holds."""
    pieces = [v for v in (x, x_norm, x2, w, w2) if v is not None]
    row = w.shape[1] * w.itemsize
    return (
        w.is_cuda and not INTERPRET and w.dtype in (torch.float32, torch.bfloat16)
        and all(v.dtype == w.dtype and v.data_ptr() % 16 == 0 for v in pieces)
        and (residual is None or residual.dtype == w.dtype) and y.dtype in (w.dtype, torch.float32)
        and row % 16 == 0 and row * (1 if w2 is None else 2) <= TILE
        and torch.cuda.get_device_capability(w.device) >= (9, 0) and cuda.available()
    )  # fmt: skip


def gemv(arguments: tuple[Tensor | int | float | None, ...], form: dict[str, int], early: bool) -> None:
    """arguments: as of `fits`, form: NORM, MEAN, ACTIVATION and RESIDUAL, early: as in `step.gemv`"""
    *_, w, w2, _, y, rows, _ = arguments
    K, matrices = w.shape[1], 1 if w2 is None else 2
    together = min(SUMS // matrices, TILE // (matrices * K * w.itemsize))
    together = 1 << (together.bit_length() - 1)  # a power of two
    macros = {
        "TYPE": int(w.dtype == torch.bfloat16), "OUT": int(y.dtype == w.dtype), "K": K, "ROWS": together,
        "WARPS": WARPS, **form,
    }  # fmt: skip
    shared = matrices * together * K * w.itemsize
    cuda.launch(
        SOURCE, "gemv", macros, triton.cdiv(rows, together), WARPS * WARP, shared, list(arguments), overlap=early
    )
