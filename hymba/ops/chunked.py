"""The operations of `reference.py` in plain PyTorch, for any device and floating type: what runs where no kernel does.

Float32 inside, gradients by autograd. Against the reference, the scan takes O(sqrt T) steps of Python instead of T, the
recurrence of Mamba-2 becomes matrix products of chunks, and attention looks only at the keys between the first and the
last that a block of queries may see. All recompute in the backward pass, so that memory is linear in T.

    B batch, T time, E inner width, N state, H query heads, G key/value heads, S keys; `ssd`: S heads of P channels
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hymba.ops.reference import (
    branch_conv,
    branch_norm,
    causal_conv,
    cross_entropy_,
    float32_inside,
    gated_linear,
    gated_silu,
    heads,
    mean_of_norms,
    rms_norm,
    rotate,
    selection,
    split,
)
from hymba.visibility import KeyValue, same_document, visible

__all__ = [
    "attention", "branch_conv", "branch_norm", "causal_conv", "cross_entropy_", "gated_linear", "gated_silu", "heads",
    "mean_of_norms", "rms_norm", "rotate", "selection", "selective_scan", "split", "ssd",
]  # fmt: skip

# steps of the scan whose states are held at once in the backward pass, (B, SEGMENT, E, N) floats
SEGMENT = 256
# steps of `ssd` that are recomputed together in the backward pass, and steps of a chunk
SSD_SEGMENT, SSD_CHUNK = 1024, 64
# queries that look at keys together
QUERIES = 128


def _recomputed(function, *args):
    if torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # nothing is random
    return function(*args)


def selective_scan(u, dt, dt_bias, A, B, C, D, gate, state, starts=None, lengths=None) -> tuple[Tensor, Tensor]:
    T = u.shape[1]
    first = state.float().expand(u.shape[0], -1, -1)
    delta = F.softplus(dt.float() + dt_bias.float())  # (B, T, E)
    if lengths is not None:
        inside = torch.arange(T, device=u.device) < lengths[:, None]
        delta = delta * inside[..., None]
    drive = delta * u.float()
    h, outputs = first, []
    for t in range(0, T, SEGMENT):
        part = slice(t, min(t + SEGMENT, T))
        y, h = _recomputed(
            _scan_segment, delta[:, part], drive[:, part], A.float(), B[:, part].float(), C[:, part].float(), h, first,
            None if starts is None else starts[:, part],
        )  # fmt: skip
        outputs.append(y)
    y = torch.cat(outputs, dim=1) + u.float() * D.float()
    return (y * F.silu(gate.float())).to(u.dtype), h


def _scan_segment(delta, drive, A, B, C, h, first, starts) -> tuple[Tensor, Tensor]:
    """Chunks of the segment run side by side from zero states, then each gets what the chunks before it left.

    Within a chunk, the state before it has decayed by exp(A sum delta) at step t, which cannot overflow.

    -> (B, T, E) sum over states of C h, (B, E, N) the last state
    """
    rows, T, E = delta.shape
    L = math.ceil(math.sqrt(T))  # steps of a chunk, and about the number of chunks
    count = -(-T // L)
    # padding with delta = 0 leaves states alone
    chunk = lambda x: F.pad(x, (0, 0, 0, count * L - T)).unflatten(1, (count, L))  # noqa: E731
    delta, drive, B, C = chunk(delta), chunk(drive), chunk(B), chunk(C)
    if starts is not None:
        starts = F.pad(starts, (0, count * L - T)).unflatten(1, (count, L))
    local = delta.new_zeros(rows, count, E, A.shape[1])
    passed = torch.ones_like(local)  # which part of the state before the chunk is left
    outputs, left = [], []
    for t in range(L):
        decay = torch.exp(delta[:, :, t, :, None] * A)  # (B, chunks, E, N)
        if starts is not None:
            begins = starts[:, :, t, None, None]
            local = torch.where(begins, first[:, None], local)
            passed = torch.where(begins, 0, passed)
        passed = passed * decay
        local = decay * local + drive[:, :, t, :, None] * B[:, :, t, None]
        outputs.append((local * C[:, :, t, None]).sum(-1))
        left.append(passed)
    before = []
    for c in range(count):
        before.append(h)
        h = local[:, c] + passed[:, c] * h
    before = torch.stack(before, dim=1)
    outputs = [y + (p * before * C[:, :, t, None]).sum(-1) for t, (y, p) in enumerate(zip(outputs, left, strict=True))]
    return torch.stack(outputs, dim=2).flatten(1, 2)[:, :T], h


def ssd(x, dt, dt_bias, A, B, C, D, gate, state, starts=None, lengths=None) -> tuple[Tensor, Tensor]:
    T = x.shape[1]
    first = state.float().expand(x.shape[0], -1, -1, -1)
    delta = F.softplus(dt.float() + dt_bias.float())  # (B, T, S)
    if lengths is not None:
        inside = torch.arange(T, device=x.device) < lengths[:, None]
        delta = delta * inside[..., None]
    drive = delta[..., None] * x.float()
    h, outputs = first, []
    for t in range(0, T, SSD_SEGMENT):
        part = slice(t, min(t + SSD_SEGMENT, T))
        y, h = _recomputed(
            _ssd_segment, delta[:, part] * A.float(), drive[:, part], B[:, part].float(), C[:, part].float(), h, first,
            None if starts is None else starts[:, part],
        )  # fmt: skip
        outputs.append(y)
    y = torch.cat(outputs, dim=1) + x.float() * D.float()[:, None]
    return (y * F.silu(gate.float())).to(x.dtype), h


@float32_inside
def _ssd_segment(rate, drive, B, C, h, first, starts) -> tuple[Tensor, Tensor]:
    """The block decomposition of Dao and Gu (section 6): products within chunks, a recurrence from chunk to chunk.

    `kept` (B, chunks, S, t, s) is what is left at step t of what came in at step s. It is the exponential of sums that
    begin at s: differences of sums that begin at the chunk would lose digits, and of ratios overflow.

    rate: (B, T, S) delta A, drive: (B, T, S, P) delta x -> (B, T, S, P) h C, (B, S, P, N) the last state
    """
    T = rate.shape[1]
    L = min(T, SSD_CHUNK)
    count = -(-T // L)
    # padding with rate = drive = 0 leaves states alone
    chunk = lambda x: F.pad(x, (0, 0) * (x.dim() - 2) + (0, count * L - T)).unflatten(1, (count, L))  # noqa: E731
    rate, drive, B, C = chunk(rate).transpose(2, 3), chunk(drive).transpose(2, 3), chunk(B), chunk(C)
    later = torch.ones(L, L, dtype=torch.bool, device=rate.device).tril(-1)  # (t, s), t > s
    sums = rate[..., None].expand(*rate.shape, L).masked_fill(~later, 0).cumsum(-2)  # over s < r <= t
    same = later | torch.eye(L, dtype=torch.bool, device=rate.device)
    passed = rate.cumsum(-1).exp()[..., None]  # (B, chunks, S, t, 1): of the state before the chunk
    if starts is not None:
        document = chunk(starts[..., None])[..., 0].cumsum(-1)  # (B, chunks, L) counted in the chunk
        same = (same & (document[..., :, None] == document[..., None, :]))[:, :, None]
        passed = passed * (document == 0)[:, :, None, :, None]
    kept = sums.exp().masked_fill(~same, 0)
    y = (kept * (C @ B.mT)[:, :, None]) @ drive  # (B, chunks, S, L, P)
    # what the chunk itself leaves
    left = (kept[..., -1, :, None] * drive).mT @ B[:, :, None]  # (B, chunks, S, P, N)
    restart = None
    if starts is not None:
        # a document's first step finds the state `first`, and decays it
        begins = chunk(starts[..., None])[:, :, None] * rate.exp()[..., None]  # (B, chunks, S, L, 1)
        restart = kept @ begins
        left = left + restart[..., -1, :, None] * first[:, None]
    before = []
    for c in range(count):
        before.append(h)
        h = left[:, c] + passed[:, c, :, -1, :, None] * h
    before = torch.stack(before, dim=1)  # (B, chunks, S, P, N)
    y = y + passed * (C[:, :, None] @ before.mT)
    if restart is not None:
        y = y + restart * (C[:, :, None] @ first[:, None].mT)
    return y.transpose(2, 3).flatten(1, 2)[:, :T], h


def attention(q, positions, documents, sources: Sequence[KeyValue], window, n_meta, scale) -> Tensor:
    outputs = []
    for t in range(0, q.shape[2], QUERIES):
        part = slice(t, t + QUERIES)
        owners = None if documents is None else documents[:, part]
        seen = []
        for source in sources:
            see = visible(positions[:, part], source.positions, window, n_meta)  # (B or 1, T', S)
            if owners is not None and source.documents is not None:
                see = see & same_document(owners, source.documents)
            span = _span(see)
            if span.stop > span.start:
                seen += [source.k[:, :, span], source.v[:, :, span], see[:, :, span]]
        if seen:
            outputs.append(_recomputed(_attend, q[:, :, part], scale, *seen))
        else:
            outputs.append(q.new_zeros(q.shape[0], q[:, :, part].shape[2], q.shape[1] * sources[0].v.shape[3]))
    return torch.cat(outputs, dim=1)


def _span(see: Tensor) -> slice:
    """see: (B, T, S) bool -> from the first to the last key that any query sees; all of them in a compiled graph, whose
    shapes cannot depend on values, and on a GPU, which would have to be waited for"""
    if torch.compiler.is_compiling() or see.is_cuda:
        return slice(0, see.shape[2])
    keys = see.any(0).any(0).nonzero()
    return slice(int(keys[0]), int(keys[-1]) + 1) if len(keys) else slice(0, 0)


@float32_inside
def _attend(q, scale, *seen) -> Tensor:
    """seen: k, v (B or 1, G, S, d) and the mask (B or 1, T, S) of each source -> (B, T, H dv)"""
    B, _, T, _ = q.shape
    G = seen[0].shape[1]
    grouped = q.float().unflatten(1, (G, -1)).flatten(2, 3) * scale  # (B, G, R T, dk): the heads of a group are rows
    scores = []
    for k, see in zip(seen[0::3], seen[2::3], strict=True):
        score = (grouped @ k.float().transpose(-1, -2)).unflatten(2, (-1, T))  # (B, G, R, T, S)
        scores.append(score.masked_fill(~see[:, None, None], torch.finfo(torch.float32).min))
    weights = torch.softmax(torch.cat(scores, dim=-1), dim=-1).flatten(2, 3)
    parts = weights.split([k.shape[2] for k in seen[0::3]], dim=-1)
    y = sum(w @ v.float() for w, v in zip(parts, seen[1::3], strict=True))  # (B, G, R T, dv)
    return y.unflatten(2, (-1, T)).movedim(3, 1).reshape(B, T, -1).to(q.dtype)
