"""One completion while it is being made: its ids, its text, and when it ends. Knows neither model nor cache."""

from collections.abc import Sequence as Ids

import torch
from torch import Tensor

from hymba.engine.sampler import TokenLogprobs, choose, logprobs_of
from hymba.engine.sampling import SamplingParams
from hymba.tokenizer import Detokenizer


class Sequence:
    """A prompt and the tokens that follow it.

    `text` is what is certain: it never ends within a character, nor in what may become a stop text.
    """

    def __init__(
        self,
        prompt_ids: Ids[int],
        params: SamplingParams,
        *,
        index: int = 0,
        max_length: int,
        eos_token_id: int | None = None,
        detokenizer: Detokenizer | None = None,
        keep: bool = False,
    ):
        """index: which of `params.n` completions; max_length: tokens that prompt and completion may fill; keep: the
        engine is to remember what was read, for a prompt that continues it."""
        self.prompt_ids, self.params, self.index, self.keep = list(prompt_ids), params, index, keep
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.read = 0  # tokens of the prompt that the model has read
        self._held = ""  # text that may turn out to begin a stop text
        self._detokenizer = detokenizer
        self._limit = min(params.max_tokens, max_length - len(self.prompt_ids) + 1)
        self._stop_ids = {
            *params.stop_token_ids,
            *(() if params.ignore_eos or eos_token_id is None else (eos_token_id,)),
        }
        self._seen = self._generator = None  # see `_begin`

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def append(self, logits: Tensor) -> None:
        """Choose the next token. logits: (V,) float32 on the CPU"""
        if self._generator is None:
            self._begin(len(logits))
        token = choose(logits, self.params, self._seen, self._generator)
        self.token_ids.append(token)
        self._seen[token] = True
        if self.params.logprobs is not None:
            self.logprobs.append(logprobs_of(logits, token, self.params.logprobs))
        if token in self._stop_ids:
            self.finish("stop")
        else:
            self._extend(self._detokenizer.feed(token) if self._detokenizer else "")
            if not self.finished and len(self.token_ids) >= self._limit:
                self.finish("length")
        if self.finished:
            self._seen = self._generator = None

    def _begin(self, vocab_size: int) -> None:
        """Make what choosing needs, not before the first token: thousands of sequences may wait or be finished."""
        self._seen = torch.zeros(vocab_size, dtype=torch.bool)
        self._seen[self.prompt_ids] = True
        self._generator = torch.Generator()
        if self.params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((self.params.seed + self.index) % 2**63)

    def finish(self, reason: str) -> None:
        """End the sequence; text that was held back belongs to it after all, unless a stop text came."""
        if self._detokenizer:
            self._extend(self._detokenizer.flush())
        if not self.finished:
            self.text += self._held
            self.finish_reason = reason

    def _extend(self, new: str) -> None:
        text = self._held + new
        ends = [at for stop in self.params.stop if (at := text.find(stop)) >= 0]
        if ends:
            self.text += text[: min(ends)]
            self._held, self.finish_reason = "", "stop"
            return
        held = max((_overlap(text, stop) for stop in self.params.stop), default=0)
        self.text += text[: len(text) - held]
        self._held = text[len(text) - held :]


def _overlap(text: str, stop: str) -> int:
    """How many last characters of `text` are the first ones of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
