"""Mutated checkpoints thrown at the loader: it loads them or says in one line what is wrong, at once, in little memory.

Each kind of mutation runs for some seconds here, always the same ones, and for minutes with new ones under `slow`.
"""

import json
import resource
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, with_header
from conftest import tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hymba import Hymba, UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")

SECONDS = 2  # for a load
MEMORY = 2**28  # bytes that a load may map beyond what the process has; the checkpoint itself has 100 kB
IDS = torch.tensor([[3, 1, 4]])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[bool, dict[str, bytes]]:
    """Files of a good checkpoint, as one file and in shards."""
    folder = tmp_path_factory.mktemp("whole")
    model = tiny_model(n_layers=3, global_layers=(0,), kv_groups=((1, 2),), vocab_size=16, d_model=16, d_ff=8)
    found = {}
    for sharded in (False, True):
        model.save_pretrained(folder, max_shard_bytes=20_000 if sharded else None)
        found[sharded] = {path.name: path.read_bytes() for path in folder.iterdir()}
    Hymba.from_pretrained(folder)(IDS)  # whatever is imported or compiled once
    return found


@contextmanager
def bounded():
    """More memory than allowed is a `MemoryError`, more time a `TimeoutError`."""

    def late(number, frame):
        raise TimeoutError

    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 5 * SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def outcome(folder: Path, files: dict[str, bytes]) -> str | None:
    """Load a checkpoint of these files -> the one line of refusal, or None if it loads, and then it runs."""
    shutil.rmtree(folder, ignore_errors=True)  # not written over: an earlier model may be mapped
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    with bounded():
        start = time.process_time()
        try:
            model = Hymba.from_pretrained(folder)
            assert model(IDS).shape == (1, 3, model.config.vocab_size)
            message = None
        except UserError as error:
            message = str(error)
            assert len(message.splitlines()) == 1 and 20 < len(message) < 1000, message
        assert time.process_time() - start < SECONDS
    return message


# ----------------------------------------------------------------------------------------------------------- mutations

numbers = st.one_of(
    st.integers(-3, 40),
    st.integers(),
    st.sampled_from([2**24, 2**31, 2**32 - 1, 2**40, 2**53, 2**63 - 1, 2**64 - 1, 10**9, 10**30, 10**400]),
    st.integers(0, 40).map(float),
    st.floats(),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8), st.sampled_from(["h", "auto", "x" * 99999]))
anything = st.one_of(
    scalars,
    st.recursive(scalars, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=4), x, max_size=3)),
    st.lists(st.lists(st.integers(-1, 4), max_size=4), max_size=4),
    st.integers(1, 500).map(lambda depth: json.loads("[" * depth + "]" * depth)),
)


def paths(value, prefix=()) -> list[tuple]:
    """Where in a JSON value something could be changed."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *(path for key, item in inside for path in paths(item, (*prefix, key)))]


@st.composite
def json_mutations(draw, value):
    """`value` with a few places changed, removed, added, swapped or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from(paths(value)[1:])) if paths(value)[1:] else (None,)
        if last is None:
            return draw(anything)
        place = value
        for key in above:
            place = place[key]
        match draw(st.sampled_from(["change", "change", "nudge", "remove", "copy", "rename", "all"])):
            case "change":
                place[last] = draw(anything)
            case "nudge" if isinstance(place[last], int | float):
                place[last] = draw(st.sampled_from([place[last] - 1, place[last] + 1, -place[last], place[last] * 2]))
            case "remove":
                del place[last]
            case "copy":
                place[last] = draw(st.sampled_from(list(place.values() if isinstance(place, dict) else place)))
            case "rename" if isinstance(place, dict):
                new = draw(st.text(max_size=8) | st.sampled_from(list(place)))
                place[new] = place.pop(last)
            case "all":
                return draw(anything)
    return value


@st.composite
def byte_mutations(draw, data: bytes, edges: tuple[int, ...] = ()):
    """`data` with bytes changed, put in, taken out or cut off; `edges` are places where that may matter."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        anywhere = st.integers(0, max(len(data) - 1, 0))
        near = st.builds(int.__add__, st.sampled_from((0, len(data), *edges)), st.integers(-9, 9))
        first, n = min(max(draw(anywhere | near), 0), len(data)), draw(st.integers(0, 16) | anywhere)
        match draw(st.sampled_from(["flip", "insert", "delete", "cut", "overwrite"])):
            case "flip" if first < len(data):
                data[first] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                data[first:first] = draw(st.binary(max_size=20))
            case "delete":
                del data[first : first + n]
            case "cut":
                del data[first:]
            case "overwrite":
                new = draw(st.binary(max_size=20) | st.sampled_from([b"\0" * 8, b"\xff" * 8, b'"', b"[", b"{", b"9"]))
                data[first : first + len(new)] = new
    return bytes(data)


def split(data: bytes) -> tuple[dict, bytes]:
    """A safetensors file -> header, body"""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@st.composite
def configs(draw, whole):
    """Another config beside good weights."""
    values = draw(json_mutations(json.loads(whole[False][CONFIG_FILE])))
    return whole[False] | {CONFIG_FILE: json.dumps(values).encode()}


@st.composite
def config_texts(draw, whole):
    """A config file with broken text."""
    return whole[False] | {CONFIG_FILE: draw(byte_mutations(whole[False][CONFIG_FILE]))}


@st.composite
def headers(draw, whole):
    """A header that is JSON, of another form or with other names, shapes, dtypes and offsets."""
    header, body = split(whole[False][WEIGHTS_FILE])
    some = draw(st.sets(st.sampled_from(sorted(header)), min_size=1, max_size=2))
    header = (
        draw(json_mutations(header))
        if draw(st.booleans())
        else header
        | draw(json_mutations({name: header[name] for name in some}).filter(lambda value: isinstance(value, dict)))
    )
    data = with_header(json.dumps(header).encode(), body)
    if draw(st.integers(0, 3)) == 0:
        data = draw(st.integers(0, 2**64 - 1) | st.integers(0, 9999)).to_bytes(8, "little") + data[8:]
    return whole[False] | {WEIGHTS_FILE: data}


@st.composite
def weight_files(draw, whole):
    """A weight file with broken bytes, above all where one part ends and the next begins."""
    data = whole[False][WEIGHTS_FILE]
    start = 8 + int.from_bytes(data[:8], "little")
    ends = sorted(start + entry["data_offsets"][1] for name, entry in split(data)[0].items() if name[0] != "_")
    return whole[False] | {WEIGHTS_FILE: draw(byte_mutations(data, (8, start, *ends)))}


@st.composite
def shards(draw, whole):
    """An index that is wrong, shards that are broken, missing or swapped."""
    files = dict(whole[True])
    if draw(st.booleans()):
        files[INDEX_FILE] = json.dumps(draw(json_mutations(json.loads(files[INDEX_FILE])))).encode()
    names = sorted(name for name in files if name.endswith(".safetensors"))
    one, two = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    match draw(st.sampled_from(["keep", "swap", "remove", "break"])):
        case "swap":
            files[one], files[two] = files[two], files[one]
        case "remove":
            del files[one]
        case "break":
            files[one] = draw(byte_mutations(files[one], (8,)))
    return files


MUTATIONS = {kind.__name__: kind for kind in (configs, config_texts, headers, weight_files, shards)}


def fuzz(kind: str, whole, folder: Path, **options) -> None:
    refusals = []

    # the files are mutated as a whole, so a large base example is what is wanted here
    @settings(suppress_health_check=list(HealthCheck), **options)
    @given(files=MUTATIONS[kind](whole))
    def load(files):
        refusals.append(outcome(folder / "model", files))

    load()
    assert any(refusals)


def test_the_good_checkpoint_loads(whole, tmp_path):
    for files in whole.values():
        assert outcome(tmp_path / "model", files) is None


@pytest.mark.parametrize("kind", MUTATIONS)
def test_mutations(kind, whole, tmp_path):
    fuzz(kind, whole, tmp_path, max_examples=120)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MUTATIONS)
def test_many_new_mutations(kind, whole, tmp_path):
    fuzz(kind, whole, tmp_path, max_examples=3000, derandomize=False, database=None)


# ------------------------------------------------------------------------------------------------------- large lies


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 512},
        {"vocab_size": 2**40},
        {"vocab_size": 2**24, "hidden_size": 2**24, "conv_dim": None},
        {"mamba_expand": 2**24, "conv_dim": None},
        {"intermediate_size": 2**24},
        {"num_memory_tokens": 2**24},
        {"mamba_d_state": 2**24, "mamba_d_conv": 2**24, "mamba_dt_rank": 2**24},
        {"hidden_size": 2**24, "mamba_expand": 2**24, "mamba_d_state": 2**24, "conv_dim": None},
        {"kv_reuse_group": [list(range(10**5))]},
        {"kv_reuse_group": [[i, i + 1] for i in range(0, 10**5, 2)]},
        {"global_attn_idx": [0] * 6 * 10**5},
        {"layer_type": ["h"] * 10**5},
        {"conv_dim": {str(i): 32 for i in range(10**5)}},
        {str(i): 0 for i in range(10**5)},
    ],
    ids=lambda changes: ",".join(list(changes)[:3]),
)
def test_a_config_that_claims_too_much(changes, whole, tmp_path):
    files = whole[False] | {CONFIG_FILE: json.dumps(json.loads(whole[False][CONFIG_FILE]) | changes).encode()}
    assert outcome(tmp_path / "model", files)


def test_as_many_layers_as_allowed(whole, tmp_path):
    """A header may name them all and hold next to nothing."""
    layers = {f"model.layers.{i}.x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(512)}
    config = json.loads(whole[False][CONFIG_FILE])
    config |= {"num_hidden_layers": 512, "layer_type": None, "conv_dim": None}
    files = {CONFIG_FILE: json.dumps(config).encode(), WEIGHTS_FILE: with_header(json.dumps(layers).encode(), b"")}
    assert "are missing" in outcome(tmp_path / "model", files)


def test_a_large_index(whole, tmp_path):
    """Many names in few files; looking one up takes no longer for it."""
    index = json.loads(whole[True][INDEX_FILE])
    shard = next(iter(index["weight_map"].values()))
    header = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10**4)}
    files = whole[True] | {
        INDEX_FILE: json.dumps({"weight_map": dict.fromkeys(header, shard)}).encode(),
        shard: with_header(json.dumps(header).encode(), b""),
    }
    assert "num_hidden_layers" in outcome(tmp_path / "model", files)


@pytest.mark.parametrize(
    "text", [b"[" * 2**21, b"[" + b"[]," * (2**19 - 1) + b"[]]", b'{"a":' * 10**5, b'"' + b"x" * 2**20 + b'"']
)
@pytest.mark.parametrize("name", [CONFIG_FILE, INDEX_FILE])
def test_large_json(text, name, whole, tmp_path):
    assert name in outcome(tmp_path / "model", whole[True] | {name: text})
