"""Calls the selective scan's kernels in CUDA C++ (scan.cu); `scan.py` has the mathematics, and kernels for the rest.

They take 16 states and bfloat16, or float32 if no gradients are wanted. u, dt and gate may be views whose rows are any
multiple of 16 bytes apart. float32: delta, decays, states; y and gradients are sums of products in bfloat16.
"""

from pathlib import Path

import torch
import triton
from torch import Tensor

from hymba.ops.gpu import cuda
from hymba.ops.gpu.common import INTERPRET, add_up, state_row, strides

SOURCE = Path(__file__).with_name("scan.cu")
GROUP = 8  # steps between kept states, as in the source
WARPS, WARP, TILE = 4, 32, 16  # of a block, lanes of a warp, channels of a warp
THREADS, CHANNELS = WARPS * WARP, WARPS * TILE
BLOCKS = 3  # on a multiprocessor
# Chains (64 channels of a row) for each multiprocessor at least, or else at most so many steps: with fewer chains and
# more steps the kernels of scan.py are faster, which walk in segments of time side by side (1 x 8192 tokens of 3200
# channels on an H100: 582 us against 659)
LEAST, SHORT = 1.0, 512
# bytes of `Shared`, a block's memory: inputs; decays and kept states of each thread; deltas and parts of the gradients
# of B and C of each warp
STAGE_BYTES = (4 * CHANNELS + 2 * 16) * GROUP * 2  # four inputs, and B and C
BACKWARD_SHARED = 2 * STAGE_BYTES + THREADS * (GROUP * 2 + 2 * 2) * 16 + WARPS * 32 * (1 + 2 * 2) * 16


def fits(u: Tensor, dt: Tensor, gate: Tensor, A: Tensor, keep: bool) -> bool:
    """Whether the kernels of scan.cu compute this: bfloat16, or float32 without gradients, and enough channels."""
    E, N = A.shape
    chains = u.shape[0] * triton.cdiv(E, CHANNELS)
    return (
        u.is_cuda and not INTERPRET and N == 16 and E % 8 == 0 and u.dtype == dt.dtype == gate.dtype
        and (u.dtype == torch.bfloat16 or (u.dtype == torch.float32 and not keep))
        and max(x.shape[i] * x.stride(i) * x.itemsize for x in (u, dt, gate) for i in (0, 1)) < 2**32
        # indices of 32 bits: outputs, kept states, gradients of B and C, states
        and u.shape[0] * 4 * max(u.shape[1] * max(E, 8 * N), 2 * (u.shape[1] + GROUP) * E, N * E) < 2**32
        and torch.cuda.get_device_capability(u.device) >= (8, 0) and cuda.available()
        and (u.shape[1] <= SHORT or chains >= LEAST * torch.cuda.get_device_properties(u.device).multi_processor_count)
    )  # fmt: skip


def kept(u: Tensor, N: int) -> tuple[int, ...]:
    """Shape of what the forward pass keeps: the state in front of every group of steps, as threads hold it."""
    rows, T, E = u.shape
    return rows, triton.cdiv(E, CHANNELS), triton.cdiv(T, GROUP), CHANNELS, N


def _in_pieces(x: Tensor) -> Tensor:
    """x with rows of steps that begin at multiples of 16 bytes."""
    piece = 16 // x.itemsize
    fits = x.stride(2) == 1 and x.stride(0) % piece == x.stride(1) % piece == 0 and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _parameters(*tensors: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Of one type, which is `dtype` or float32."""
    return [x.contiguous() if all(y.dtype == dtype for y in tensors) else x.float().contiguous() for x in tensors]


def _whole(starts: Tensor | None, lengths: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return None if starts is None else starts.contiguous(), None if lengths is None else lengths.long().contiguous()


def _room(device: torch.device) -> int:
    """Blocks that are on the card at a time."""
    return BLOCKS * torch.cuda.get_device_properties(device).multi_processor_count


def _stretches(chains: int, T: int, device: torch.device) -> tuple[int, int]:
    """Blocks, and the steps of each: whole groups, and no fewer than a chain has."""
    blocks, groups = min(chains, _room(device)), triton.cdiv(T, GROUP)
    return blocks, triton.cdiv(chains * groups, blocks) * GROUP


def forward(u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths, keep, y, last, kept):
    """Writes y (B, T, E), last (B, E, N), and kept, if `keep`."""
    u, dt, gate = (_in_pieces(x) for x in (u, dt, gate))
    # under autocast B and C may be float32; the matrix unit takes them as bfloat16
    B, C = (_in_pieces(x.to(u.dtype).contiguous()) for x in (B, C))
    A, state = A.contiguous(), state.contiguous()
    dt_bias, D = _parameters(dt_bias, D, dtype=u.dtype)
    starts, lengths = _whole(starts, lengths)
    rows, T, E = u.shape
    per_row = triton.cdiv(E, CHANNELS)
    chains = rows * per_row
    blocks, stretch = _stretches(chains, T, u.device)
    carry = torch.empty(chains, 2, THREADS, 4, dtype=torch.float32, device=u.device)
    flags = torch.zeros(chains, dtype=torch.int32, device=u.device)
    cuda.launch(
        SOURCE, "scan_forward", _macros(u, dt_bias, starts, keep), blocks, THREADS, 0,
        [u, dt, gate, B, C, dt_bias, A, D, state, starts, lengths, y, last, kept, carry, flags, rows, T, E,
         *strides(u, dt, gate), state_row(state), per_row, stretch],
    )  # fmt: skip


def _macros(u: Tensor, parameter: Tensor, starts: Tensor | None, keep: bool) -> dict[str, int]:
    half = int(u.dtype == torch.bfloat16)
    return {"TYPE": half, "PARAM": int(half and parameter.dtype == u.dtype), "STARTS": int(starts is not None),
            "KEEP": int(keep)}  # fmt: skip


def backward(u, dt, dt_bias, A, B, C, D, gate, state, starts, lengths, kept, dy, dlast, dgate=None):
    """dgate: where the gradient of the gate shall be written, strided as the gate may be
    -> gradients of u, dt, dt_bias, A, B, C, D, gate, state"""
    like = dt_bias, B, C, D
    u, dt, gate, dy = (_in_pieces(x) for x in (u, dt, gate, dy))
    B, C = (_in_pieces(x.to(u.dtype).contiguous()) for x in (B, C))
    A, state = A.contiguous(), state.contiguous()
    dt_bias, D = _parameters(dt_bias, D, dtype=u.dtype)
    starts, lengths = _whole(starts, lengths)
    (rows, T, E), N = u.shape, A.shape[1]
    per_row = triton.cdiv(E, CHANNELS)
    chains = rows * per_row
    blocks, stretch = _stretches(chains, T, u.device)
    f32 = {"dtype": torch.float32, "device": u.device}
    du, ddt = (torch.empty(rows, T, E, dtype=u.dtype, device=u.device) for _ in range(2))
    dgate = torch.empty_like(du) if dgate is None else dgate
    dBC = torch.empty(per_row, 2, rows, T, N, **f32)
    dA = torch.empty(rows, E, N, **f32)
    dstate = torch.empty_like(dA) if starts is None else torch.zeros_like(dA)
    dD, dbias = (torch.empty(rows, E, **f32) for _ in range(2))
    carry = torch.empty(chains, 5, THREADS, 4, **f32)
    flags = torch.zeros(chains, dtype=torch.int32, device=u.device)
    cuda.launch(
        SOURCE, "scan_backward", _macros(u, dt_bias, starts, False), blocks, THREADS, BACKWARD_SHARED,
        [u, dt, gate, B, C, dt_bias, A, D, state, starts, lengths, kept, dy, dlast.contiguous(), du, ddt, dgate, dBC,
         dbias, dA, dD, dstate, carry, flags, rows, T, E, *strides(u, dt, gate, dy, dgate), state_row(state), per_row,
         stretch],
    )  # fmt: skip
    if state.shape[0] != rows:
        (dstate,) = add_up(dstate, state)
    (dbias,), dBC, (dD,), (dA,) = add_up(dbias, like[0]), add_up(dBC, *like[1:3]), add_up(dD, like[3]), add_up(dA, A)
    return du, ddt, dbias, dA, *dBC, dD, dgate, dstate
