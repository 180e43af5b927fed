"""Peers in llama.cpp, through the C interface that llama-cpp-python carries: random GGUF files, on the CPU."""

import ctypes
import tempfile
import weakref
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import llama_cpp.llama_cpp as C
import torch

from hymba.bench.peers import gguf_file
from hymba.bench.peers.shapes import Shape
from hymba.bench.workloads import Workload

VERSION = version("llama-cpp-python")
PROMPT = 128  # tokens that are really read before a sequence is doubled
# positions beyond a context, for the tokens that all repetitions add
ROOM = 256


# its default where the processor can; at long contexts the plain path has been faster on CPUs
FLASH, PLAIN = "flash attention", "plain attention"


def settings(shape: Shape) -> tuple[str, ...]:
    """The ways to decode that a user may choose from."""
    return FLASH, PLAIN


class Token(NamedTuple):
    id: int
    position: int
    sequence: int
    output: bool  # whether its logits are wanted


@C.llama_log_callback
def _silent(level: int, text: bytes, data: int) -> None:
    pass


class Context:
    """Sequences of a model that decode together, each with its own keys and values."""

    def __init__(self, peer: "Peer", sequences: int, length: int, setting: str, shared: bool = False):
        """length: of each sequence; shared: all sequences live in one buffer of that length, so that one can hand its
        tokens to another"""
        options = C.llama_context_default_params()
        options.n_ctx = length if shared else length * sequences
        options.n_batch = options.n_ubatch = 512
        options.n_seq_max = sequences
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.kv_unified = shared
        options.flash_attn_type = (
            C.LLAMA_FLASH_ATTN_TYPE_DISABLED if setting == PLAIN else C.LLAMA_FLASH_ATTN_TYPE_ENABLED
        )
        self._peer = peer  # the model must outlive its contexts
        self._context = _made(C.llama_init_from_model(peer.model, options), "a context")
        self._batch = C.llama_batch_init(options.n_batch, 0, 1)
        self.memory = C.llama_get_memory(self._context)
        weakref.finalize(self, C.llama_free, self._context)
        weakref.finalize(self, C.llama_batch_free, self._batch)

    def decode(self, tokens: Iterable[Token]) -> None:
        batch = self._batch
        batch.n_tokens = 0
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token.id, token.position, token.output
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, token.sequence
            batch.n_tokens = i + 1
        if status := C.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed with status {status}")
        C.llama_synchronize(self._context)

    def read_prompt(self, length: int) -> None:
        """Read a prompt of up to 512 tokens into sequence 0."""
        self.decode(Token(1 + i, i, 0, i == length - 1) for i in range(length))

    def save(self, sequence: int) -> ctypes.Array:
        size = C.llama_state_seq_get_size(self._context, sequence)
        state = (ctypes.c_uint8 * size)()
        if C.llama_state_seq_get_data(self._context, state, size, sequence) != size:
            raise RuntimeError("llama.cpp did not save a sequence")
        return state

    def load(self, state: ctypes.Array, sequence: int) -> None:
        if not C.llama_state_seq_set_data(self._context, state, len(state), sequence):
            raise RuntimeError("llama.cpp did not load a sequence")


class Peer:
    """A model of llama.cpp, of random weights in a file that exists only while it is loaded."""

    def __init__(self, shape: Shape, precision: str):
        self.shape, self.precision = shape, precision
        C.llama_log_set(_silent, None)
        C.llama_backend_init()
        options = C.llama_model_default_params()
        options.n_gpu_layers = 0
        with tempfile.TemporaryDirectory(prefix="hymba-peers-") as folder:
            path = Path(folder, "model.gguf")
            gguf_file.write(shape, precision, path)
            # the memory map, llama.cpp's default, outlives the name of the file
            self.model = _made(C.llama_model_load_from_file(str(path).encode(), options), "a model")
        weakref.finalize(self, C.llama_model_free, self.model)

    def filled(self, batch: int, context: int, setting: str) -> Context:
        """Sequences of `context` tokens: a short prompt is read, and doubled until it is long enough."""
        length, doublings = context, 0
        while length > PROMPT:
            length, doublings = -(-length // 2), doublings + 1
        whole = Context(self, 2, (length << doublings) + ROOM, setting, shared=True)
        whole.read_prompt(length)
        for _ in range(doublings):
            whole.load(whole.save(0), 1)
            C.llama_memory_seq_add(whole.memory, 1, -1, -1, length)  # moves it behind sequence 0
            C.llama_memory_seq_cp(whole.memory, 1, 0, -1, -1)
            C.llama_memory_seq_rm(whole.memory, 1, -1, -1)
            length *= 2
        state, empty = whole.save(0), whole.save(1)
        del whole
        filled = Context(self, batch, length + ROOM, setting)
        filled.load(state if batch == 1 else _for_streams(state, empty, filled.save(0)), 0)
        for sequence in range(1, batch):
            C.llama_memory_seq_cp(filled.memory, 0, sequence, -1, -1)
        return filled

    def decoding(self, batch: int, context: int, steps: int, setting: str) -> Workload:
        """`steps` tokens for each of `batch` sequences that hold `context` tokens."""
        filled = self.filled(batch, context, setting)
        position = C.llama_memory_seq_pos_max(filled.memory, 0)

        def run() -> None:  # goes on where the last run ended: states of an SSM cannot go back
            nonlocal position
            for _ in range(steps):
                position += 1
                filled.decode(Token(1 + s, position, s, True) for s in range(batch))

        return self.shape.decoding(run, self.precision, batch, context, steps)

    def prefill(self, length: int) -> Workload:
        """A prompt of `length` tokens, at most 512."""
        empty = Context(self, 1, length, FLASH)

        def run() -> None:
            C.llama_memory_clear(empty.memory, False)
            empty.read_prompt(length)

        return self.shape.prefill(run, self.precision, length)


def _made(pointer: int | None, what: str) -> int:
    if not pointer:
        raise RuntimeError(f"llama.cpp did not make {what}")
    return pointer


def _for_streams(state: ctypes.Array, one: ctypes.Array, many: ctypes.Array) -> ctypes.Array:
    """`state`, saved from a context of one stream, for a context that has a stream for each sequence.

    one, many: what an empty sequence of either saves. Before the cells comes the number of streams; a stream without
    cells is one zero.
    """
    head = len(one) - 4
    longer = (ctypes.c_uint8 * (len(state) + len(many) - len(one)))()  # zeros
    ctypes.memmove(longer, state, len(state))
    ctypes.memmove(longer, many, head)
    return longer
