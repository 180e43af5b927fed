"""`hymba bench peers`: the shapes are the published ones, filled caches are whole, absent engines are named."""

import json
import math
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from hymba.bench.peers import compare
from hymba.bench.peers.shapes import SHAPES, WEIGHT_BYTES, Shape
from hymba.cli import run
from hymba.ops import library

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
needs_llama_cpp = pytest.mark.skipif(
    find_spec("llama_cpp") is None or find_spec("gguf") is None, reason="llama-cpp-python is not installed"
)
needs_probes = pytest.mark.skipif(not library.available(), reason="the limits are probed by the native library")


def small(shape: Shape) -> Shape:
    """The same kind of model, of a size for tests."""
    sizes = {"n_layers": 2, "vocab_size": 512, "d_model": 256}
    sizes |= {"d_ff": 512} if shape.d_ff else {}
    sizes |= {"n_heads": 8, "n_kv_heads": 2, "d_head": 32} if shape.n_heads else {}
    sizes |= {"d_inner": 512, "ssm_heads": 8 if shape.ssm_heads else 0} if shape.d_inner else {}
    return replace(shape, **sizes)


SMALL = {name: small(shape) for name, shape in SHAPES.items()}
TASKS = {"decode": ((1, 16), (1, 300)), "aggregate": ((1, 300), (2, 300)), "prefill": ((1, 40),)}


@pytest.fixture
def small_peers(monkeypatch):
    monkeypatch.setattr(compare, "SHAPES", SMALL)
    monkeypatch.setattr(compare, "TASKS", TASKS)


# ------------------------------------------------------------------------------------------------------- transformers
@needs_transformers
@pytest.mark.parametrize("name", SHAPES)
def test_formulas_count_the_weights_that_transformers_has(name):
    from transformers import AutoModelForCausalLM

    from hymba.bench.peers import hf

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf.config_of(SHAPES[name]))
    matrices = {id(x): x.numel() for k, x in model.named_parameters() if x.ndim == 2 and "A_log" not in k}
    if not SHAPES[name].tie_embeddings:
        matrices.pop(id(model.get_input_embeddings().weight))
    assert sum(matrices.values()) == SHAPES[name].weights
    published = {"llama-1b": 1_235_814_400, "llama-3b": 3_212_749_824, "falcon-h1": 1_554_859_392}
    if name in published:
        assert sum(x.numel() for x in model.parameters()) == published[name]


@needs_transformers
@pytest.mark.parametrize("setting", ["dynamic cache", "static cache"])
def test_filled_caches_of_transformers_hold_the_context(setting):
    from hymba.bench.peers import hf

    peer = hf.Peer(SMALL["llama-1b"], "bfloat16")
    cache = peer.filled_cache(setting, batch=2, context=300, room=4)
    ids = torch.tensor([[1], [2]])
    with torch.inference_mode():
        for _ in range(2):  # a second run begins where the first one began
            hf.rewind(cache, 300)
            logits = [peer.forward(ids, cache) for _ in range(4)]
            assert int(cache.get_seq_length()) == 304
            assert all(x.shape == (2, 2, 304, 32) for layer in cache.layers for x in (layer.keys, layer.values))
        hf.rewind(cache, 300)
        torch.testing.assert_close(peer.forward(ids, cache), logits[0], rtol=0, atol=0)
        hf.rewind(cache, 200)  # fewer tokens are seen, so their values do count
        assert not torch.equal(peer.forward(ids, cache), logits[0])


@needs_transformers
def test_falcon_h1_runs_in_bfloat16_with_float32_states():
    from hymba.bench.peers import hf

    peer = hf.Peer(SMALL["falcon-h1"], "bfloat16")
    assert {x.dtype for x in peer.model.parameters()} == {torch.bfloat16}
    assert all(layer.mamba.mup_vector.dtype == torch.bfloat16 for layer in peer.model.model.layers)
    cache = peer.filled_cache("static cache", batch=1, context=40, room=2)
    with torch.inference_mode():
        peer.forward(torch.tensor([[1]]), cache)
    for layer in cache.layers:
        assert layer.keys.dtype == layer.conv_states[0].dtype == torch.bfloat16
        assert layer.recurrent_states[0].dtype == torch.float32
        assert layer.recurrent_states[0].nbytes * len(cache.layers) == peer.shape.state_bytes


@needs_transformers
def test_cache_bytes_of_transformers_are_the_formula():
    from hymba.bench.peers import hf

    assert hf.kv_bytes(SHAPES["llama-3b"], 128) == SHAPES["llama-3b"].kv_bytes(128)


# ---------------------------------------------------------------------------------------------------------- llama.cpp
@needs_llama_cpp
@pytest.mark.parametrize("precision", compare.PRECISIONS)
@pytest.mark.parametrize("name", compare.ENGINES["llama.cpp"].shapes)
def test_llama_cpp_loads_the_file_and_fills_its_cache(name, precision):
    from hymba.bench.peers import llama_cpp

    peer = llama_cpp.Peer(SMALL[name], precision)
    untied = 0 if SMALL[name].tie_embeddings else SMALL[name].vocab_size * SMALL[name].d_model
    assert llama_cpp.C.llama_model_size(peer.model) >= (SMALL[name].weights + untied) * WEIGHT_BYTES[precision]
    for batch, context, setting in (
        (1, 16, "flash attention"),
        (1, 400, "plain attention"),
        (3, 400, "flash attention"),
    ):
        if batch > 1 and SMALL[name].kind != "llama":
            continue
        filled = peer.filled(batch, context, setting)
        for sequence in range(batch):
            first = llama_cpp.C.llama_memory_seq_pos_min(filled.memory, sequence)
            assert first == 0 or SMALL[name].kind != "llama"  # an SSM remembers its last position only
            assert llama_cpp.C.llama_memory_seq_pos_max(filled.memory, sequence) == context - 1
            assert len(filled.save(sequence)) >= SMALL[name].kv_bytes(context)
        work = peer.decoding(batch, context, 2, setting)
        work.run()
        work.run()
    peer.prefill(40).run()


# ------------------------------------------------------------------------------------------------------- the comparison
@needs_probes
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("transformers:llama-3b", marks=needs_transformers),
        pytest.param("transformers:mamba", marks=needs_transformers),
        pytest.param("llama.cpp:llama-3b", marks=needs_llama_cpp),
        pytest.param("llama.cpp:falcon-h1", marks=needs_llama_cpp),
    ],
)
def test_parts_are_measured_and_joined(name, small_peers, tmp_path, capfd):
    for task in ("decode", "aggregate", "prefill", "cache"):
        arguments = ["bench", "peers", "--model", "tiny", "--repeats", "1", "--peer", name, "--task", task]
        assert run([*arguments, "--precision", "bfloat16", "--precision", "int8"]) == 0
        out = capfd.readouterr().out
        (tmp_path / f"{task}.txt").write_text(out)  # tables and the JSON line, as a redirection keeps them
        found = json.loads(out.splitlines()[-1])
        assert {"machine", "rows", "cache", "relative_error"} <= set(found)
        for row in found["rows"]:
            assert row["against"] == name and row["task"] == task
            assert row["tokens_per_second"] > 0 and math.isfinite(row["share_of_limit"])
        engines = {row["engine"] for row in found["rows"]}
        transformer = compare.SHAPES[name.split(":")[1]].kind == "llama"
        assert engines == (
            {"hymba", name.split(":")[0]} if task != "cache" and (transformer or task != "aggregate") else set()
        )
    parts = [word for path in sorted(tmp_path.iterdir()) for word in ("--join", str(path))]
    assert run(["bench", "peers", *parts, "--model", "tiny"]) == 0
    out = capfd.readouterr().out
    assert ("Best aggregate in bfloat16" in out) == transformer
    assert "times smaller" in out and f"Hymba-tiny and {SHAPES[name.split(':')[1]].name}" in out


def test_absent_engines_are_named_with_the_way_to_get_them(monkeypatch, capfd):
    monkeypatch.setattr(compare, "find_spec", lambda name: None)
    monkeypatch.setattr("hymba.bench.limits.require_probes", lambda: None)
    monkeypatch.setattr("hymba.bench.check.fast_against_reference", lambda config: {})
    assert run(["bench", "peers", "--model", "tiny", "--task", "decode"]) == 2
    out, err = capfd.readouterr()
    assert "absent: llama.cpp (llama_cpp and gguf not installed; CMAKE_ARGS=-DGGML_NATIVE=ON pip install" in out
    assert "absent: transformers (transformers not installed; pip install 'hymba[peers]')" in out
    assert err.count("\n") == 1 and "no peer is here" in err
    assert run(["bench", "peers", "--model", "tiny", "--task", "cache"]) == 0  # needs no peer: there is a formula
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["cache"]["Llama-3.2-3B"] == 512 * 28 * 2 * 8 * 128 * 2


def test_mistakes_cost_one_line(tmp_path, capfd):
    assert run(["bench", "peers", "--peer", "vllm:llama-3b"]) == 2
    assert "unknown peer vllm:llama-3b; choose from transformers:llama-1b" in capfd.readouterr().err
    for text in ("no line", "{}", '{"rows": [{}], "cache": null}', "{broken"):
        path = tmp_path / "part.jsonl"
        path.write_text(text)
        assert run(["bench", "peers", "--join", str(path)]) == 2
        assert "hymba bench peers" in capfd.readouterr().err


def record(**changes) -> compare.Record:
    values = {
        "name": "", "tokens_per_second": 1.0, "ms_per_token": 1.0, "fastest_ms": 1.0, "slowest_ms": 1.0,
        "mb_per_token": 1.0, "gop_per_token": 1.0, "share_of_limit": 0.5, "read_gb_per_second": 1.0,
        "peak_gop_per_second": 1.0, "against": "transformers:llama-3b", "task": "decode", "engine": "transformers",
        "precision": "bfloat16", "batch": 1, "context": 16, "setting": "static cache",
    }  # fmt: skip
    return compare.Record(**values | changes)


def test_a_peer_is_taken_in_its_best_setting_with_ours_of_the_same_seconds():
    records = [
        record(setting=setting, engine=engine, tokens_per_second=rate)
        for setting, theirs, ours in (("static cache", 4.0, 12.0), ("dynamic cache", 5.0, 10.0))
        for engine, rate in (("hymba", ours), ("transformers", theirs))
    ]
    ((peer, beside),) = compare.pairs(records)
    assert peer.tokens_per_second == 5 and [r.tokens_per_second for r in beside] == [10]
    assert "| 2.00 |" in compare.tables(records, None, "Hymba")
