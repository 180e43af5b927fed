"""Laws of the tokenizer: streaming is byte-exact, a cut text is two texts, files survive a round trip.

The laws hold for both families of decoder: byte-level (trained here) and SentencePiece-like (built here, and the
official file, which is not part of the repository: set HYMBA_SHARED to the folder that holds `official/`).
"""

import json
import os
import pickle
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers

from hymba.errors import UserError
from hymba.tokenizer import Tokenizer

TEXTS = [f"{who} {verb} the {what}, and {who} did not {verb} it again; naïve — 日本語 {n} 😀\n"
         for n, (who, verb, what) in enumerate((w, v, o)
         for w in ("Emma", "Anne", "Elinor", "Fanny", "Catherine")
         for v in ("saw", "wrote", "thanked", "remembered", "walked to")
         for o in ("letter", "garden", "visitor", "carriage", "neighbourhood"))]  # fmt: skip

ADDED = ("<extra_id_0>", " two  words ", "naïve")  # tokens that the decoders could trip over

OFFICIAL = "Hymba-1.5B-Base"


def official_folder() -> Path:
    shared = Path(os.environ.get("HYMBA_SHARED") or Path(__file__).resolve().parents[1] / "../shared")
    folder = shared / "official" / OFFICIAL
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"the official tokenizer is not in {folder}; set HYMBA_SHARED to the folder that holds official/")
    return folder


@cache
def official() -> Tokenizer:
    return Tokenizer.from_pretrained(official_folder())


@cache
def byte_level() -> Tokenizer:
    return Tokenizer.train(TEXTS, 400)


def with_added_tokens(tokenizer: Tokenizer, folder: Path, *tokens: str) -> Tokenizer:
    tokenizer.save_pretrained(folder)
    path = str(folder / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(path)
    backend.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    backend.save(path)
    return Tokenizer.from_pretrained(folder)


@cache
def sentencepiece_backend(strip: bool = True) -> str:
    """A small tokenizer.json of the official kind: byte fallback, and '▁' for space."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁aeinorst日", "▁a", "▁▁", "er"]
    merges = [("▁", "a"), ("▁", "▁"), ("e", "r")]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps if strip else steps[:-1])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend.to_str()


@cache
def sentencepiece() -> Tokenizer:
    return Tokenizer({"tokenizer.json": sentencepiece_backend()})


@pytest.fixture(scope="module", params=[byte_level, sentencepiece, official], ids=lambda make: make.__name__)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    """One of each family, with added tokens."""
    made = request.param()
    return with_added_tokens(made, tmp_path_factory.mktemp("added"), *ADDED)


def stream(tokenizer: Tokenizer, ids, prompt_ids=()) -> str:
    detokenizer = tokenizer.detokenizer(prompt_ids)
    return "".join([*map(detokenizer.feed, ids), detokenizer.flush()])


def is_error(call, *words: str) -> None:
    """The call fails with one line that has these words."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for word in words:
        assert word in message


ids_and_more = st.lists(st.integers(0, 420) | st.integers(0, 32005), max_size=40)  # some are above the vocabulary

# The SentencePiece family writes '▁' for a space. Special tokens that are spelled out are taken as such.
texts = st.text(max_size=60) | st.sampled_from(
    [" ", "  a", "日本語 naïve two  words <extra_id_0>x", "😀👩‍👩‍👧‍👦", "e\u0301"]
)
texts = texts.filter(lambda text: not any(mark in text for mark in ("▁", "<unk>", "<s>", "</s>", "[PAD]")))


# --- the official files


def golden_cases() -> dict:
    return json.loads((official_folder() / "tokenizer_golden.json").read_text(encoding="utf-8"))


def test_official_goldens():
    tokenizer, cases = official(), golden_cases()["cases"]
    assert len(cases) >= 25
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["ids"], case
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids_no_special"], case
        assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["decoded"], case
        assert tokenizer.decode(case["ids"]) == case["decoded_skip_special"], case
        assert stream(tokenizer, case["ids"]) == case["decoded_skip_special"], case


def test_official_ids():
    tokenizer, golden = official(), golden_cases()
    for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(tokenizer, name) == golden[name]


# --- text and tokens


@given(text=texts)
def test_a_text_survives_encoding_whole_and_streamed(tokenizer, text):
    # the SentencePiece family begins anew after an added token, with a space in front of what follows
    assume(not any(token in text for token in ADDED))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert stream(tokenizer, ids) == text


@given(ids=ids_and_more)
def test_streaming_is_joining_bytes(tokenizer, ids):
    data = b"".join(map(tokenizer.token_bytes, ids))
    if tokenizer.decode(tokenizer.encode(" ", add_special_tokens=False) * 2) == "   ":  # a space is put in front
        data = data.removeprefix(b" ")
    assert stream(tokenizer, ids) == data.decode("utf-8", "replace")


@given(ids=ids_and_more)
def test_decoding_is_streaming_where_bytes_are_characters(tokenizer, ids):
    text = stream(tokenizer, ids)
    # broken bytes: the library's fallback decoder gives up on good neighbours too, streaming does not
    assume("\ufffd" not in text)
    assert tokenizer.decode(ids) == text


@given(ids=st.lists(st.integers(0, 405), max_size=40), skip=st.booleans())
def test_byte_level_decoding_is_that_of_the_library(ids, skip):
    library = tokenizers.Tokenizer.from_str(byte_level()._files["tokenizer.json"])
    assert byte_level().decode(ids, skip_special_tokens=skip) == library.decode(ids, skip_special_tokens=skip)


@given(prompt=texts, new=texts)
def test_a_continuation_is_what_follows_the_prompt(tokenizer, prompt, new):
    prompt_ids, new_ids = tokenizer.encode(prompt), tokenizer.encode(new, add_special_tokens=False)
    continuation = stream(tokenizer, new_ids, prompt_ids)
    assert tokenizer.decode(prompt_ids + new_ids) == tokenizer.decode(prompt_ids) + continuation


@given(ids=ids_and_more, cut=st.integers(0, 40))
def test_a_stream_may_be_cut_anywhere(tokenizer, ids, cut):
    """Even within a character: the half that the prompt ends with is not lost."""
    first = tokenizer.detokenizer()
    before = "".join(map(first.feed, ids[:cut]))
    assert before + stream(tokenizer, ids[cut:], ids[:cut]) == stream(tokenizer, ids)


@given(text=texts.filter(lambda text: "\ufffd" not in text))
def test_no_half_characters(tokenizer, text):
    detokenizer = tokenizer.detokenizer()
    assert "\ufffd" not in "".join(map(detokenizer.feed, tokenizer.encode(text)))
    assert detokenizer.flush() == ""


def test_an_unfinished_character_waits_and_is_marked_at_the_end(tokenizer):
    ids = tokenizer.encode("a\U0010fffd", add_special_tokens=False)  # in no vocabulary: four tokens
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.feed(id) for id in ids[-4:-1]] == ["", "", ""]
    assert detokenizer.flush() == "\ufffd"
    assert stream(tokenizer, ids[-1:], ids[:-1]) == "\U0010fffd"


def test_the_space_in_front_belongs_to_the_beginning_only():
    tokenizer = sentencepiece()
    word = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.token_bytes(word[0]) == b" a"
    assert stream(tokenizer, word) == "a"
    assert stream(tokenizer, word, [1]) == "a"  # a special token is no text
    assert stream(tokenizer, word, word) == " a"
    without_strip = Tokenizer({"tokenizer.json": sentencepiece_backend(strip=False)})
    assert stream(without_strip, word) == without_strip.decode(word) == " a"


def test_special_tokens_are_no_text(tokenizer):
    for special in (0, 1, 2):
        assert tokenizer.token_bytes(special) == b""
    ids = [*tokenizer.encode("Emma"), 2, 1, 0]
    assert stream(tokenizer, ids) == tokenizer.decode(ids) == "Emma"
    assert "</s>" in tokenizer.decode(ids, skip_special_tokens=False)


def test_added_tokens_are_text(tokenizer):
    for token in ADDED:
        (id,) = (id for id in tokenizer.encode(f"x{token}x") if tokenizer.token_bytes(id) == token.encode())
        assert tokenizer.decode([1, id, id], skip_special_tokens=False).endswith(token * 2)


def test_a_token_that_the_config_names_is_special(tmp_path):
    with_added_tokens(byte_level(), tmp_path, "<pad>")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<pad>"}, "eos_token": "<pad>"}')
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_token_id == tokenizer.vocab_size - 1
    assert tokenizer.eos_token_id == 2  # the config wins
    assert tokenizer.decode([tokenizer.pad_token_id]) == ""
    assert tokenizer.token_bytes(tokenizer.pad_token_id) == b""


def test_encoding_neither_cuts_nor_pads(tmp_path):
    byte_level().save_pretrained(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "Emma saw the letter again and again"
    assert Tokenizer.from_pretrained(tmp_path).encode(text) == byte_level().encode(text)


def test_without_config_no_token_has_a_part():
    tokenizer = sentencepiece()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, None, None)
    assert not tokenizer.has_chat_template


@pytest.mark.parametrize(
    ("text", "words"),
    [(b"bytes", "bytes"), (None, "NoneType"), (["a"], "list"), ("half \ud83d", "U+D83D"), ("\udfff", "surrogate")],
)
def test_what_is_no_text_is_refused(tokenizer, text, words):
    is_error(lambda: tokenizer.encode(text), words)


@pytest.mark.parametrize("id", [-1, 2**32, 2**70, "a", None, 1.0, [1]])
def test_what_is_no_id_is_refused(tokenizer, id):
    is_error(lambda: tokenizer.decode([id]), "id")
    is_error(lambda: tokenizer.token_bytes(id), "id")
    is_error(lambda: tokenizer.detokenizer().feed(id), "id")
    is_error(lambda: tokenizer.detokenizer([id]), "id")


def test_ids_may_come_from_a_tensor(tokenizer):
    torch = pytest.importorskip("torch")
    ids = torch.tensor(tokenizer.encode("Emma"))
    assert tokenizer.decode(ids) == stream(tokenizer, ids) == "Emma"


# --- training


def test_training_is_deterministic():
    again = Tokenizer.train(iter(TEXTS), 400)
    assert again._files == byte_level()._files


def test_a_trained_tokenizer():
    tokenizer = byte_level()
    assert tokenizer.vocab_size == 400
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id) == (0, 0)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    ids = tokenizer.encode("Emma saw")
    assert ids[0] == 1 and 0 not in ids and ids[1:] == tokenizer.encode("Emma saw", add_special_tokens=False)
    assert len(ids) < 8  # words became tokens
    # every byte has its token, whatever was in the texts
    assert {tokenizer.token_bytes(id) for id in range(400)} >= {bytes([byte]) for byte in range(256)}


def test_training_with_other_special_tokens():
    tokenizer = Tokenizer.train([], 300, special_tokens=["[PAD]", "[BOS]", "[EOS]", "[SEP]"], chat_template="hi")
    assert tokenizer.vocab_size == 260
    assert tokenizer.encode("a[SEP]")[0] == 1 and tokenizer.encode("a[SEP]")[-1] == 3
    assert tokenizer.apply_chat_template([]) == "hi"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"vocab_size": 258}, "259"),
        ({"texts": "one string"}, "list of lines"),
        ({"texts": ["a", 5]}, "int"),
        ({"texts": ["a", "\ud800"]}, "surrogate"),
        ({"special_tokens": ["<s>", "</s>"]}, "three or more"),
        ({"special_tokens": ["<s>", "<s>", "</s>"]}, "different"),
        ({"special_tokens": ["", "<s>", "</s>"]}, "different"),
        ({"special_tokens": ["<unk>", "a:b", "</s>"]}, "'a:b'"),
    ],
)
def test_training_refuses(arguments, words):
    is_error(lambda: Tokenizer.train(**({"texts": TEXTS, "vocab_size": 300} | arguments)), words)


def test_an_error_in_the_texts_is_the_callers():
    def broken():
        yield "a"
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        Tokenizer.train(broken(), 300)


# --- files


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "new")
    loaded = Tokenizer.from_pretrained(tmp_path / "new")
    assert loaded._files == tokenizer._files
    text = "".join(TEXTS)
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.bos_token_id == tokenizer.bos_token_id


def test_saving_writes_the_official_files_back_byte_for_byte(tmp_path):
    official().save_pretrained(tmp_path)
    names = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (official_folder() / name).read_bytes()


def test_saving_leaves_no_file_of_another_tokenizer(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("another's")
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "[CLS]"}')
    (tmp_path / "model.safetensors").write_text("not ours")
    byte_level().save_pretrained(tmp_path)
    names = ["model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert not Tokenizer.from_pretrained(tmp_path).has_chat_template


def test_saving_where_one_cannot(tmp_path):
    (tmp_path / "file").write_text("")
    is_error(lambda: byte_level().save_pretrained(tmp_path / "file"), str(tmp_path / "file"))


def test_a_used_tokenizer_can_be_sent_to_another_process():
    tokenizer = Tokenizer.train(TEXTS, 300, chat_template="{{ messages[0].content }}")
    tokenizer.apply_chat_template([{"role": "user", "content": "a"}])
    copied = pickle.loads(pickle.dumps(tokenizer))
    assert copied.encode("Emma") == tokenizer.encode("Emma")


def definition(**changes) -> bytes:
    return json.dumps(json.loads(byte_level()._files["tokenizer.json"]) | changes).encode()


def decoder_of(*steps: dict) -> bytes:
    return definition(decoder={"type": "Sequence", "decoders": list(steps)})


def template_of(template) -> bytes:
    return json.dumps({"chat_template": template}).encode()


NO_SUCH_TOKEN = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "?", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}

BAD_FILES = {
    "truncated": ("tokenizer.json", definition()[:-100], "not valid JSON"),
    "empty": ("tokenizer.json", b"", "not valid JSON"),
    "binary": ("tokenizer.json", b"\xff\xfe\x00", "not UTF-8"),
    "deep": ("tokenizer.json", b"[" * 100_000, "not valid JSON"),
    "list": ("tokenizer.json", b"[]", "JSON object"),
    "no decoder": ("tokenizer.json", b"{}", "decoder None"),
    "null decoder": ("tokenizer.json", definition(decoder=None), "decoder None"),
    "WordPiece": ("tokenizer.json", definition(decoder={"type": "WordPiece"}), "decoder WordPiece"),
    "Metaspace": ("tokenizer.json", decoder_of({"type": "Metaspace"}, {"type": "Fuse"}), "Sequence(Metaspace, Fuse)"),
    "other strip": ("tokenizer.json", decoder_of({"type": "Strip", "start": 2}), "Sequence(Strip)"),
    "odd steps": ("tokenizer.json", definition(decoder={"type": "Sequence", "decoders": 3}), "Sequence()"),
    "no model": ("tokenizer.json", definition(model=None), "tokenizers library"),
    "other model": ("tokenizer.json", definition(model={"type": "Other"}), "tokenizers library"),
    "missing special token": (
        "tokenizer.json",
        definition(post_processor=NO_SUCH_TOKEN),  # the library panics on this one, when it encodes
        "tokenizers library",
    ),
    "broken config": ("tokenizer_config.json", b"{", "not valid JSON"),
    "binary config": ("tokenizer_config.json", b"\x80", "not UTF-8"),
    "list config": ("tokenizer_config.json", b"[]", "JSON object"),
    "unknown token": ("tokenizer_config.json", b'{"bos_token": "[CLS]"}', "bos_token is '[CLS]'"),
    "odd token": ("tokenizer_config.json", b'{"eos_token": 2}', "eos_token is 2"),
    "half character": ("tokenizer_config.json", b'{"eos_token": "\\ud800"}', "eos_token"),
    "odd template": ("tokenizer_config.json", template_of(5), "chat_template"),
    "odd templates": ("tokenizer_config.json", template_of(["a"]), "chat_template"),
    "odd named template": ("tokenizer_config.json", template_of([{"name": "default"}]), "chat_template"),
    "broken map": ("special_tokens_map.json", b"nothing", "not valid JSON"),
    "binary template": ("chat_template.jinja", b"\xc3", "not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_FILES, ids=str)
def test_bad_files_are_named(tmp_path, case):
    name, content, words = BAD_FILES[case]
    byte_level().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    is_error(lambda: Tokenizer.from_pretrained(tmp_path), str(tmp_path / name), words)


def test_no_tokenizer_in_the_folder(tmp_path):
    is_error(lambda: Tokenizer.from_pretrained(tmp_path), "no tokenizer.json", str(tmp_path))
    is_error(lambda: Tokenizer.from_pretrained(tmp_path / "absent"), "no tokenizer.json", "absent")


# --- chat


def say(role: str, content: str) -> dict:
    return {"role": role, "content": content}


TALK = [say("system", " Be brief. "), say("user", "Hi\n"), say("assistant", "Hello."), say("tool", " 42 "),
        say("user", "Bye")]  # fmt: skip
ENDED = "<extra_id_1>User\nHi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>Tool\n42\n<extra_id_1>User\nBye\n"
TURNS = ENDED + "<extra_id_1>Assistant\n"
TOOLS = [{"name": "zoë", "description": "<a> & 'b'"}, {"b": 1, "a": [True, None]}]
TOOL_LINES = (
    '\n<tool> {"name": "zoë", "description": "<a> & \'b\'"} </tool>\n<tool> {"b": 1, "a": [true, null]} </tool>'
)
CONTEXTS = [" One. ", "Two."]
CONTEXT_LINES = "\n<context> One. </context>\n<context> Two. </context>"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, f"<extra_id_0>System\nBe brief.\n\n{TURNS}"),
        ({"add_generation_prompt": False}, f"<extra_id_0>System\nBe brief.\n\n{ENDED}"),
        ({"tools": TOOLS}, f"<extra_id_0>System\nBe brief.\n{TOOL_LINES}\n\n{TURNS}"),
        ({"contexts": CONTEXTS}, f"<extra_id_0>System\nBe brief.\n{CONTEXT_LINES}\n\n{TURNS}"),
        (
            {"tools": TOOLS, "contexts": CONTEXTS},
            f"<extra_id_0>System\nBe brief.\n{TOOL_LINES}\n{CONTEXT_LINES}\n\n{TURNS}",
        ),
        ({"messages": TALK[1:]}, f"<extra_id_0>System\n\n{TURNS}"),
        ({"messages": TALK[1:], "tools": TOOLS}, f"<extra_id_0>System{TOOL_LINES}\n\n{TURNS}"),
        ({"messages": [], "tools": [], "contexts": []}, "<extra_id_0>System\n\n<extra_id_1>Assistant\n"),
    ],
)  # fmt: skip
def test_official_template(arguments, expected):
    assert official().apply_chat_template(**({"messages": TALK} | arguments)) == expected


def test_official_turn_end():
    assert official().turn_end() == "<extra_id_1>User"


def chat(template) -> Tokenizer:
    return Tokenizer.train([], 259, chat_template=template)


PLAIN = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, None),
        (PLAIN, "<|user|>"),
        (PLAIN.replace("m.content }}", "m.content }}</s>"), None),  # no decoded text ever has it; the token stops
        (PLAIN.replace("m.content }}", "m.content }}END</s>"), "END"),
        ("{% for m in messages %}{{ m.content }}\n\n{% endfor %}", None),  # only space between
        ("{% for m in messages %}{{ m.content | upper }};{% endfor %}", None),
        ("{{ messages[0].content }}", None),
    ],
)
def test_turn_end(template, expected):
    assert chat(template).turn_end() == expected


def test_template_sees_the_special_tokens_and_trims_blocks():
    template = (
        "{{ bos_token }}\n  {% if true %}\n{{ messages[0].content }}{{ eos_token }}{{ pad_token }}\n  {% endif %}\n"
    )
    assert chat(template).apply_chat_template([say("user", "a")]) == "<s>\na</s><unk>\n"


def test_a_token_without_a_name_is_nothing():
    files = {"tokenizer.json": sentencepiece_backend(), "chat_template.jinja": "[{{ bos_token }}]"}
    assert Tokenizer(files).apply_chat_template([]) == "[]"


def test_where_the_template_comes_from(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    assert chat(named).apply_chat_template([]) == "default"
    assert not chat(named[:1]).has_chat_template
    chat(named).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("fileé", encoding="utf-8")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.apply_chat_template([]) == "fileé"
    tokenizer.save_pretrained(tmp_path / "again")
    assert Tokenizer.from_pretrained(tmp_path / "again").apply_chat_template([]) == "fileé"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "template"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("one\n{% if %}", "line 2"),
        ("{% include '/etc/passwd' %}", "template"),
        ("{{ nothing.here }}", "nothing"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ tools | tojson }}{{ cycle() | tojson }}", "cycle"),
    ],
)
def test_a_template_that_fails_or_breaks_out_is_refused(template, words):
    is_error(lambda: chat(template).apply_chat_template([say("user", "a")]), "template", words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"messages": "hello"}, "list of dicts"),
        ({"messages": say("user", "a")}, "list of dicts"),
        ({"messages": [say("user", "a"), "b"]}, "messages[1]"),
        ({"messages": [{"role": "user"}]}, "'content'"),
        ({"messages": [{"content": "a"}]}, "'role'"),
        ({"messages": [say("user", None)]}, "'content'"),
        ({"messages": [say("user", [{"type": "text", "text": "a"}])]}, "'content'"),
        ({"messages": [say(1, "a")]}, "'role'"),
        ({"tools": "f"}, "list of dict"),
        ({"tools": ["f"]}, "list of dict"),
        ({"contexts": "a passage"}, "list of str"),
        ({"contexts": [1]}, "list of str"),
    ],
)
def test_messages_of_another_shape_are_refused(arguments, words):
    is_error(lambda: chat(PLAIN).apply_chat_template(**({"messages": [say("user", "a")]} | arguments)), words)


def test_without_a_template():
    is_error(lambda: byte_level().apply_chat_template([say("user", "a")]), "no chat template")
