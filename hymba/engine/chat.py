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
        self.finish_reason: str | None = None  # of the last reply; "cancelled" if it was stopped
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation."""
        self.messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []

    def send(self, text: str) -> Iterator[str]:
        """Say something and yield the reply piece by piece. A caller who stops early keeps what was said until then."""
        if not text.strip():
            raise UserError("the message is empty; say something")
        messages = [*self.messages, {"role": "user", "content": text}]
        ids, limit = self._ids(messages), self.llm.engine.max_length
        if len(ids) > limit:
            raise UserError(f"the conversation would have {len(ids)} tokens, the context holds {limit}; reset it")
        [[sequence]] = self.llm.submit([ids], self.params, keep=True)
        self.messages = messages
        shown = 0
        try:
            for _ in self.llm.run([sequence]):
                if len(sequence.text) > shown:
                    yield sequence.text[shown:]
                    shown = len(sequence.text)
        finally:
            self.llm.engine.cancel(sequence)
            self.finish_reason = sequence.finish_reason
            # the space in front of the mark that ended the turn is the template's, which writes it again
            self.messages = [*messages, {"role": "assistant", "content": sequence.text.rstrip()}]

    def _ids(self, messages: list[Message]) -> list[int]:
        """The tokens of a conversation, as for the released model: a template writes the special tokens it wants."""
        text = self.llm.tokenizer.apply_chat_template(messages)
        return self.llm.tokenizer.encode(text, add_special_tokens=False)

    def save(self, path: str | Path) -> None:
        """Write the conversation and what the model remembers of it (safetensors)."""
        if not any(message["role"] == "assistant" for message in self.messages):
            raise UserError("nothing was said yet, so there is nothing to save")
        # what the next turn can go on from, whatever will be said
        known = self.llm.engine.remembered(self._ids([*self.messages, {"role": "user", "content": "?"}]))
        ids, row = known or ((), RowSnapshot({}, 0, self.llm.engine.cache.fingerprint))
        header = {"messages": self.messages, "ids": ids}
        row.save(path, {"hymba_chat": json.dumps(header)})

    def load(self, path: str | Path) -> None:
        """Go on with a saved conversation. Raises `UserError` if the file is none, or another model's."""
        row, metadata = RowSnapshot.load(path)
        try:
            header = json.loads(metadata["hymba_chat"])
            messages, ids = header["messages"], header["ids"]
            self.llm.tokenizer.apply_chat_template(messages)
            if len(ids) != row.length or not all(type(i) is int for i in ids):
                raise ValueError("these are not the tokens of the row")
        except (KeyError, TypeError, ValueError, RecursionError):
            raise UserError(f"{path} is no saved conversation") from None
        if row.model != self.llm.engine.cache.fingerprint:
            raise UserError(f"{path} is a conversation with another model, dtype or kind of cache")
        if ids:
            self.llm.engine.remember(ids, row)
        self.messages = messages
