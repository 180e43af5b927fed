"""How well a model predicts a text: perplexity and bits per byte.

Bits per byte do not depend on the tokenizer, so models with different ones, and compressors, can be compared.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.errors import UserError
from hymba.model.hymba import IGNORED_LABEL, Hymba
from hymba.tokenizer import Tokenizer


@dataclass(frozen=True)
class Score:
    """What it cost a model to predict a text."""

    nats: float
    tokens: int  # predicted ones
    bytes: int  # of the text, in UTF-8

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


def windows(ids: Tensor, length: int, stride: int) -> tuple[Tensor, Tensor]:
    """A text as rows in which each token is predicted once, with at least `length - stride` tokens before it.

    ids: (n,) -> inputs (rows, length), targets (rows, length) with -100 where another row predicts, or none is to be
    """
    if not 1 <= stride <= length:
        raise UserError(f"stride={stride} must be from 1 to length={length}")
    if len(ids) < 2:
        raise UserError("the text is too short to be predicted; give at least two tokens")
    predicted = len(ids) - 1
    rows = 1 + max(0, -(-(predicted - length) // stride))
    starts = torch.arange(rows)[:, None] * stride
    places = starts + torch.arange(length)
    inputs = ids[places.clamp(max=predicted - 1)]
    targets = ids[(places + 1).clamp(max=predicted)]
    fresh = (starts == 0) | (places >= starts + length - stride)
    return inputs, targets.where(fresh & (places < predicted), IGNORED_LABEL)


@torch.no_grad()
def score_ids(
    model: Hymba,
    ids: Tensor,
    n_bytes: int,
    *,
    length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    advance: Callable[[int], object] = lambda rows: None,
) -> Score:
    """Score a text of one document.

    ids: (n,), the first only read: a BOS, say; n_bytes: of the text in UTF-8; length: tokens a row (default: the
    model's context, at most 1024); stride: new tokens a row (default: half of it); advance: called with rows done.
    Raises `UserError` for a text of fewer than two tokens or lengths that do not fit.
    """
    limit = model.config.max_length
    length = min(limit, 1024) if length is None else length
    if not 2 <= length <= limit:
        raise UserError(f"length={length} must be from 2 to the model's context of {limit}")
    inputs, targets = windows(ids, length, length // 2 if stride is None else stride)
    device, nats = model.meta_tokens.device, 0.0
    training = model.training
    model.eval()
    for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        x, y = x.to(device), y.to(device)
        counted = y != IGNORED_LABEL
        logits = model.lm_head(model.hidden(x)[counted]).float()  # (tokens, V)
        nats += F.cross_entropy(logits, y[counted], reduction="sum").item()
        advance(len(x))
    model.train(training)
    return Score(nats, len(ids) - 1, n_bytes)


def score_text(model: Hymba, tokenizer: Tokenizer, text: str, **options) -> Score:
    """Score a text as one document that begins with BOS, if the tokenizer has one; options as in `score_ids`."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    return score_ids(model, torch.tensor(ids), len(text.encode()), **options)
