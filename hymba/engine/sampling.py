"""What a request asks for. The choice itself is made in `sampler.py`; this module does not wait for PyTorch."""

import math
from dataclasses import dataclass

from hymba.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks for. Filters apply in the order of the fields. Raises `UserError` for values out of range."""

    max_tokens: int = 128  # length of the completion at most; the end of the context ends it, too
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
            if isinstance(getattr(self, name), list | set):
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
                "an integer from 0 to 2^63 - 1",
            ),
            "n": (_whole(self.n) and self.n >= 1, "an integer of at least 1"),
            "stop": (
                isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop),
                "texts that are not empty",
            ),
            "stop_token_ids": (
                isinstance(self.stop_token_ids, tuple) and all(_whole(i) and i >= 0 for i in self.stop_token_ids),
                "token ids, 0 or above",
            ),
            "ignore_eos": (isinstance(self.ignore_eos, bool), "True or False"),
            "logprobs": (
                self.logprobs is None or (_whole(self.logprobs) and self.logprobs >= 0),
                "an integer of at least 0",
            ),
        }
        for name, (fits, rule) in rules.items():
            if not fits:
                raise UserError(f"{name} must be {rule}, not {getattr(self, name)!r}")


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
