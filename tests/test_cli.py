"""The command line: what it prints, what it exits with, and that a mistake costs one line."""

import io
import json
import os
import pty
import re
import resource
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import OTHER_ARCHITECTURES, TINY

from hymba import LLM, Hymba, HymbaConfig, SamplingParams, Tokenizer, __version__
from hymba.cli import VERBS, run
from hymba.cli.convert import parse_size
from hymba.cli.terminal import printable
from hymba.cost import LLAMA_3B, cache_bytes, parameters
from hymba.engine.sequence import Sequence
from hymba.errors import UserError
from hymba.ops import library

pytest_plugins = "tiny_llm"

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "It is a truth"
SHORT = ("--max-tokens", "6", "--temperature", "0")


@pytest.fixture
def hymba(capfd, monkeypatch):
    """Run a command in this process -> exit status, stdout, stderr."""

    def call(*arguments: object, stdin: bytes | None = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(
            "sys.stdin", None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
        )
        capfd.readouterr()
        status = run([str(argument) for argument in arguments])
        return status, *capfd.readouterr()

    return call


def start(*arguments: object, **options) -> subprocess.Popen:
    """Run a command in a process of its own."""
    # a shell that runs these tests in the background has its children ignore interrupts
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **heeding, **options}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "hymba", *map(str, arguments)], env=environment, **options)


def assert_one_line(err: str, *words: str) -> None:
    assert err.startswith("hymba: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err and all(word in err for word in words), err


# ------------------------------------------------------------------------------------------------------- help and speed


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, hymba):
    status, out, err = hymba(verb, "--help")
    assert (status, err) == (0, "")
    assert "Example" in out and f"\n    hymba {verb} " in out
    assert max(map(len, out.splitlines())) <= 110
    [summary] = [line for line in hymba("--help")[1].splitlines() if line.split()[:1] == [verb]]
    assert VERBS[verb] in summary
    # every option says what it does
    for option in out.split("Options:")[1].split("\n  -")[1:]:
        assert len(" ".join(option.split("Example")[0].split("  ", 1)[-1:]).split()) > 1, option


def test_without_a_verb_it_explains_itself(hymba):
    assert hymba() == hymba("--help") == hymba("-h")
    assert hymba()[0] == 0
    assert hymba("--version") == (0, f"hymba {__version__}\n", "")


IMPORTS = """
import sys, time
began = time.perf_counter()
import hymba, hymba.cli
seconds = time.perf_counter() - began
assert "torch" not in sys.modules, "torch is imported"
hymba.SamplingParams
assert "torch" not in sys.modules, "torch is imported for the parameters"
assert set(hymba.__all__) >= {"Hymba", "LLM", "SamplingParams"} and dir(hymba) == sorted(hymba.__all__)
assert seconds < 2, seconds
hymba.LLM, hymba.Hymba
try:
    hymba.nothing
except AttributeError as error:
    assert "nothing" in str(error)
"""


def test_import_is_instant():
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "--help"], ["generate", "-m", "x", "--top-p", "2", "y"]], ids=" ".join
)
def test_help_and_mistakes_do_not_wait_for_torch(arguments):
    code = f"import sys\nfrom hymba.cli import run\nrun({arguments!r})\nassert 'torch' not in sys.modules"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 3  # a second on a machine that does nothing else


# ------------------------------------------------------------------------------------------------------------- mistakes

MISTAKES = {
    "no folder": (["generate", "-m", "no/such/folder", "x"], "no/such/folder"),
    "a file": (["generate", "-m", "pyproject.toml", "x"], "is a file"),
    "no checkpoint": (["generate", "-m", "{empty}", "x"], "config.json"),
    "no model for info": (["info", "7B"], "7B"),
    "no model for convert": (["convert", "{empty}", "{empty}/copy"], "config.json"),
    "unknown verb": (["sing"], "sing", "generate", "chat"),
    "unknown option": (["generate", "--loud", "x"], "--loud"),
    "no verb but an option": (["--loud"], "--loud", "hymba --help"),
    "argument missing": (["convert"], "SOURCE"),
    "no number": (["generate", "-m", "{model}", "--max-tokens", "many", "x"], "--max-tokens", "many"),
    "temperature": (["generate", "-m", "{model}", "--temperature", "-1", "x"], "temperature", "-1"),
    "nan": (["generate", "-m", "{model}", "--top-p", "nan", "x"], "top_p"),
    "no tokens": (["generate", "-m", "{model}", "--max-tokens", "0", "x"], "max_tokens"),
    "seed": (["generate", "-m", "{model}", "--seed", "-1", "x"], "seed"),
    "empty stop text": (["generate", "-m", "{model}", "--stop", "", "x"], "stop"),
    "no completion": (["generate", "-m", "{model}", "--n", "0", "x"], "n must be"),
    "device": (["generate", "-m", "{model}", "--device", "toaster", "x"], "toaster"),
    "dtype": (["generate", "-m", "{model}", "--dtype", "int3", "x"], "int3"),
    "context too long": (["generate", "-m", "{model}", "--max-length", "9999", "x"], "max_length", "512"),
    "no batch": (["generate", "-m", "{model}", "--max-batch", "0", "x"], "--max-batch"),
    "empty prompt": (["generate", "-m", "{model}", ""], "empty"),
    "one empty prompt of two": (["generate", "-m", "{model}", "x", ""], "prompt 2", "empty"),
    "empty stdin": (["generate", "-m", "{model}"], "stdin is empty"),
    "blank lines": (["generate", "-m", "{model}", "--lines"], "stdin is empty"),
    "missing file": (["generate", "-m", "{model}", "-f", "{empty}/none.txt"], "none.txt"),
    "a folder for a file": (["generate", "-m", "{model}", "-f", "{empty}"], "directory"),
    "too long": (["generate", "-m", "{model}", "word " * 600], "tokens, the context 512"),
    "no text": (["generate", "-m", "{model}", "a\udc80b"], "surrogate"),
    "logprobs without effect": (["generate", "-m", "{model}", "--logprobs", "2", "x"], "--json"),
    "lines without effect": (["generate", "-m", "{model}", "--lines", "x"], "--lines"),
    "info beyond the context": (["info", "1.5B", "--context", "9000"], "9000", "8192"),
    "no size": (["convert", "{model}", "{empty}/copy", "--max-shard", "big"], "big", "500MB"),
    "size of nothing": (["convert", "{model}", "{empty}/copy", "--max-shard", "0.1B"], "0.1B"),
    "target is a file": (["convert", "{model}", "{model}/config.json"], "config.json"),
    "no chat": (["chat", "-m", "{mute}"], "chat template"),
    "chat cannot": (["chat", "-m", "{model}", "--n", "2"], "--n"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_2(name, hymba, checkpoint, tmp_path):
    arguments, *words = MISTAKES[name]
    empty, mute = tmp_path / "empty", tmp_path / "mute"
    empty.mkdir()
    mute.mkdir()
    for file in checkpoint.iterdir():
        (mute / file.name).symlink_to(file)
    (mute / "tokenizer_config.json").unlink()
    places = {"{model}": checkpoint, "{empty}": empty, "{mute}": mute}
    for place, path in places.items():
        arguments = [argument.replace(place, str(path)) for argument in arguments]
    status, out, err = hymba(*arguments, stdin=b"\n\n" if "blank" in name else b"")
    assert (status, out) == (2, "")
    assert_one_line(err, *words)
    assert not list(empty.iterdir())


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_stdin_that_is_no_utf8(verb, hymba, checkpoint):
    status, _, err = hymba(verb, "-m", checkpoint, *SHORT, stdin=b"caf\xe9 au lait\n")
    assert status == 2
    assert_one_line(err, "stdin is not UTF-8 (byte 3)")


def test_no_stdin_at_all(hymba, checkpoint):
    status, _, err = hymba("generate", "-m", checkpoint, stdin=None)
    assert status == 2
    assert_one_line(err, "there is no prompt")


def test_a_fault_of_ours_is_exit_1(hymba, monkeypatch):
    def fail(*_):
        raise RuntimeError("the second line\nis not shown")

    monkeypatch.setattr("hymba.cli.info.describe", fail)
    status, _, err = hymba("info", "1.5B")
    assert status == 1
    assert_one_line(err, "internal error, RuntimeError: the second line (", "HYMBA_TRACEBACK=1")
    monkeypatch.setenv("HYMBA_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        run(["info", "1.5B"])


@pytest.mark.parametrize("limit", [2000, 100_000])
def test_a_full_disk_leaves_nothing_behind(limit, checkpoint, tmp_path):
    """The system refuses files beyond a size: at the index, or in the middle of the weights."""
    process = start(
        "convert", checkpoint, tmp_path / "copy", "--max-shard", "1MB",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    out, err = (stream.decode() for stream in process.communicate(timeout=60))
    assert (process.returncode, out) == (2, "")
    assert_one_line(err, "copy", "cannot write", "make room")
    assert not (tmp_path / "copy").exists() or not list((tmp_path / "copy").iterdir())


def test_the_reader_may_go(checkpoint, tmp_path):
    """As with `| head -1`: no complaint, and the status of a process that SIGPIPE ended."""
    (tmp_path / "prompts").write_text(f"{PROMPT}\n" * 40)
    process = start("generate", "-m", checkpoint, "-f", tmp_path / "prompts", "--lines", "--json", *SHORT)
    assert json.loads(process.stdout.readline())["prompt"] == PROMPT
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""


def test_an_interrupt_is_exit_130(checkpoint, tmp_path):
    # far from done when the first one is, on a busy machine too
    (tmp_path / "prompts").write_text(f"{PROMPT}\n" * 2000)
    process = start("generate", "-m", checkpoint, "-f", tmp_path / "prompts", "--lines", "--max-batch", "1", *SHORT)
    assert process.stdout.readline() == b"--- prompt 1\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert_one_line(err.decode(), "interrupted")


# ------------------------------------------------------------------------------------------------------------- generate


@pytest.fixture(scope="module")
def expected(checkpoint):
    """What the Python API says."""
    llm = LLM(checkpoint)
    return lambda prompts, **fields: llm.generate(prompts, SamplingParams(max_tokens=6, **{"temperature": 0, **fields}))


def test_generate_prints_prompt_and_completion(hymba, checkpoint, expected, tmp_path):
    [output] = expected(PROMPT)
    whole = (0, PROMPT + output.text + "\n", "")
    assert hymba("generate", "-m", checkpoint, PROMPT, *SHORT) == whole
    assert hymba("generate", "-m", checkpoint, *SHORT, stdin=PROMPT.encode() + b"\n") == whole
    (tmp_path / "prompt").write_bytes(b"\xef\xbb\xbf" + PROMPT.encode())  # with a byte order mark, as some editors do
    assert hymba("generate", "-m", checkpoint, "-f", tmp_path / "prompt", *SHORT) == whole
    assert hymba("generate", "-m", checkpoint, "-f", "-", *SHORT, stdin=PROMPT.encode()) == whole
    assert hymba("generate", "-m", checkpoint, PROMPT, "--stream", *SHORT) == whole


def test_a_cache_in_8_bits(hymba, checkpoint, monkeypatch):
    asked = []
    new_cache = Hymba.new_cache
    monkeypatch.setattr(Hymba, "new_cache", lambda self, *a: asked.append(new_cache(self, *a)) or asked[-1])
    [output] = LLM(checkpoint, cache="int8").generate(PROMPT, SamplingParams(max_tokens=6, temperature=0))
    whole = (0, PROMPT + output.text + "\n", "")
    assert hymba("generate", "-m", checkpoint, PROMPT, *SHORT, "--cache", "int8") == whole
    assert [cache.kind for cache in asked] == ["int8", "int8"]


def test_many_prompts_from_everywhere_keep_their_order(hymba, checkpoint, expected, tmp_path):
    (tmp_path / "lines").write_bytes("one\r\n\n \t\n  two\nthree\u2028still\n".encode())
    texts = ["zero", "one", "  two", "three\u2028still", "four"]
    sources = ["zero", "-f", tmp_path / "lines", "-f", "-", "--lines"]
    arguments = ["generate", "-m", checkpoint, *sources, "--max-batch", 2, *SHORT]
    status, out, err = hymba(*arguments, "--json", stdin=b"four")
    records = [json.loads(line) for line in out.split("\n")[:-1]]
    assert (status, err) == (0, "")
    assert [r["prompt"] for r in records] == texts and [r["prompt_index"] for r in records] == list(range(5))
    for record, output in zip(records, expected(texts), strict=True):
        found = record["text"], record["token_ids"], record["finish_reason"]
        assert found == (output.text, output.token_ids, output.finish_reason)
    _, out, _ = hymba(*arguments, stdin=b"four")
    assert out == "".join(f"--- prompt {i + 1}\n{r['prompt']}{r['text']}\n" for i, r in enumerate(records))


def test_several_completions(hymba, checkpoint, expected):
    options = ["--n", 2, "--seed", 3, "--max-tokens", 6, "--logprobs", 2, "--json"]
    arguments = ["generate", "-m", checkpoint, PROMPT, "Anne", *options]
    status, out, _ = hymba(*arguments)
    records = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [(r["prompt_index"], r["completion_index"]) for r in records] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    texts = [c.text for output in expected([PROMPT, "Anne"], n=2, seed=3, temperature=1.0) for c in output.completions]
    assert [r["text"] for r in records] == texts
    assert all(len(e["top"]) == 2 and e["logprob"] <= 0 for r in records for e in r["logprobs"])


def test_streamed_json_adds_up(hymba, checkpoint, expected):
    _, out, _ = hymba("generate", "-m", checkpoint, PROMPT, "Anne", "--stream", "--json", *SHORT)
    texts, ends = ["", ""], [None, None]
    for piece in map(json.loads, out.splitlines()):
        texts[piece["prompt_index"]] += piece["text"]
        ends[piece["prompt_index"]] = piece["finish_reason"]
    assert texts == [output.text for output in expected([PROMPT, "Anne"])] and ends == ["length"] * 2


def test_streams_of_many_prompts_are_labelled_lines(hymba, checkpoint, expected):
    prompts = ["One line\nand another", "Anne"]
    _, out, err = hymba("generate", "-m", checkpoint, *prompts, "--stream", *SHORT)
    assert err == "" and out.endswith("\n")
    for label, output in enumerate(expected(prompts), 1):
        # what the model says may hold line ends of other kinds
        lines = [line.removeprefix(f"[{label}] ") for line in out.split("\n") if line.startswith(f"[{label}] ")]
        assert "\n".join(lines) == output.prompt + output.text


def test_stop_texts_and_ids(hymba, checkpoint, expected):
    [output] = expected(PROMPT)
    arguments = ["generate", "-m", checkpoint, PROMPT, "--json", *SHORT]
    record = json.loads(hymba(*arguments, "--stop", "zzzz", "--stop-token-ids", output.token_ids[0])[1])
    assert record["token_ids"] == output.token_ids[:1] and record["finish_reason"] == "stop" and record["text"] == ""


def test_a_pipe_gets_the_text_alone(checkpoint):
    """Nothing on stderr, no colours and no bar where nobody looks: all output is the text."""
    process = start("generate", "-m", checkpoint, PROMPT, "Anne", *SHORT, stdin=subprocess.PIPE)
    out, err = process.communicate(b"", timeout=60)
    assert process.returncode == 0 and err == b"" and b"\x1b" not in out


def test_a_terminal_is_not_commanded_by_a_model(monkeypatch):
    text = "\x1b]0;title\x07 tab\t line\r\n back\rward \x9b31m é 😀"
    assert printable(text) == text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert printable(text) == "\ufffd]0;title\ufffd tab\t line\r\n back\ufffdward \ufffd31m é 😀"


# ------------------------------------------------------------------------------------------------ info, convert, doctor


def test_info_says_what_the_formulas_say(hymba, checkpoint):
    status, out, _ = hymba("info", "1.5B", "--context", 8192, "--batch", 8, "--json")
    facts, config = json.loads(out), HymbaConfig.preset("1.5B")
    assert status == 0 and facts["parameters"].pop("total") == sum(parameters(config).values()) == 1_522_797_824
    assert facts["parameters"] == parameters(config) and facts["config"]["n_layers"] == 32
    one = json.loads(hymba("info", "1.5B", "--json")[1])
    assert (one["context"], one["batch"], one["dtype"]) == (8192, 1, "bfloat16")
    assert facts["cache_bytes"].items() >= cache_bytes(config, 8, 8192, 2).items()
    assert one["cache_bytes"]["kv_if_meta_were_stored_per_sequence"] <= 79e6  # the paper's figure
    assert facts["llama_3_2_3b_kv_bytes"] == LLAMA_3B.kv_bytes(8, 8192, 2) == 8 * one["llama_3_2_3b_kv_bytes"]
    small = json.loads(hymba("info", "1.5B", "--cache", "int8", "--json")[1])
    assert small["cache_bytes"].items() >= cache_bytes(config, 1, 8192, 2, "int8").items()
    assert (small["kv_dtype"], one["kv_dtype"]) == ("int8", "bfloat16")
    of_file = json.loads(hymba("info", checkpoint, "--json")[1])
    assert (of_file["context"], of_file["dtype"]) == (512, "float32")


@pytest.mark.parametrize(
    "arguments",
    [
        ["1.5B", "--batch", 8],
        ["350M", "--context", 100, "--dtype", "float32"],
        ["{model}"],
        ["1.5B", "--cache", "int8"],
    ],
    ids=str,
)
def test_info_fits_a_terminal(arguments, hymba, checkpoint):
    arguments = [checkpoint if argument == "{model}" else argument for argument in arguments]
    status, out, err = hymba("info", *arguments)
    assert (status, err) == (0, "")
    lines = out.splitlines()[1:]  # after the name
    assert max(map(len, lines)) <= 80 and "Llama-3.2-3B" in out and "\x1b" not in out
    total = json.loads(hymba("info", *arguments, "--json")[1])["parameters"]["total"]
    assert f"{total:,}" in out


@pytest.mark.parametrize(
    "changes",
    [{"window": None, "global_layers": ()}, {"n_meta": 0}, {"rope": "none", "rope_original_length": None},
     *OTHER_ARCHITECTURES.values()],
    ids=str,
)  # fmt: skip
def test_info_of_other_models(changes, hymba, tmp_path):
    Hymba(replace(TINY, **changes)).save_pretrained(tmp_path)
    status, out, _ = hymba("info", tmp_path)
    assert status == 0 and "None" not in out and "0 meta tokens" not in out
    assert max(map(len, out.splitlines()[1:])) <= 80
    mixers = changes.get("mixers", ["hybrid"])
    assert ("Mamba-2" in out) == ("mamba2" in mixers)
    assert ("for queries" in out) == any(mixer in ("hybrid", "attention") for mixer in mixers)


@pytest.mark.parametrize("shard", [None, "300KB"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_convert_keeps_the_model(shard, dtype, hymba, checkpoint, tmp_path):
    arguments = [] if shard is None else ["--max-shard", shard]
    status, out, err = hymba("convert", checkpoint, tmp_path / "copy", "--dtype", dtype, *arguments)
    files = sorted(path.name for path in (tmp_path / "copy").glob("*.safetensors"))
    assert (status, err) == (0, "") and f"in {len(files)} file" in out and (len(files) > 1) == bool(shard)
    before = Hymba.from_pretrained(checkpoint, dtype="float32" if dtype == "auto" else dtype)
    after = Hymba.from_pretrained(tmp_path / "copy")
    for (name, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype, name
    one, two = (Tokenizer.from_pretrained(folder).encode(PROMPT) for folder in (checkpoint, tmp_path / "copy"))
    assert one == two
    assert hymba("generate", "-m", tmp_path / "copy", PROMPT, *SHORT)[0] == 0


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 5 * 10**8), ("2 gb", 2 * 10**9), ("1.5KB", 1500), ("7", 7), ("7B", 7)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1TB", "1e3", "0", "nan"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError):
        parse_size(text)


def test_doctor(hymba):
    status, out, err = hymba("doctor", "--json")
    facts = json.loads(out)
    assert (status, err) == (0, "")
    assert facts["hymba"] == __version__ and facts["packages"]["torch"] == torch.__version__
    assert {"machine", "processor", "memory", "GPU", "dtypes", "backends"} <= facts.keys()
    status, out, err = hymba("doctor")
    assert (status, err) == (0, "") and all(name in out for name in facts)


# ----------------------------------------------------------------------------------------------------------------- chat

TALK = ("--max-tokens", 8, "--seed", 1)


def test_a_conversation_is_saved_and_goes_on(hymba, checkpoint, tmp_path):
    file = tmp_path / "talk"
    lines = f"Hello\n\n/save {file}\nHow are you?\n/reset\nHello\n/help\n/quit\nnever said\n"
    status, out, err = hymba("chat", "-m", checkpoint, *TALK, "--system", "Be brief.", stdin=lines.encode())
    assert (status, err) == (0, "") and "Saved 3 messages" in out and "/load FILE" in out
    first, rest = out.split(f"Saved 3 messages to {file}.\n")
    second, again = rest.split("A new conversation.\n")
    assert again.startswith(first)  # the same seed, and nothing of the past
    status, out, _ = hymba("chat", "-m", checkpoint, *TALK, stdin=f"/load {file}\nHow are you?\n".encode())
    assert status == 0 and out == f"Loaded 3 messages from {file}.\n" + second


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("/sing", "/sing"),
        ("/save", "file name"),
        ("/load none", "none"),
        ("/save pyproject.toml/talk", "pyproject.toml"),
        ("long " * 600, "the context holds 512"),
    ],
)
def test_a_slip_in_a_script_ends_it(line, word, hymba, checkpoint):
    status, _, err = hymba("chat", "-m", checkpoint, *TALK, stdin=f"Hello\n{line}\nHello\n".encode())
    assert status == 2
    assert_one_line(err, word)


class Person(io.TextIOWrapper):
    """Somebody at a terminal, who types lines, or who interrupts."""

    def __init__(self, *deeds: str | type[BaseException]):
        super().__init__(io.BytesIO())
        self._deeds = iter(deeds)

    def isatty(self) -> bool:
        return True

    def input(self, _prompt: str) -> str:
        deed = next(self._deeds, EOFError)
        if isinstance(deed, str):
            return deed
        raise deed


def test_a_slip_at_a_terminal_costs_nothing(checkpoint, capfd, monkeypatch, tmp_path):
    """A mistake or Ctrl-C at the prompt does nothing, Ctrl-C in a reply ends the reply only, Ctrl-D ends the talk."""
    count, append = 0, Sequence.append

    def interrupted(self, logits) -> None:
        nonlocal count
        count += 1
        append(self, logits)
        if count == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Sequence, "append", interrupted)
    talk = "long " * 600, "/sing", KeyboardInterrupt, "Hello", f"/save {tmp_path / 'talk'}", "/load none", "Go on"
    person = Person(*talk)
    monkeypatch.setattr("sys.stdin", person)
    monkeypatch.setattr("builtins.input", person.input)
    assert run(["chat", "-m", str(checkpoint), "--max-tokens", "8", "--seed", "1", "--ignore-eos"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("Say something; /help lists the commands.\n\n") and out.endswith("\n\n")
    assert "(stopped)\nSaved 2 messages" in out and out.count("(cut off") == 1
    assert [re.sub(r"\d+ tokens|;.*", "", line) for line in err.splitlines()] == [
        "hymba: the conversation would have , the context holds 512",
        "hymba: unknown command /sing",
        "hymba: none: no such file",
    ]


@pytest.mark.slow
def test_chat_in_a_real_terminal(checkpoint):
    ours, theirs = pty.openpty()
    options = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = start("chat", "-m", checkpoint, "--max-tokens", 8, **options)
    seen = b""

    def expect(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            assert select.select([ours], [], [], 30)[0], seen
            seen += os.read(ours, 4096)
        seen = seen.split(text, 1)[1]

    expect(b"> ")
    os.write(ours, b"/sing\n")
    expect(b"hymba: unknown command /sing")
    expect(b"> ")
    os.write(ours, b"Hello\n")
    expect(b"Hello\r\n")
    expect(b"> ")
    os.write(ours, b"\x04")
    assert process.wait(timeout=30) == 0
    os.close(theirs)
    os.close(ours)


# --------------------------------------------------------------------------------------------------------------- bench

needs_native = pytest.mark.skipif(not library.available(), reason=library.status())


@needs_native
@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("decode", "prefill", "train", "--precision", "float32"), ["decode", "prefill", "  its", "training"]),
        (("decode", "--precision", "int8", "--precision", "int4", "--batch", 3), ["decode", "decode"]),
        (
            ("decode", "--cache", "model", "--cache", "int8"),
            ["decode", "decode bfloat16, batch 1, context 40, int8 cache"],
        ),
        (("prefill", "--cache", "int8"), ["prefill bfloat16, 40 tokens, int8 cache", "  its"]),
    ],
    ids=str,
)
def test_bench_measures_what_it_is_asked_for(arguments, names, hymba):
    status, out, _ = hymba("bench", *arguments, "--model", "tiny", "--context", 40, "--repeats", 1, "--json")
    rows = json.loads(out)["rows"]
    assert status == 0 and all(row["name"].startswith(name) for row, name in zip(rows, names, strict=True))
    assert all(row["tokens_per_second"] > 0 and row["share_of_limit"] > 0 for row in rows)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bench_counts_what_a_step_reads_of_a_cache_in_8_bits(dtype):
    """What is allocated for the tokens that are there and the new one, and the meta tokens."""
    from hymba.bench.workloads import cache_bytes_read, filled_cache

    model = Hymba(HymbaConfig.preset("tiny")).to(dtype)
    cache = filled_cache(model, 3, 40, 1, "int8")
    assert all(x.any() for store in cache.stores.values() for x in store.values())
    meta = sum(state.meta.k.nbytes + state.meta.v.nbytes for state in cache.meta if state.meta)
    assert cache_bytes_read(cache, 40) == sum(cache.bytes().values()) - cache.bytes()["meta"] + meta


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_gpu_says_that_there_is_none(hymba):
    status, out, err = hymba("bench", "gpu")
    assert (status, out) == (2, "")
    assert_one_line(err, "CUDA GPU", "hymba bench")


@needs_native
def test_bench_does_not_train_quantised_weights(hymba):
    status, out, err = hymba("bench", "train", "--precision", "int8")
    assert (status, out) == (2, "")
    assert_one_line(err, "int8", "--precision")
    status, out, err = hymba("bench", "train", "--cache", "int8")
    assert (status, out) == (2, "")
    assert_one_line(err, "--cache")


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_an_untied_embedding_is_looked_up_not_read(precision):
    from hymba.bench.workloads import random_model, weight_bytes

    tied, untied = (
        weight_bytes(random_model(HymbaConfig.preset("tiny", tie_embeddings=tie), precision)) for tie in (True, False)
    )
    assert tied == untied
