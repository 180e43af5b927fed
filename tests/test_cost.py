"""The formulas against what is really there, and the figures of the released model."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY, VARIANTS, official_folder, random_ids
from hypothesis import given
from hypothesis import strategies as st

from hymba import Hymba, HymbaConfig
from hymba.config import PRESETS, share_kv_in_pairs
from hymba.convert import config_from_official, stored_parameters, to_official_shape
from hymba.cost import LLAMA_3B, cache_bytes, parameters
from hymba.model.cache import KINDS

RELEASED = HymbaConfig.preset("1.5B")
RELEASED_PARAMETERS = 1_522_797_824


MIXTURES = [
    ("hybrid",), ("hybrid",), ("attention",), ("mamba",), ("mamba2",), ("mamba", "attention"), ("hybrid", "attention"),
    ("mamba2", "mamba2", "attention"),
]  # fmt: skip


@st.composite
def configs(draw) -> HymbaConfig:
    """Small architectures of every kind, with sizes that no two parts share by chance."""
    n_kv_heads = draw(st.integers(1, 3))
    n_heads = n_kv_heads * draw(st.integers(1, 3))
    n_layers = draw(st.integers(1, 7))
    global_layers = tuple(sorted(draw(st.sets(st.integers(0, n_layers - 1)))))
    window = draw(st.none() | st.integers(1, 20))
    # pairs of local neighbours, as released, or groups that hold global layers too
    groups = share_kv_in_pairs(n_layers, draw(st.sampled_from([(), global_layers])))
    config = HymbaConfig(
        vocab_size=draw(st.integers(3, 50)),
        d_model=n_heads * draw(st.sampled_from([4, 6])),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_ff=draw(st.integers(1, 40)),
        mlp_activation=draw(st.sampled_from(["silu", "relu2"])),
        expand=draw(st.integers(1, 3)),
        d_state=draw(st.integers(1, 7)),
        d_conv=draw(st.integers(1, 5)),
        dt_rank=draw(st.integers(1, 9)),
        n_meta=draw(st.integers(0, 6)),
        window=window,
        global_layers=() if window is None else global_layers,
        kv_groups=draw(st.sampled_from([(), groups])),
        rope=draw(st.sampled_from(["none", "default", "ntk"])),
        max_length=40,
        rope_original_length=20,
        qk_norm=draw(st.sampled_from(["none", "rms", "perhead-rms"])),
        tie_embeddings=draw(st.booleans()),
    )
    mixers = draw(st.sampled_from(MIXTURES))[:n_layers]
    changes = {"d_ssm_head": draw(st.sampled_from([2, 4]))} if "mamba2" in mixers else {}
    if config.mlp_activation == "silu" and draw(st.booleans()):
        changes["d_ff"] = 0
    if "hybrid" in mixers and draw(st.booleans()):
        changes |= {"fusion": "concat", "d_head": 8}
    elif "attention" in mixers and "hybrid" not in mixers:
        changes["d_head"] = 8
    return config.with_mixers(*mixers, **changes)


def storage_bytes(tensors) -> int:
    """Bytes that are really held: of whole storages, each once, however little of one is looked at."""
    return sum({s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in tensors)}.values())


def cached_tensors(cache) -> dict[str, list[torch.Tensor]]:
    meta = [x for state in cache.meta for x in (state.conv, state.ssm) if x is not None]
    meta += [x for state in cache.meta if state.meta for x in (state.meta.k, state.meta.v)]
    kv = [x for store in cache.stores.values() for x in store.values()]
    return {"kv": kv, "conv": [cache.conv], "ssm": [cache.ssm], "meta": meta}


@given(
    configs(), st.integers(1, 4), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(KINDS),
)  # fmt: skip
def test_cache_bytes_are_what_is_allocated(config, batch_size, max_length, dtype, kind):
    cache = Hymba(config).to(dtype).new_cache(batch_size, max_length, kind)
    expected = cache_bytes(config, batch_size, max_length, dtype.itemsize, kind)
    assert cache.bytes() == expected
    assert {part: storage_bytes(tensors) for part, tensors in cached_tensors(cache).items()} == expected


@pytest.mark.parametrize("kind", KINDS)
def test_use_does_not_make_a_cache_larger(kind):
    model = Hymba(TINY)
    cache = model.new_cache(2, kind=kind)
    before = {part: storage_bytes(tensors) for part, tensors in cached_tensors(cache).items()}
    with torch.no_grad():
        for length in (5, 20, 1):
            model(random_ids(2, length), cache=cache)
    assert {part: storage_bytes(tensors) for part, tensors in cached_tensors(cache).items()} == before


@given(configs())
def test_parameters_add_up_to_the_model(config):
    with torch.device("meta"):
        model = Hymba(config)
    assert sum(parameters(config).values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("config", [replace(TINY, **changes) for changes in VARIANTS.values()], ids=VARIANTS)
def test_parts_are_made_of_the_parameters_they_name(config):
    """A part of the account is the sum of the parameters whose names belong to it."""
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in Hymba(config).named_parameters()}
    total = lambda *words: sum(n for name, n in sizes.items() if any(word in name for word in words))  # noqa: E731
    cost = parameters(config)
    assert cost["embedding"] == total("embedding")
    assert cost["meta tokens"] == total("meta_tokens")
    assert cost["MLP"] == total(".mlp.")
    assert cost["output projections"] == total("out_proj")
    assert cost["Mamba conv, A, D, bias"] == total("conv_weight", "conv_bias", "A_log", "mamba.D", "dt_bias")
    assert cost.get("LM head", 0) == total("lm_head")


@pytest.mark.parametrize(("name", "millions"), [("125M", (115, 135)), ("350M", (340, 360)), ("1.5B", (1520, 1525))])
def test_the_family_has_the_sizes_that_name_it(name, millions):
    assert millions[0] < sum(parameters(PRESETS[name]).values()) / 1e6 < millions[1]


def test_cache_of_the_released_model():
    """A sequence of 8192 tokens in bfloat16: the paper says 79 MB, meta tokens and 1024 keys a window counted in; one
    key more a window, and the meta tokens shared by all sequences, is less. Llama-3.2-3B by the same count: 940 MB."""
    kv = cache_bytes(RELEASED, 1, 8192, 2)["kv"]
    width = 2 * RELEASED.n_kv_heads * (RELEASED.d_key + RELEASED.d_value)
    producers = [plan for plan in RELEASED.layers if plan.produces_kv]
    windows = sum(plan.window is not None for plan in producers)
    paper = width * ((len(producers) - windows) * 8192 + windows * 1024 + len(producers) * RELEASED.n_meta)
    assert (len(producers), windows) == (17, 14)
    assert paper == 78_888_960 <= 79e6
    assert kv == paper + width * (windows - len(producers) * RELEASED.n_meta) < paper
    assert LLAMA_3B.kv_bytes(1, 8192, 2) == 939_524_096
    # in 8 bits: half, and a float32 scale for each key of 64 and each value of 128
    assert cache_bytes(RELEASED, 1, 8192, 2, "int8")["kv"] * 2 * 192 == kv * (192 + 8)


def test_parameters_of_the_released_model():
    with torch.device("meta"):
        model = Hymba(RELEASED)
    assert sum(p.numel() for p in model.parameters()) == RELEASED_PARAMETERS
    assert sum(parameters(RELEASED).values()) == RELEASED_PARAMETERS


def test_names_and_shapes_of_the_released_model():
    """Every tensor of the released checkpoint, and no other. Its list has the tied head too; its file does not."""
    folder = official_folder()
    lines = (folder / "parameters.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    released = {name: tuple(map(int, shape.split(","))) for name, shape, _ in rows}
    assert released.pop("lm_head.weight") == released["model.embed_tokens.weight"]
    config = config_from_official(json.loads((folder / "config.json").read_text()))
    assert config == RELEASED
    with torch.device("meta"):
        model = Hymba(config)
    ours = {official: tuple(to_official_shape(name, p).shape) for name, official, p in stored_parameters(model)}
    assert ours == released
