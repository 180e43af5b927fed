"""The definition of every operation: plain PyTorch, float32 inside, as close to the papers' formulas as it gets.

Kernels are optimisations of these functions and have their signatures. Gradients are autograd's.

    B batch, T time, E inner width, N state, K conv width, H query heads, G key/value heads, S keys
    dk size of a query or key head, dv size of a value head; `ssd`: S heads of P channels
"""

from collections.abc import Callable, Sequence
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.visibility import KeyValue, same_document, visible


def float32_inside(function: Callable) -> Callable:
    """Autocast would round the factors of matrix products: an operation decides about its types itself."""

    @wraps(function)
    def call(x: Tensor, *arguments):
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *arguments)

    return call


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension (Zhang and Sennrich, 2019).

    x: (..., D), weight: (D,) or any shape that broadcasts -> (..., D) in x's dtype. The statistics are float32; the
    result is rounded before it is multiplied by the weight, as in the released implementation.
    """
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def branch_norm(
    x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None, *, norm: Callable[..., Tensor] = rms_norm
) -> tuple[Tensor, Tensor]:
    """RMSNorm in front of a branch with a residual beside it.

    x: (..., D), added: (..., D), what the branch before gave, if there was one; norm: a backend's own
    -> normed sum, and the sum
    """
    x = x if added is None else x + added
    return norm(x, weight, eps), x


def selection(
    x: Tensor, weight: Tensor | None, dt_weight: Tensor, norms: Sequence[Tensor], eps: float, *,
    norm: Callable[..., Tensor] = rms_norm,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What the scan selects by (Mamba, section 3.2), normed: dt, B and C.

    x: (B, T, E), weight: (rank + 2 N, E), or None where x is their product already, (B, T, rank + 2 N),
    dt_weight: (E, rank), norms: weights of the RMSNorms of dt, B and C, norm: a backend's own
    -> dt before its bias (B, T, E), B and C (B, T, N)
    """
    low = x if weight is None else F.linear(x, weight)
    slices = zip(low.split([w.shape[0] for w in norms], dim=-1), norms, strict=True)
    dt, B, C = (norm(piece, w, eps) for piece, w in slices)
    return F.linear(dt, dt_weight), B, C


def mean_of_norms(
    attn: Sequence[Tensor], ssm: Sequence[Tensor], attn_weight: Tensor, ssm_weight: Tensor, eps: float
) -> Tensor:
    """Fusion of the two branches (paper, equation 3, with the learned magnitudes as norm weights).

    attn, ssm: (B, T, E) of each part of a call, weights: (E,) -> (R, E), all rows of all parts
    """
    return (rms_norm(rows_of(attn), attn_weight, eps) + rms_norm(rows_of(ssm), ssm_weight, eps)) / 2


def rows_of(parts: Sequence[Tensor]) -> Tensor:
    """One part's rows behind the other's. parts: (B, T, E) each -> (R, E)"""
    rows = [part.flatten(0, 1) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, starts: Tensor | None = None) -> Tensor:
    """Depthwise causal convolution over time, then SiLU.

    x: (B, T, E), weight: (E, K), bias: (E,), state: (B or 1, K - 1, E) the inputs before x, newest last,
    starts: (B, T) bool, where a document starts: the inputs before it are `state`, not its neighbour's
    -> (B, T, E)
    """
    K, T = weight.shape[1], x.shape[1]
    state = state.to(x.dtype).expand(x.shape[0], -1, -1)
    past = torch.cat([state, x], dim=1)  # (B, K - 1 + T, E)
    age = None if starts is None else _since_start(starts, K)
    y = bias.float() + x.float() * weight[:, K - 1].float()
    for back in range(1, K):
        tap = past[:, K - 1 - back : K - 1 - back + T]  # the input `back` steps ago
        if age is not None:
            # `age` steps into a document, an input from before its start is one of `state`'s
            slot = (K - 1 - back + age).clamp(max=K - 2)
            before = state.gather(1, slot[..., None].expand_as(x))
            tap = torch.where((age < back)[..., None], before, tap)
        y = y + tap.float() * weight[:, K - 1 - back].float()
    return F.silu(y).to(x.dtype)


def branch_conv(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, starts: Tensor | None = None, *,
    conv: Callable[..., Tensor] = causal_conv,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`causal_conv` in front of a branch: its output for the branch, and once more for what stands beside it. conv: a
    backend's own"""
    y = conv(x, weight, bias, state, starts)
    return y, y


def _since_start(starts: Tensor, far: int) -> Tensor:
    """starts: (B, T) bool -> (B, T), how many steps ago the document began; before any start, at least `far`."""
    time = torch.arange(starts.shape[1], device=starts.device)
    last = torch.where(starts, time, -far).cummax(dim=1).values
    return time - last


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
    """Selective state space recurrence (Gu and Dao, "Mamba", arXiv 2312.00752, algorithm 2), gated.

        delta = softplus(dt + dt_bias)
        h     = exp(delta A) h + delta B u
        y     = (C h + D u) SiLU(gate)

    u, dt, gate: (B, T, E), dt_bias, D: (E,), A: (E, N) negative, B, C: (B, T, N),
    state: (B or 1, E, N) float32, the state before the first step,
    starts: (B, T) bool, where a document starts: the recurrence starts again from `state`,
    lengths: (B,), steps from there on are padding and leave the state alone
    -> y: (B, T, E) in u's dtype, last state: (B, E, N) float32
    """
    first = state.float().expand(u.shape[0], -1, -1)
    delta = F.softplus(dt.float() + dt_bias.float())  # (B, T, E)
    if lengths is not None:
        inside = torch.arange(u.shape[1], device=u.device) < lengths[:, None]
        delta = delta * inside[..., None]  # delta = 0 is the identity: h = exp(0) h + 0
    drive = delta * u.float()
    h, outputs = first, []
    for t in range(u.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, t, None, None], first, h)
        decay = torch.exp(delta[:, t, :, None] * A.float())  # (B, E, N)
        h = decay * h + drive[:, t, :, None] * B[:, t, None].float()
        outputs.append((h * C[:, t, None].float()).sum(-1))
    y = torch.stack(outputs, dim=1) + u.float() * D.float()
    return (y * F.silu(gate.float())).to(u.dtype), h


def ssd(
    x: Tensor,
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
    """The recurrence of Mamba-2 (Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, equation 2), gated.

        delta = softplus(dt + dt_bias)
        h     = exp(delta A) h + delta x B^T
        y     = (h C + D x) SiLU(gate)

    `selective_scan` in which delta, A and D are one number for all channels and states of a head.

    x, gate: (B, T, S, P), dt: (B, T, S), dt_bias, A, D: (S,), A negative, B, C: (B, T, N),
    state: (B or 1, S, P, N) float32, the state before the first step; starts, lengths: as in `selective_scan`
    -> y: (B, T, S, P) in x's dtype, last state: (B, S, P, N) float32
    """
    first = state.float().expand(x.shape[0], -1, -1, -1)
    delta = F.softplus(dt.float() + dt_bias.float())  # (B, T, S)
    if lengths is not None:
        inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        delta = delta * inside[..., None]
    drive = delta[..., None] * x.float()
    h, outputs = first, []
    for t in range(x.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, t, None, None, None], first, h)
        decay = torch.exp(delta[:, t] * A.float())  # (B, S)
        h = decay[..., None, None] * h + drive[:, t, :, :, None] * B[:, t, None, None].float()
        outputs.append((h * C[:, t, None, None].float()).sum(-1))
    y = torch.stack(outputs, dim=1) + x.float() * D.float()[:, None]
    return (y * F.silu(gate.float())).to(x.dtype), h


@float32_inside
def attention(
    q: Tensor,
    positions: Tensor,
    documents: Tensor | None,
    sources: Sequence[KeyValue],
    window: int | None,
    n_meta: int,
    scale: float,
) -> Tensor:
    """Grouped-query attention over keys that lie in several places: meta tokens, the cache, the new tokens.

    q: (B, H, T, dk), positions: (B or 1, T), documents: (B, T) or None, sources: see `KeyValue`; `visible` says which
    query sees which key; query head h reads key head h G / H (Ainslie et al., arXiv 2305.13245)
    -> (B, T, H dv). A query that sees nothing (padding) gets some finite value.
    """
    B, H = q.shape[:2]
    G = sources[0].k.shape[1]
    grouped = q.float().unflatten(1, (G, H // G))  # (B, G, R, T, dk)
    scores = []
    for source in sources:
        see = visible(positions, source.positions, window, n_meta)  # (B or 1, T, S)
        if documents is not None and source.documents is not None:
            see = see & same_document(documents, source.documents)
        score = torch.einsum("bgrtd,bgsd->bgrts", grouped, source.k.float().expand(B, -1, -1, -1))
        scores.append(score.masked_fill(~see[:, None, None], torch.finfo(torch.float32).min))
    weights = torch.softmax(torch.cat(scores, dim=-1) * scale, dim=-1)
    y, first = 0, 0
    for source in sources:
        S = source.k.shape[2]
        value = source.v.float().expand(B, -1, -1, -1)
        y = y + torch.einsum("bgrts,bgsd->btgrd", weights[..., first : first + S], value)
        first += S
    return y.flatten(2).to(q.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half form of RoPE. x: (B, heads, T, dk), cos, sin: (B or 1, 1, T, dk), equal in both halves -> as x"""
    left, right = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-right, left], dim=-1) * sin.to(x.dtype)


def split(x: Tensor, widths: Sequence[int], shapes: Sequence[tuple[int, int]]) -> list[tuple[Tensor, ...]]:
    """Slices of each part of a call.

    x: (R, sum of widths), shapes: (B, T) of the parts whose rows stand one behind the other, R rows together
    -> for each part its slices, (B, T, width)
    """
    parts = x.split([rows * steps for rows, steps in shapes])
    return [part.unflatten(0, shape).split(widths, dim=-1) for part, shape in zip(parts, shapes, strict=True)]


def heads(x: Tensor, count: int) -> Tensor:
    """x: (B, T, count d) -> (B, count, T, d)"""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def gated_linear(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate x) (up x), the first half of a gated MLP. x: (..., D), gate, up: (F, D) -> (..., F)"""
    return gated_silu(F.linear(x, gate), F.linear(x, up))


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) up, for two tensors of one shape and type."""
    return F.silu(gate) * up


def cross_entropy_(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Cross entropy in nats; the logits become the gradient of its sum. Has no gradient of its own.

    logits: (T, V), targets: (T,) int64, `ignored` where there is none: no loss, a gradient of zero -> (T,) float32
    """
    counts = targets != ignored
    index = targets.where(counts, 0)[:, None]
    log_p = logits.float().log_softmax(-1)
    at_target = log_p.gather(-1, index)
    losses = -at_target[:, 0]
    gradient = log_p.exp().scatter_add(-1, index, torch.full_like(at_target, -1.0))
    logits.copy_(gradient.where(counts[:, None], 0.0))
    return losses.where(counts, 0.0)
