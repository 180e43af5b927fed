"""How the next token is chosen. Knows logits, not models or text."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hymba.engine.sampling import SamplingParams
from hymba.errors import UserError

# candidates that are looked at first for top_p; a confident model needs few, so a full sort is the exception
TOP_P_CANDIDATES = 256


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities at one position, of the model itself: before penalties, temperature and filters."""

    token_id: int
    logprob: float
    top: dict[int, float]  # the likeliest tokens, best first


def choose(logits: Tensor, params: SamplingParams, seen: Tensor, generator: torch.Generator) -> int:
    """Pick a token. logits: (V,), seen: (V,) bool, tokens of the prompt and of the completion so far; on the CPU

    A filter that would cut between equally likely tokens keeps all of them. Raises `UserError` if a logit is NaN or
    infinitely large; minus infinity excludes a token.
    """
    logits = logits.double()  # in which no temperature is too small
    if params.repetition_penalty != 1.0:
        penalised = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    best = logits.max()  # NaN if there is one
    if not best.isfinite():
        raise UserError(
            "the model computes no finite logits (NaN or infinity); use dtype float32, or check its weights"
        )
    if params.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax((logits - best) / params.temperature, dim=-1)
    if 0 < params.top_k < len(probabilities):
        probabilities = _at_least(probabilities, probabilities.topk(params.top_k).values[-1])
        probabilities /= probabilities.sum()
    if params.top_p < 1:
        probabilities = _at_least(probabilities, _nucleus_floor(probabilities, params.top_p))
    if params.min_p > 0:
        probabilities = _at_least(probabilities, params.min_p * probabilities.max())
    # the inverse of the distribution function, in the vocabulary's order: one number decides, so that the last bits
    # of the logits, which differ between batch sizes, practically never do
    cumulative = probabilities.cumsum(0)
    draw = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    token = int(torch.searchsorted(cumulative, draw, right=True))
    return min(token, int(probabilities.nonzero()[-1]))


def _at_least(probabilities: Tensor, floor: Tensor) -> Tensor:
    return torch.where(probabilities >= floor, probabilities, 0)


def _nucleus_floor(probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest probability in the nucleus: found among a few candidates if they suffice."""
    for candidates in (TOP_P_CANDIDATES, len(probabilities)):
        best = probabilities.topk(min(candidates, len(probabilities))).values
        reached = best.cumsum(0) >= top_p
        if reached.any():
            return best[int(reached.int().argmax())]
    return probabilities.min()  # rounding kept the sum below top_p: all tokens


def logprobs_of(logits: Tensor, token_id: int, count: int) -> TokenLogprobs:
    """logits: (V,) float32"""
    logprobs = torch.log_softmax(logits, dim=-1)
    best = logprobs.topk(min(count, len(logprobs)))
    top = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprobs(token_id, float(logprobs[token_id]), top)
