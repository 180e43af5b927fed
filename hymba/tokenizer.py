"""Text to token ids and back, streaming, and chat templates.

A thin layer over the `tokenizers` library, which does the splitting and merging. It reads and writes the tokenizer
files of Hugging Face checkpoints, and knows nothing of models.
"""

import hashlib
import json
import operator
import re
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from os import PathLike
from pathlib import Path

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from hymba.errors import UserError
from hymba.files import write_files

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
OPTIONAL_FILES = (CONFIG_FILE, SPECIAL_FILE, TEMPLATE_FILE)

# tokens with a part to play, as the config names them
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")

# The decoder of tokenizers that were converted from SentencePiece; the last step may be absent.
SENTENCEPIECE_DECODER = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]
FALLBACK_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")

# Where a text may be split before pairs are merged: a word with the one character in front of it (a space, a quote),
# up to three digits, punctuation with the line breaks behind it, line breaks, other space. After the pattern of Llama 3
# (Grattafiori et al. 2024), which learned from cl100k.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Encodes text to token ids, decodes ids to text, and writes conversations as text.

    Attributes:
        vocab_size: one more than the largest token id.
        bos_token_id, eos_token_id, pad_token_id, unk_token_id: ids of the tokens that the config names, or None.
        has_chat_template: whether `apply_chat_template` can be used.
    """

    def __init__(self, files: Mapping[str, str], folder: Path = Path()) -> None:
        """`files` maps file names to contents; `folder` is where they are from, for messages. See `from_pretrained`."""
        self._files = dict(files)
        path = folder / TOKENIZER_FILE
        definition = _json_object(self._files[TOKENIZER_FILE], path)
        self._byte_level, self._strips_space = _decoder_family(definition.get("decoder"), path)
        with _library(f"{path} is not a tokenizer that the tokenizers library {tokenizers.__version__} can read"):
            self._backend = tokenizers.Tokenizer.from_str(self._files[TOKENIZER_FILE])
            self._backend.no_truncation()  # settings of training data, which would cut or pad a prompt
            self._backend.no_padding()
            self._plain: tokenizers.Tokenizer | None = None  # see `encode_plain`
            self._backend.encode("")  # a post-processor that names a missing token shows itself here
        config = {
            name: _json_object(self._files[name], folder / name)
            for name in (SPECIAL_FILE, CONFIG_FILE)  # the second wins
            if name in self._files
        }
        self._roles = self._find_roles(config, folder)
        role_ids = {role: self._backend.token_to_id(token) for role, token in self._roles.items()}
        self.bos_token_id: int | None = role_ids.get("bos_token")
        self.eos_token_id: int | None = role_ids.get("eos_token")
        self.pad_token_id: int | None = role_ids.get("pad_token")
        self.unk_token_id: int | None = role_ids.get("unk_token")
        self._template: str | None = self._files.get(TEMPLATE_FILE)
        if self._template is None:
            self._template = _template_of(config.get(CONFIG_FILE, {}), folder / CONFIG_FILE)
        self._tabulate()

    def _find_roles(self, config: Mapping[str, dict], folder: Path) -> dict[str, str]:
        """The text of each special token that the config files name; all of them become special in the library too."""
        vocabulary = self._backend.get_vocab()
        roles = {}
        for name, values in config.items():
            for role in ROLES:
                token = values.get(role)
                token = token.get("content") if isinstance(token, dict) else token
                if token is None:
                    continue
                if not isinstance(token, str) or token not in vocabulary:
                    raise UserError(
                        f"{folder / name}: {role} is {token!r}, which {TOKENIZER_FILE} does not have; "
                        "use the two files of one tokenizer"
                    )
                roles[role] = token
        self._backend.add_special_tokens(sorted(set(roles.values())))
        return roles

    def _tabulate(self) -> None:
        """Make the table from token id to bytes that decoding one token at a time needs."""
        spell = _spell_byte_level if self._byte_level else _spell_sentencepiece
        self._spelling = {id: spell(token) for token, id in self._backend.get_vocab(with_added_tokens=False).items()}
        added = self._backend.get_added_tokens_decoder()
        for id, token in added.items():
            # The library passes added tokens through its decoder as well. That is the convention of SentencePiece, but
            # an added token of a byte-level tokenizer is plain text, of which the byte-level alphabet garbles letters.
            self._spelling[id] = token.content.encode() if self._byte_level else spell(token.content)
        self._special = {id: token.content for id, token in added.items() if token.special}
        self._visible = {id: b"" if id in self._special else data for id, data in self._spelling.items()}
        self.vocab_size: int = max(self._spelling, default=-1) + 1

    @classmethod
    def from_pretrained(cls, directory: str | PathLike) -> "Tokenizer":
        """Read `tokenizer.json` and, where they exist, `tokenizer_config.json`, `special_tokens_map.json` and
        `chat_template.jinja`, which wins over the config's chat template.

        Raises `UserError` if a file is missing, broken, or of a kind that is not supported.
        """
        folder = Path(directory)
        if not (folder / TOKENIZER_FILE).is_file():
            raise UserError(f"there is no {TOKENIZER_FILE} in {folder}; name a folder that holds a tokenizer")
        present = [TOKENIZER_FILE, *(name for name in OPTIONAL_FILES if (folder / name).is_file())]
        return cls({name: _read(folder / name) for name in present}, folder)

    def save_pretrained(self, directory: str | PathLike) -> None:
        """Write the files that the tokenizer was made from, unchanged; another tokenizer's files there are replaced.

        Raises `UserError` if they cannot be written.
        """
        folder = Path(directory)
        write_files({folder / name: partial(_write, text) for name, text in self._files.items()})
        for name in OPTIONAL_FILES:  # one that is left over would be read together with ours
            if name not in self._files:
                (folder / name).unlink(missing_ok=True)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: Sequence[str] = ("<unk>", "<s>", "</s>"),
        chat_template: str | None = None,
    ) -> "Tokenizer":
        """Learn a byte-level BPE vocabulary (Sennrich et al. 2016, on bytes); the same texts always give the same one.

        The special tokens get the first ids. The first of them is unknown and padding, the second begins every encoded
        text, the third ends a text. The vocabulary is smaller than `vocab_size` where the texts have too few pairs.
        Raises `UserError` for a vocabulary that is too small, or for texts that cannot be encoded.
        """
        distinct = {token for token in special_tokens if isinstance(token, str) and token}
        if isinstance(special_tokens, str) or len(special_tokens) < 3 or len(distinct) < len(special_tokens):
            raise UserError("special_tokens must be three or more different strings: unknown and padding, begin, end")
        smallest = 256 + len(special_tokens)
        if vocab_size < smallest:
            raise UserError(f"vocab_size={vocab_size} is too small; bytes and special tokens alone need {smallest}")
        if isinstance(texts, str):
            raise UserError("texts must be several strings, for example a list of lines, not one string")
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(special_tokens), initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(map(_checked, texts), trainer)
        unk, bos, eos = special_tokens[:3]
        with _library(f"special token {bos!r} cannot be put in front of a text; choose one without ':' and '$'"):
            backend.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, 1)])
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": unk,
            "unk_token": unk,
            "clean_up_tokenization_spaces": False,
        }
        if chat_template is not None:
            config["chat_template"] = chat_template
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        return cls({TOKENIZER_FILE: backend.to_str(pretty=True), CONFIG_FILE: text})

    def fingerprint(self) -> str:
        """A hash of all that decides how texts become ids, with BOS and EOS."""
        definition = f"{self._files[TOKENIZER_FILE]} {self.bos_token_id} {self.eos_token_id}"
        return hashlib.sha256(definition.encode()).hexdigest()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` puts those around it that the tokenizer prescribes.

        A special token that is spelled out in `text` becomes that token, as it does in the released tokenizer.
        Raises `UserError` if `text` is not a string or holds half a surrogate pair.
        """
        _checked(text)
        with _library("the tokenizer cannot encode this text"):
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text and nothing around them; a special token that is spelled out stays plain text.

        For training data: a document cannot smuggle in the end of a document. Texts are encoded on all cores.
        """
        if self._plain is None:
            self._plain = tokenizers.Tokenizer.from_str(self._backend.to_str())
            self._plain.encode_special_tokens = True
        with _library("the tokenizer cannot encode this text"):
            return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`, with U+FFFD for bytes that are no UTF-8; ids above the vocabulary stand for nothing."""
        ids = [_checked_id(id) for id in ids]
        if not self._byte_level:
            with _library("the tokenizer cannot decode these ids"):
                return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        # What the library computes, but for its fault with added tokens: see `_tabulate`.
        table = self._visible if skip_special_tokens else self._spelling
        return b"".join(table.get(id, b"") for id in ids).decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for within a text: none for special tokens and for ids above the vocabulary."""
        return self._visible.get(_checked_id(id), b"")

    def detokenizer(self, prompt_ids: Iterable[int] = ()) -> "Detokenizer":
        """Decode one token at a time what follows a prompt, or with no prompt a whole text."""
        return Detokenizer(self, prompt_ids)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def apply_chat_template(
        self,
        messages: Sequence[dict],
        *,
        tools: Sequence[dict] | None = None,
        contexts: Sequence[str] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Write a conversation as the text that the model was trained to continue.

        messages: dicts with the strings `role` and `content`. tools: descriptions of functions, as JSON schema.
        contexts: passages to answer from. add_generation_prompt: end where the assistant's answer begins.
        What a role means, and whether tools and contexts are used, is up to the template.
        Raises `UserError` for messages of another shape, and if the template refuses them or fails.
        """
        if self._template is None:
            raise UserError("this tokenizer has no chat template; use plain text, or a model that was tuned for chat")
        _check_conversation(messages, tools, contexts)
        with _template_errors():
            return _compiled(self._template).render(
                messages=messages,
                tools=tools,
                contexts=contexts,
                add_generation_prompt=add_generation_prompt,
                **self._roles,
            )

    def turn_end(self) -> str | None:
        """The text by which a model shows that it has ended its turn and goes on with the user's: a stop string.

        It is what the template puts between an answer and the next question, up to the first special token (those
        never appear in decoded text), without space around it. None if nothing remains.
        """
        if self._template is None:
            return None
        question, answer, next_question = "hymba-question", "hymba-answer", "hymba-next"
        turns = (("user", question), ("assistant", answer), ("user", next_question))
        text = self.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns], add_generation_prompt=False
        )
        between = re.search(f"{answer}(.*?){next_question}", text, re.DOTALL)
        if between is None:  # the template rewrites what is said
            return None
        end = between[1]
        for token in self._special.values():
            end = end.partition(token)[0]
        return end.strip() or None


class Detokenizer:
    """Decodes one token at a time, at a cost that does not depend on how many came before.

    The pieces, joined, are the text that follows the prompt: `decode(prompt + new) == decode(prompt) + pieces`, as long
    as the bytes of both are valid UTF-8. A character that the prompt leaves half finished is completed.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int] = ()) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._strips_space = tokenizer._strips_space  # until something visible came
        self._push(b"".join(map(self._token_bytes, prompt_ids)))

    def feed(self, id: int) -> str:
        """Take one token and return the text that became certain, which may be none: never a part of a character."""
        return self._push(self._token_bytes(id))

    def flush(self) -> str:
        """End the text: what is left of an unfinished character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)

    def _push(self, data: bytes) -> str:
        if self._strips_space and data:
            self._strips_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (Radford et al. 2019, GPT-2).

    Printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


def _spell_byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:  # a token from elsewhere; the library takes such a one as plain text
        return token.encode()


def _spell_sentencepiece(token: str) -> bytes:
    token = token.replace("▁", " ")
    byte = FALLBACK_BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.encode()


def _decoder_family(decoder: object, path: Path) -> tuple[bool, bool]:
    """(whether the decoder is byte-level, whether it removes the space in front of a text)"""
    kind = decoder.get("type") if isinstance(decoder, dict) else None
    if kind == "ByteLevel":
        return True, False
    if kind == "Sequence":
        steps = decoder.get("decoders")
        if steps in (SENTENCEPIECE_DECODER, SENTENCEPIECE_DECODER[:-1]):
            return False, steps == SENTENCEPIECE_DECODER
        steps = steps if isinstance(steps, list) else []
        kind = f"Sequence({', '.join(str(step.get('type')) for step in steps if isinstance(step, dict))})"
    raise UserError(
        f"{path}: the decoder {kind} is not supported; use a tokenizer with a ByteLevel decoder, or with the "
        "SentencePiece one: Replace '▁' by ' ', ByteFallback, Fuse, Strip one space in front"
    )


def _template_of(config: dict, path: Path) -> str | None:
    """The config's chat template: a string, or the one named "default" in a list of named templates."""
    template = config.get("chat_template")
    try:
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template is None or isinstance(template, str):
            return template
    except (TypeError, KeyError):
        pass
    raise UserError(f"{path}: chat_template must be a string, or a list of objects with name and template; mend it")


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """Compiled as Hugging Face does it; a template comes with a model from anywhere, hence the sandbox."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Replaces Jinja's own filter, which escapes for HTML and sorts keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str):
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(message)


@contextmanager
def _template_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a template is a program, which can fail in any way
        where = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise UserError(
            f"the chat template does not take these messages: {where}{_one_line(error)}; "
            "change the messages, or mend the template"
        ) from error


def _check_conversation(messages: object, tools: object, contexts: object) -> None:
    if not isinstance(messages, list | tuple):
        raise UserError("messages must be a list of dicts with role and content")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UserError(f"messages[{i}] is of type {type(message).__name__}; make it a dict with role and content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise UserError(f"messages[{i}] needs a {key!r} that is a string")
    for name, values, kind in (("tools", tools, dict), ("contexts", contexts, str)):
        if values is None:
            continue
        if not isinstance(values, list | tuple) or not all(isinstance(value, kind) for value in values):
            raise UserError(f"{name} must be a list of {kind.__name__}, or None")


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"a text to encode must be a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text has half a surrogate pair, U+{ord(text[error.start]):04X}, at position {error.start}; "
            "remove it, or read the text with errors='replace'"
        ) from None
    return text


def _checked_id(id: int) -> int:
    try:
        id = operator.index(id)
    except TypeError:
        raise UserError(f"a token id must be an integer, not {type(id).__name__}") from None
    if not 0 <= id < 2**32:  # what the library can hold
        raise UserError(f"{id} is not a token id; ids start at 0")
    return id


@contextmanager
def _library(problem: str) -> Iterator[None]:
    """Turn what the tokenizers library raises into a `UserError`."""
    try:
        yield
    except BaseException as error:
        # It raises bare Exception, and PanicException, which is no Exception and has no public name, on odd files.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{problem}: {_one_line(error)}; check the tokenizer's files or fetch them again") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); fetch the file again") from error


def _write(text: str, path: Path) -> None:
    path.write_bytes(text.encode())


def _json_object(text: str, path: Path) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({_one_line(error)}); fetch the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object; fetch the file again")
    return value
