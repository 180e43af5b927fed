"""The operations of `reference.py` in plain PyTorch, for any device and floating type: what runs where no kernel does.

Float32 inside, gradients by autograd. Against the reference, the scan takes O(sqrt T) steps of Python instead of T, and
attention looks only at the keys between the first and the last that a block of queries may see. Both recompute in the
backward pass, so that memory is linear in T.

    B batch, T time, E inner width, N state, H query heads, G key/value heads, S keys
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hymba.ops.reference import causal_conv, mean_of_norms, rms_norm
from hymba.visibility import KeyValue, same_document, visible

__all__ = ["attention", "causal_conv", "mean_of_norms", "rms_norm", "selective_scan"]

# steps of the scan whose states are held at once in the backward pass, (B, SEGMENT, E, N) floats
SEGMENT = 256
# queries that look at keys together
QUERIES = 128


def _recomputed(function, *args):
    if torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
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
    shapes cannot depend on values"""
    if torch.compiler.is_compiling():
        return slice(0, see.shape[2])
    keys = see.any(0).any(0).nonzero()
    return slice(int(keys[0]), int(keys[-1]) + 1) if len(keys) else slice(0, 0)


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
