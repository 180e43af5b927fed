"""`LLM`: a checkpoint, its tokenizer and the engine behind one object that turns text into text."""

import operator
import os
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Ids
from dataclasses import dataclass

import torch

from hymba.config import HymbaConfig
from hymba.convert import resolve
from hymba.engine.engine import Engine
from hymba.engine.sampler import TokenLogprobs
from hymba.engine.sampling import SamplingParams
from hymba.engine.sequence import Sequence
from hymba.errors import UserError
from hymba.model.hymba import Hymba
from hymba.model.quant import quantisation, quantize_
from hymba.shipped import SHIPPED_MODEL
from hymba.tokenizer import Tokenizer

Prompt = str | Ids[int]


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop": an end token or a stop text; "length": max_tokens or the context is reached
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its `n` completions; the first one's fields can be read directly."""

    prompt: str | None
    prompt_ids: list[int]
    completions: list[Completion]

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.completions[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        return self.completions[0].logprobs


@dataclass(frozen=True)
class Chunk:
    """A piece of a completion, as soon as it is certain."""

    prompt_index: int
    completion_index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None


class LLM:
    """Text in, text out.

        llm = hymba.LLM()  # the small model that the package ships
        llm.generate(["Emma was", "It is"], hymba.SamplingParams(max_tokens=64, temperature=0.0))

    Raises `UserError` for a checkpoint or a prompt that cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike = SHIPPED_MODEL,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype | str = "auto",
        quantize: str | None = None,
        max_batch: int = 8,
        max_length: int | None = None,
        cache: str | None = None,
    ):
        """path: folder or hub id; device: `auto` is the GPU if there is one; dtype: `auto` is the checkpoint's;
        quantize: "int8" or "int4" weights, unless the checkpoint is quantised that way already;
        max_batch: prompts that are worked on at the same time; max_length: tokens of prompt and completion;
        cache: "int8" for keys and values of 8 bits, by default they have the model's dtype."""
        folder = resolve(path)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = Hymba.from_pretrained(folder, device=device, dtype=dtype)
        if model.meta_tokens.is_cuda:
            torch.cuda.set_device(model.meta_tokens.device)  # where Triton launches its kernels
        if quantize is not None and quantisation(model) != quantize:
            quantize_(model, quantize)
        tokenizer = Tokenizer.from_pretrained(folder)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
                f"{model.config.vocab_size}; they do not belong together"
            )
        self._set(model, tokenizer, max_batch=max_batch, max_length=max_length, cache=cache)

    @classmethod
    def of(
        cls,
        model: Hymba,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 8,
        max_length: int | None = None,
        cache: str | None = None,
    ) -> "LLM":
        """Around a model and a tokenizer that are there already. The weights must not change while it is in use."""
        llm = cls.__new__(cls)
        llm._set(model, tokenizer, max_batch=max_batch, max_length=max_length, cache=cache)
        return llm

    def _set(self, model: Hymba, tokenizer: Tokenizer, **options) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.engine = Engine(model, **options)

    @property
    def config(self) -> HymbaConfig:
        return self.model.config

    def generate(self, prompts: Prompt | Iterable[Prompt], params: SamplingParams | None = None) -> list[RequestOutput]:
        """Complete prompts (texts, or lists of token ids), batched; results are in the order of the prompts."""
        prompts = as_list(prompts)
        requests = self.submit(prompts, params)
        for _ in self.run(s for request in requests for s in request):
            pass
        return [
            RequestOutput(
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_ids=request[0].prompt_ids,
                completions=[
                    Completion(s.text, s.token_ids, s.finish_reason, None if s.params.logprobs is None else s.logprobs)
                    for s in request
                ],
            )
            for prompt, request in zip(prompts, requests, strict=True)
        ]

    def stream(self, prompts: Prompt | Iterable[Prompt], params: SamplingParams | None = None) -> Iterator[Chunk]:
        """Complete prompts and yield text as it becomes certain; a caller who stops early stops the work."""
        requests = self.submit(as_list(prompts), params)
        places = {s: (i, j) for i, request in enumerate(requests) for j, s in enumerate(request)}
        shown = dict.fromkeys(places, (0, 0))  # of those that are not shown to their end: characters, tokens
        try:
            while shown:
                self.engine.step()
                for s, (text, ids) in list(shown.items()):  # all of them: another stream may have made the step
                    if len(s.text) > text or s.finished:
                        shown[s] = len(s.text), len(s.token_ids)
                        if s.finished:
                            del shown[s]
                        yield Chunk(*places[s], s.text[text:], s.token_ids[ids:], s.finish_reason)
        finally:
            for s in places:
                self.engine.cancel(s)

    def run(self, sequences: Iterable[Sequence]) -> Iterator[list[Sequence]]:
        """Work until the submitted sequences are finished; yields after each step which ones got a token.

        Whatever breaks this off, an error, Ctrl-C or a caller who stops early, cancels them.
        """
        sequences = list(sequences)
        waiting = deque(sequences)
        try:
            while waiting:
                if waiting[0].finished:
                    waiting.popleft()
                else:
                    yield self.engine.step()
        finally:
            for s in sequences:
                self.engine.cancel(s)

    def submit(
        self, prompts: list[Prompt], params: SamplingParams | None = None, *, keep: bool = False
    ) -> list[list[Sequence]]:
        """Queue prompts at the engine without waiting -> for every prompt its `params.n` sequences.

        keep: the engine is to remember what was read, for a prompt that continues it. Nothing is queued if one of the
        prompts cannot be read.
        """
        params = params or SamplingParams()
        encoded = []
        for i, prompt in enumerate(prompts):
            try:
                ids = self._ids(prompt)
                self.engine.check_prompt(ids)
            except UserError as error:
                raise UserError(f"prompt {i + 1}: {error}" if len(prompts) > 1 else str(error)) from None
            encoded.append(ids)
        requests = [
            [
                Sequence(
                    ids,
                    params,
                    index=index,
                    max_length=self.engine.max_length,
                    eos_token_id=self.config.eos_token_id,
                    detokenizer=self.tokenizer.detokenizer(ids),
                    keep=keep and index == 0,
                )
                for index in range(params.n)
            ]
            for ids in encoded
        ]
        self.engine.add(sequence for request in requests for sequence in request)
        return requests

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise UserError("the prompt is empty; give at least one character")
            return self.tokenizer.encode(prompt)
        try:
            return [operator.index(item) for item in prompt]
        except TypeError:
            raise UserError("a prompt is a text or a list of token ids") from None


def as_list(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """One prompt or many -> many. A list of integers is one prompt of token ids."""
    if isinstance(prompts, str):
        return [prompts]
    try:
        prompts = list(prompts)
    except TypeError:
        raise UserError("prompts are a text, a list of token ids, or a list of these") from None
    return [prompts] if prompts and isinstance(prompts[0], int) else prompts
