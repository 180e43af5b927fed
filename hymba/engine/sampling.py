"""How the next token is chosen: parameters of a request, and the choice itself. Knows logits, not models or text."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hymba.errors import UserError

# candidates that are looked at first for top_p; a confident model needs few, so a full sort is the exception
TOP_P_CANDIDATES = 256


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks for. Filters apply in the order of the fields. Raises `UserError` for values out of range."""

    max_tokens: int = 128
    repetition_penalty: float = 1.0  # divides positive, multiplies negative logits of tokens seen (arXiv 1909.05858)
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the fewest tokens whose probabilities reach top_p (arXiv 1904.09751); 1: all
    min_p: float = 0.0  # keep tokens of at least min_p times the largest probability (arXiv 2407.01082); 0: all
    seed: int | None = None  # the same text every time, alone or in any batch
    n: int = 1  # completions of the prompt; with a seed, completion i uses seed + i
    stop: tuple[str, ...] = ()  # texts that end the completion; they are not part of it
    stop_token_ids: tuple[int, ...] = ()  # ids that end it, besides the end-of-sequence token
    ignore_eos: bool = False  # go on after the end-of-sequence token
    logprobs: int | None = None  # report log-probabilities of the chosen token and this many of the likeliest

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        rules = {
            "max_tokens": (_whole(self.max_tokens) and self.max_tokens >= 1, "an integer of at least 1"),
            "repetition_penalty": (_finite(self.repetition_penalty) and self.repetition_penalty > 0, "above 0"),
            "temperature": (_finite(self.temperature) and self.temperature >= 0, "0 (greedy) or above"),
            "top_k": (_whole(self.top_k) and self.top_k >= 0, "0 (off) or a positive integer"),
            "top_p": (_finite(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            "min_p": (_finite(self.min_p) and 0 <= self.min_p <= 1, "from 0 (off) to 1"),
            "seed": (
                self.seed is None or (_whole(self.seed) and 0 <= self.seed < 2**63),
                "from 0 to 2^63 - 1",
            ),
            "n": (_whole(self.n) and self.n >= 1, "an integer of at least 1"),
            "stop": (all(isinstance(s, str) and s for s in self.stop), "texts that are not empty"),
            "stop_token_ids": (all(map(_whole, self.stop_token_ids)), "token ids"),
            "logprobs": (self.logprobs is None or (_whole(self.logprobs) and self.logprobs >= 0), "0 or above"),
        }
        for name, (fits, rule) in rules.items():
            if not fits:
                raise UserError(f"{name}={getattr(self, name)!r} is out of range: it must be {rule}")


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities at one position, of the model itself: before penalties, temperature and filters."""

    token_id: int
    logprob: float
    top: dict[int, float]  # the likeliest tokens, best first


def choose(logits: Tensor, params: SamplingParams, seen: Tensor, generator: torch.Generator) -> int:
    """Pick a token. logits: (V,) float32, seen: (V,) bool, tokens of the prompt and of the completion so far."""
    if params.repetition_penalty != 1.0:
        penalty = torch.where(logits > 0, 1 / params.repetition_penalty, params.repetition_penalty)
        logits = torch.where(seen, logits * penalty, logits)
    if params.temperature == 0:
        return int(logits.argmax())
    # shifted first: a small temperature must not overflow
    probabilities = torch.softmax((logits - logits.max()) / params.temperature, dim=-1)
    if 0 < params.top_k < len(probabilities):
        probabilities = _at_least(probabilities, probabilities.topk(params.top_k).values[-1])
    if params.top_p < 1:
        probabilities = _at_least(probabilities, _nucleus_floor(probabilities / probabilities.sum(), params.top_p))
    if params.min_p > 0:
        probabilities = _at_least(probabilities, params.min_p * probabilities.max())
    # the inverse of the distribution function, in the vocabulary's order: one number decides, so that the last bits
    # of the logits, which differ between batch sizes, practically never do
    cumulative = probabilities.double().cumsum(0)
    draw = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1].cpu()
    token = int(torch.searchsorted(cumulative, draw.to(cumulative.device), right=True))
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
