"""The operations of `reference.py` on a GPU, as Triton kernels; float32, bfloat16 and float16, gradients included. The
scan of enough rows in bfloat16, or in float32 without gradients, and the matrix-vector products of decoding on cards
since Hopper are in CUDA C++, which the compiler that comes with PyTorch (NVRTC) compiles when it is first called.

What `torch.compile` meets is PyTorch's own, or an operator (`torch.ops.hymba_gpu`), so it takes the model whole. A file
for each family says what it computes, how it is tiled and what is float32: scan and selection, conv, norm, flash and
flex (attention; blocks and join stand before them, and hopper beside flash, in Gluon), decode, elementwise, loss;
slices lets kernels write gradients where they belong; step is a decoding step of the CUDA graph.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.ops import chunked, reference
from hymba.ops.chunked import ssd  # noqa: F401  Mamba-2 is made of matrix products, which are PyTorch's
from hymba.ops.gpu import flash, flex, slices
from hymba.ops.gpu.common import needs_grad
from hymba.ops.gpu.conv import FAR, BranchConv, conv_forward
from hymba.ops.gpu.decode import decode_attention
from hymba.ops.gpu.elementwise import GatedLinear, gated_silu_forward, rotate_forward
from hymba.ops.gpu.loss import cross_entropy_  # noqa: F401
from hymba.ops.gpu.norm import BranchNorm, MeanOfNorms, rms_norm_forward
from hymba.ops.gpu.scan import scan_forward
from hymba.ops.gpu.selection import Selection
from hymba.visibility import KeyValue

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# pairs of a query and a key, of all rows, up to which plain PyTorch does: a short prompt shall not wait for a compiler
FEW = 2**20
# the same for rows of so few keys that blocks leave out little
SHORT, MANY = 640, 16


def supports(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in DTYPES


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if weight.dim() > 1 or torch.compiler.is_compiling():  # one weight for each head: rare and small; or fused
        return reference.rms_norm(x, weight, eps)
    return rms_norm_forward(x, weight, eps)


def branch_norm(x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        return reference.branch_norm(x, weight, eps, added)
    return BranchNorm.apply(x, weight, eps, added)


def selection(
    x: Tensor, weight: Tensor | None, dt_weight: Tensor, norms: Sequence[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if torch.compiler.is_compiling():
        return reference.selection(x, weight, dt_weight, norms, eps)
    return Selection.apply(x, weight, dt_weight, _product_type(x), eps, *norms)


def _product_type(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def mean_of_norms(
    attn: Sequence[Tensor], ssm: Sequence[Tensor], attn_weight: Tensor, ssm_weight: Tensor, eps: float
) -> Tensor:
    if torch.compiler.is_compiling():  # its neighbours are fused with it
        return reference.mean_of_norms(attn, ssm, attn_weight, ssm_weight, eps)
    return MeanOfNorms.apply(eps, attn_weight, ssm_weight, *attn, *ssm)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, starts: Tensor | None = None) -> Tensor:
    return conv_forward(x, weight, bias, state, _age(starts))


def branch_conv(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        y = causal_conv(x, weight, bias, state, starts)
        return y, y
    return BranchConv.apply(x, weight, bias, state, _age(starts))


def _age(starts: Tensor | None) -> Tensor | None:
    """starts: (B, T) bool -> (B, T) int32, how many steps ago the document began"""
    if starts is None:
        return None
    time = torch.arange(starts.shape[1], device=starts.device)
    return (time - torch.where(starts, time, -FAR).cummax(dim=1).values).to(torch.int32)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    gate: Tensor,
    state: Tensor,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    keep = needs_grad(u, dt, dt_bias, A, B, C, D, gate, state)
    y, last, _ = scan_forward(u, dt, dt_bias, A.float(), B, C, D, gate, state.float(), starts, lengths, keep)
    return y, last


def attention(
    q: Tensor,
    positions: Tensor,
    documents: Tensor | None,
    sources: Sequence[KeyValue],
    window: int | None,
    n_meta: int,
    scale: float,
) -> Tensor:
    learns = needs_grad(q, *(x for source in sources for x in source[:2]))
    if q.shape[2] == 1 and documents is None and len(sources) <= 2 and not learns:
        return decode_attention(q, positions, sources, window, n_meta, scale)
    kernel = flex if torch.compiler.is_compiling() else _attention_kernel(q, sources, learns)
    return kernel.attention(q, positions, documents, sources, window, n_meta, scale)


def _attention_kernel(q: Tensor, sources: Sequence[KeyValue], learns: bool) -> ModuleType:
    keys = sum(source.k.shape[2] for source in sources)
    most = FEW * MANY if keys <= SHORT else FEW
    few = q.shape[0] * q.shape[2] * keys <= most
    # in training all wait for compilers once, and plain PyTorch takes dozens of small kernels
    if flash.supports(q, sources) and (learns or not few):
        return flash
    return chunked if few else flex


def split(x: Tensor, widths: Sequence[int], shapes: Sequence[tuple[int, int]]) -> list[tuple[Tensor, ...]]:
    if torch.compiler.is_compiling() or not needs_grad(x):
        return reference.split(x, widths, shapes)
    return slices.split(x, widths, shapes)


def heads(x: Tensor, count: int) -> Tensor:
    if torch.compiler.is_compiling():
        return reference.heads(x, count)
    return slices.heads(x, count)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or x.shape[-1] % 2:
        return reference.rotate(x, cos, sin)
    return rotate_forward(x, cos, sin)


def gated_linear(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return reference.gated_linear(x, gate, up)
    if not needs_grad(x, gate, up):
        return gated_silu_forward(F.linear(x, gate), F.linear(x, up))
    return GatedLinear.apply(x.to(_product_type(x)), gate, up)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return reference.gated_silu(gate, up)
    return gated_silu_forward(gate, up)
