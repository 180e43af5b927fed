"""Continuous batching: requests join and leave a running batch. The engine handles token ids only.

The cache's rows are kept dense: first the rows that decode, then the group that reads its prompts. Every step reads
at most `prefill_chunk` prompt tokens, then decodes one token of every decoding row; a row that finishes leaves at
once, and the last row takes its place. Completions of one prompt (`n`) read it once and fork.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from collections.abc import Sequence as Ids

import torch
from torch import Tensor

from hymba.engine.decoder import make_decoder
from hymba.engine.sequence import Sequence
from hymba.errors import UserError
from hymba.model.cache import HymbaCache, RowSnapshot
from hymba.model.hymba import Hymba


class Engine:
    """Generates for any number of sequences, `max_batch` at a time."""

    def __init__(
        self,
        model: Hymba,
        *,
        max_batch: int = 8,
        max_length: int | None = None,
        prefill_chunk: int = 512,
        snapshots: int = 4,
        cache: str | None = None,
    ):
        """max_length: tokens of prompt and completion (default: the context); prefill_chunk: prompt tokens a step;
        snapshots: how many sequences that ask for it are remembered, to be continued without reading them again;
        cache: "int8" for keys and values of 8 bits."""
        if max_batch < 1 or prefill_chunk < 1:
            raise UserError(f"max_batch={max_batch} and prefill_chunk={prefill_chunk} must be at least 1")
        self.model = model
        self.cache: HymbaCache = model.new_cache(max_batch, max_length, cache)
        self._decode = make_decoder(model, max_batch, cache)
        self._batches: dict[int, HymbaCache] = {}
        self.prefill_chunk = prefill_chunk
        self._waiting: deque[Sequence] = deque()
        self._decoding: list[Sequence] = []  # rows 0 .. n - 1
        self._reading: list[Sequence] = []  # rows n .. n + m - 1
        self._forks: list[tuple[Sequence, Sequence]] = []  # (completion, who reads for it); rows from n + m, reserved
        self._last_hidden: dict[Sequence, Tensor] = {}  # (D,) of those in `_reading` that are through
        self._snapshots: OrderedDict[tuple[int, ...], RowSnapshot] = OrderedDict()
        self._max_snapshots = snapshots

    @property
    def max_batch(self) -> int:
        return self.cache.batch_size

    @property
    def max_length(self) -> int:
        return self.cache.max_length

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._reading or self._decoding)

    def check_prompt(self, ids: Ids[int]) -> None:
        """Raises `UserError` for a prompt that cannot be read."""
        if not ids:
            raise UserError("the prompt is empty; give at least one token")
        if len(ids) > self.max_length:
            raise UserError(f"the prompt has {len(ids)} tokens, the context {self.max_length}; shorten the prompt")
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.model.config.vocab_size:
            wrong = low if low < 0 else high
            raise UserError(f"token id {wrong} is outside the vocabulary (0 to {self.model.config.vocab_size - 1})")

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences. Those with index > 0 right behind their index 0 fork from it."""
        self._waiting.extend(sequences)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence wherever it is; what it has so far stays in it."""
        if not sequence.finished:
            sequence.finish("cancelled")
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            self._drop_finished()

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Decode a token of every row, then read a piece of the waiting prompts -> the sequences that got a token.

        If this is broken off, by an error or by Ctrl-C, nobody knows what the rows hold: their sequences are cancelled.
        """
        try:
            return self._step()
        except BaseException:
            for sequence in [*self._decoding, *self._reading, *(sequence for sequence, _ in self._forks)]:
                if not sequence.finished:
                    sequence.finish("cancelled")
            self._decoding, self._reading, self._forks, self._last_hidden = [], [], [], {}
            raise

    def _step(self) -> list[Sequence]:
        advanced = list(self._decoding)
        if self._decoding:
            ids = torch.tensor([sequence.token_ids[-1] for sequence in self._decoding])
            self._append(self._decoding, self._decode(ids, self._batch(len(ids))))
            self._drop_finished()
        if not self._reading:
            self._admit()
        if self._reading:
            advanced += self._read()
        return advanced

    def remembered(self, ids: Ids[int]) -> tuple[tuple[int, ...], RowSnapshot] | None:
        """The longest remembered sequence that `ids` continues with at least one more token."""
        ids = tuple(ids)
        known = [key for key in self._snapshots if len(key) < len(ids) and ids[: len(key)] == key]
        if not known:
            return None
        key = max(known, key=len)
        self._snapshots.move_to_end(key)
        return key, self._snapshots[key]

    def remember(self, ids: Ids[int], snapshot: RowSnapshot) -> None:
        """Keep what was read, in place of what was used longest ago."""
        self._snapshots[tuple(ids)] = snapshot
        self._snapshots.move_to_end(tuple(ids))
        while len(self._snapshots) > self._max_snapshots:
            self._snapshots.popitem(last=False)

    @property
    def _device(self) -> torch.device:
        return self.model.meta_tokens.device

    def _batch(self, n: int) -> HymbaCache:
        """The rows that decode; always the same object for a size, which a decoder may know already."""
        if n not in self._batches:
            self._batches[n] = self.cache.rows(0, n)
        return self._batches[n]

    def _append(self, sequences: list[Sequence], logits: Tensor) -> None:
        """logits: (n, V) float32, of what follows each of the n sequences"""
        for sequence, row in zip(sequences, logits.cpu(), strict=True):
            if not sequence.finished:
                sequence.append(row)

    def _remember_row(self, sequence: Sequence, row: int) -> None:
        length = int(self.cache.lengths[row])
        if sequence.keep and length:
            self.remember((sequence.prompt_ids + sequence.token_ids)[:length], self.cache.snapshot(row))

    def _admit(self) -> None:
        """Give free rows to waiting sequences: they read their prompts together.

        A group is padded to its longest prompt. One that would make it more than half padding waits for the next group,
        unless a single step reads them all.
        """
        first, lengths = len(self._decoding), []
        while self._waiting and first + len(self._reading) + len(self._forks) < self.max_batch:
            sequence = self._waiting[0]
            leader = self._reading[-1] if self._reading else None
            if sequence.index > 0 and leader is not None and leader.prompt_ids == sequence.prompt_ids:
                self._forks.append((self._waiting.popleft(), leader))
                continue
            key, snapshot = self.remembered(sequence.prompt_ids) or ((), None)
            lengths.append(len(sequence.prompt_ids) - len(key))
            if len(lengths) * max(lengths) > max(self.prefill_chunk, 2 * sum(lengths)):
                break
            row = first + len(self._reading)
            self.cache.reset(row)
            if snapshot:
                try:
                    self.cache.restore(row, snapshot)
                    sequence.read = len(key)
                except UserError:  # from a file, and of another shape than it says: read the prompt from its beginning
                    del self._snapshots[key]
            self._reading.append(self._waiting.popleft())

    def _read(self) -> list[Sequence]:
        """Read the next piece of the admitted prompts; when all are through, they decode from now on."""
        first, n = len(self._decoding), len(self._reading)
        awaited = {leader for sequence, leader in self._forks if not sequence.finished}
        awaited.update(sequence for sequence in self._reading if not sequence.finished)  # the others were cancelled
        pieces = [sequence.prompt_ids[sequence.read :] if sequence in awaited else [] for sequence in self._reading]
        width = min(max(map(len, pieces)), max(1, self.prefill_chunk // n))
        if width:
            pieces = [piece[:width] for piece in pieces]
            ids = torch.tensor([piece + [0] * (width - len(piece)) for piece in pieces], device=self._device)
            lengths = torch.tensor([[len(piece)] for piece in pieces], device=self._device)
            mask = None if bool((lengths == width).all()) else torch.arange(width, device=self._device) < lengths
            hidden = self.model.hidden(ids, attention_mask=mask, cache=self.cache.rows(first, first + n))
            for sequence, piece, row in zip(self._reading, pieces, hidden, strict=True):
                sequence.read += len(piece)
                if piece and sequence.read == len(sequence.prompt_ids):
                    self._last_hidden[sequence] = row[len(piece) - 1]
        if not awaited <= self._last_hidden.keys():
            return []
        for row, sequence in enumerate(self._reading, first):
            self._remember_row(sequence, row)
        for row, (_, leader) in enumerate(self._forks, first + n):
            self.cache.copy(first + self._reading.index(leader), row)
        ready = [(sequence, sequence) for sequence in self._reading] + self._forks
        self._decoding += [sequence for sequence, _ in ready]
        started = [(sequence, self._last_hidden[leader]) for sequence, leader in ready if not sequence.finished]
        self._reading, self._forks, self._last_hidden = [], [], {}
        if started:
            logits = self.model.lm_head(torch.stack([hidden for _, hidden in started])).float()
            self._append([sequence for sequence, _ in started], logits)
        self._drop_finished()
        return [sequence for sequence, _ in started]

    def _drop_finished(self) -> None:
        """Take finished sequences out of the batch, and close the gaps that their rows leave."""
        for sequence in [sequence for sequence in self._decoding if sequence.finished]:
            row, last = self._decoding.index(sequence), len(self._decoding) - 1
            self._remember_row(sequence, row)
            self.cache.copy(last, row)
            self._decoding[row] = self._decoding[last]
            self._decoding.pop()
            if self._reading:  # they stand right behind: the last of them moves into the free row
                self.cache.copy(last + len(self._reading), last)
                self._reading.insert(0, self._reading.pop())
