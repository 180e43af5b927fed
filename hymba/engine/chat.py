"""A conversation that is read once: between turns the engine remembers what the model has read."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hymba.engine.llm import LLM
from hymba.engine.sampling import SamplingParams
from hymba.errors import UserError
from hymba.model.cache import RowSnapshot

Message = dict[str, str]


class Chat:
    """Turns of a user and the model, in the checkpoint's own chat template.

    The prompt of a turn is always the whole conversation, tokenised afresh; as far as it continues what was read
    before, the cache is reused, else it is read again. So a reply never depends on whether something was remembered.
    """

    def __init__(self, llm: LLM, params: SamplingParams | None = None, system: str | None = None):
        if not llm.tokenizer.has_chat_template:
            raise UserError("this checkpoint has no chat template; use `hymba generate` to continue plain text")
        self.llm = llm
        self.params = params or SamplingParams()
        end = llm.tokenizer.turn_end()
        if end:
            self.params = replace(self.params, stop=(*self.params.stop, end))
        self.system = system
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self._read: list[int] = []

    def send(self, text: str) -> Iterator[str]:
        """Say something and yield the reply piece by piece. A caller who stops early keeps what was said until then."""
        if not text.strip():
            raise UserError("the message is empty; say something")
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.llm.tokenizer.apply_chat_template(messages)
        # as for the released model: a template writes the special tokens it wants itself
        ids = self.llm.tokenizer.encode(prompt, add_special_tokens=False)
        [[sequence]] = self.llm.submit([ids], self.params, keep=True)
        self.messages = messages
        shown = 0
        try:
            while not sequence.finished:
                self.llm.engine.step()
                if len(sequence.text) > shown:
                    yield sequence.text[shown:]
                    shown = len(sequence.text)
        finally:
            self.llm.engine.cancel(sequence)
            self._read = sequence.fed_ids
            self.messages = [*messages, {"role": "assistant", "content": sequence.text}]

    def save(self, path: str | Path) -> None:
        """Write the conversation and what the model remembers of it (safetensors)."""
        known = self.llm.engine.remembered([*self._read, -1]) if self._read else None
        ids, row = known if known else ((), RowSnapshot({}, 0, self.llm.engine.cache.fingerprint))
        header = {"messages": self.messages, "ids": list(ids)}
        row.save(path, {"hymba_chat": json.dumps(header)})

    def load(self, path: str | Path) -> None:
        """Go on with a saved conversation. Raises `UserError` if the file is none, or another model's."""
        row, metadata = RowSnapshot.load(path)
        try:
            header = json.loads(metadata["hymba_chat"])
            messages, ids = header["messages"], header["ids"]
            self.llm.tokenizer.apply_chat_template(messages)
            assert len(ids) == row.length and all(isinstance(i, int) for i in ids)
        except (KeyError, TypeError, ValueError, AssertionError):
            raise UserError(f"{path} is no saved conversation") from None
        if row.model != self.llm.engine.cache.fingerprint:
            raise UserError(f"{path} is a conversation with another model")
        if ids:
            self.llm.engine.remember(ids, row)
        self.messages, self._read = messages, ids
