"""The config: what it refuses, its presets, and the official `config.json` in both directions."""

import json
from dataclasses import fields, replace

import pytest
import torch
from checkpoints import refused
from conftest import GOLDEN, GOLDEN_CASES, TINY, official_folder
from hypothesis import given
from hypothesis import strategies as st

from hymba import Hymba, HymbaConfig, cost
from hymba.config import (
    MAX_LAYERS,
    MAX_SIZE,
    MIXERS,
    MLP_ACTIVATIONS,
    PRESETS,
    QK_NORMS,
    ROPE_TYPES,
    share_kv_in_pairs,
)
from hymba.convert import INTERPRETED, REQUIRED_VALUE, SAME_VALUE, config_from_official, config_to_official, load_config

OFFICIAL = config_to_official(TINY, torch.float32)


@st.composite
def configs(draw) -> HymbaConfig:
    """Any valid config of few layers; sizes may be large."""
    config = draw(hymbas())
    pattern = draw(st.lists(st.sampled_from(MIXERS), min_size=1, max_size=config.n_layers))
    if "mamba2" in pattern:
        pattern = [mixer for mixer in pattern if mixer in ("mamba2", "attention")]
    changes = {"d_ssm_head": draw(st.integers(1, 3)) * 2, "mlp_activation": "silu", "d_ff": 0}
    changes = {name: value for name, value in changes.items() if draw(st.booleans())}
    if "mamba2" in pattern:
        changes["d_ssm_head"] = config.d_inner // draw(st.sampled_from([1, 2]))
    if "mlp_activation" not in changes:
        changes.pop("d_ff", None)
    if "hybrid" in pattern and draw(st.booleans()):
        changes["fusion"] = "concat"
    if not {"mamba", "mamba2"} >= set(pattern) and draw(st.booleans()):
        mean = "hybrid" in pattern and "fusion" not in changes
        changes["d_head"] = config.d_model // config.n_heads if mean else 2 * draw(st.integers(2, 80))
    return config.with_mixers(*pattern, **changes)


@st.composite
def hymbas(draw) -> HymbaConfig:
    """Any valid config of hybrid layers."""

    def some(low, high):
        return draw(st.integers(low, high))

    size = st.one_of(st.integers(1, 64), st.integers(1, MAX_SIZE))
    positive = st.one_of(st.integers(1, 10**6), st.floats(1e-30, 1e29))
    n_layers, n_kv_heads = some(1, 12), some(1, 5)
    n_heads = n_kv_heads * some(1, 5)
    vocab_size, rope = draw(size), draw(st.sampled_from(ROPE_TYPES))
    # every layer joins one of some groups; a group of one is none
    group_of = draw(st.lists(st.integers(0, n_layers), min_size=n_layers, max_size=n_layers))
    groups = [tuple(layer for layer in range(n_layers) if group_of[layer] == group) for group in set(group_of)]
    original = draw(st.none() | size) if rope in ("none", "default") else draw(size)
    return HymbaConfig(
        vocab_size=vocab_size,
        d_model=n_heads * 2 * some(2, 80),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_ff=draw(size),
        mlp_activation=draw(st.sampled_from(MLP_ACTIVATIONS)),
        expand=some(1, 4),
        d_state=draw(size),
        d_conv=some(1, 8),
        dt_rank=draw(size),
        n_meta=some(0, 200),
        window=draw(st.none() | size),
        global_layers=tuple(draw(st.lists(st.integers(0, n_layers - 1), unique=True))),
        kv_groups=tuple(draw(st.permutations([group for group in groups if len(group) > 1]))),
        rope=rope,
        rope_theta=draw(positive),
        max_length=max(draw(size), (original or 0) // 2 + 1),
        rope_original_length=original,
        qk_norm=draw(st.sampled_from(QK_NORMS)),
        norm_eps=draw(positive),
        tie_embeddings=draw(st.booleans()),
        init_std=draw(positive),
        pad_token_id=some(0, vocab_size - 1),
        bos_token_id=some(0, vocab_size - 1),
        eos_token_id=some(0, vocab_size - 1),
    )


# --------------------------------------------------------------------------------------------------- the official file


@given(configs(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_written_config_reads_the_same(config, dtype):
    written = json.loads(json.dumps(config_to_official(config, dtype)))
    assert config_from_official(written) == config


def assert_read_and_written(official: dict) -> None:
    """Nothing that a config says is lost in reading it and writing it again."""
    config = config_from_official(official)
    written = config_to_official(config, getattr(torch, official["torch_dtype"]))
    assert config_from_official(json.loads(json.dumps(written))) == config
    assert set(official) <= set(written)
    # no meaning: where the code lies, how long the longest training text was
    for key in set(official) - {"auto_map", "seq_length"}:
        if key == "rope_type":  # null is the plain one
            assert (official[key] or "default") == written[key]
        else:
            assert official[key] == written[key], key


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_the_configs_of_the_golden_models(case):
    assert_read_and_written(json.loads((GOLDEN / case / "config.json").read_text()))


def test_the_released_config():
    official = json.loads((official_folder() / "config.json").read_text())
    assert_read_and_written(official)
    assert config_from_official(official) == HymbaConfig() == HymbaConfig.preset("1.5B")


def test_a_short_config_means_what_the_released_class_adds():
    kept = {"model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rope_theta",
            "num_key_value_heads", "intermediate_size", "mamba_d_state", "num_memory_tokens", "kv_reuse_group",
            "max_position_embeddings", "tie_word_embeddings"}  # fmt: skip
    config = config_from_official({key: OFFICIAL[key] for key in kept})
    expected = replace(TINY, window=None, global_layers=(), rope="default", rope_original_length=None, dt_rank=2)
    assert config == expected


@given(st.integers(1, 12), st.integers(-1, 14))
def test_every_i_th_layer_makes_keys_and_values(n_layers, every):
    """Layer i makes its own where i % every == 0, as in the released class, and else uses the layer's before it."""
    official = config_to_official(replace(TINY, n_layers=n_layers, global_layers=(), kv_groups=()), torch.float32)
    config = config_from_official(official | {"kv_reuse_every_i_layer": every, "kv_reuse_group": None})
    assert [plan.producer for plan in config.layers] == [i - i % every if every > 0 else i for i in range(n_layers)]
    # groups, where there are any, have the last word
    groups = {"kv_reuse_group": [[0, 1]]} if n_layers > 1 else {"kv_reuse_group": []}
    config = config_from_official(official | {"kv_reuse_every_i_layer": every} | groups)
    assert config.kv_groups == (((0, 1),) if n_layers > 1 else ())


@pytest.mark.parametrize(
    ("changes", "same_as"),
    [
        ({"mamba_dt_rank": "auto"}, {"dt_rank": 2}),
        ({"rope": False, "rope_type": "ntk"}, {"rope": "none"}),
        ({"rope_type": None}, {"rope": "default"}),
        ({"rope_type": "default"}, {"rope": "default"}),
        ({"rope_type": "dynamic_ntk"}, {"rope": "dynamic_ntk"}),
        ({"sliding_window": None, "global_attn_idx": None}, {"window": None, "global_layers": ()}),
        ({"kv_reuse_group": [[1], [2, 3]]}, {"kv_groups": ((2, 3),)}),
        ({"kv_reuse_group": None}, {"kv_groups": ()}),
        ({"attn_hidden_size": 32, "kq_head_dim": 8}, {}),
        ({"layer_type": None, "conv_dim": None}, {}),
        ({"rope_theta": 500}, {"rope_theta": 500.0}),
    ],
)
def test_other_spellings(changes, same_as):
    assert config_from_official(OFFICIAL | changes) == replace(TINY, **same_as)


# ----------------------------------------------------------------------------------------------------------- refusals

HUGE = 10**400
NOT_A_NUMBER = ["1", [], [1], {}, {"a": 1}, True, float("nan"), float("inf"), -float("inf"), HUGE, -HUGE, -1]
DEEP: list = []
for _ in range(2000):
    DEEP = [DEEP]


@pytest.mark.parametrize("key", sorted(set(SAME_VALUE) - {"tie_word_embeddings", "mlp_hidden_act", "kq_norm"}))
def test_a_number_that_is_none_is_refused_by_name(key):
    for value in [*NOT_A_NUMBER, DEEP, MAX_SIZE * 10**23]:
        refused(lambda value=value: config_from_official(OFFICIAL | {key: value}), key)
    if key not in ("sliding_window", "orig_max_position_embeddings"):
        refused(lambda: config_from_official(OFFICIAL | {key: None}), key)


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "initializer_range"])
def test_zero_is_no_scale(key):
    refused(lambda: config_from_official(OFFICIAL | {key: 0}), key)


@pytest.mark.parametrize(
    "key", ["mlp_hidden_act", "kq_norm", "rope_type", "tie_word_embeddings", "rope", "torch_dtype"]
)
def test_a_choice_that_is_none_is_refused_by_name(key, tmp_path):
    for value in ["gelu", "", 1, 0.5, [], ["silu"], {}, "x" * 10**6]:
        (tmp_path / "config.json").write_text(json.dumps(OFFICIAL | {key: value}))
        refused(lambda: load_config(tmp_path), key)


@pytest.mark.parametrize("key", sorted(REQUIRED_VALUE))
def test_what_is_not_computed_is_refused_by_name(key):
    for value in [None, "x", "", 2, 7.5, not REQUIRED_VALUE[key][0], [], [1], {}, DEEP, float("nan"), HUGE]:
        refused(lambda value=value: config_from_official(OFFICIAL | {key: value}), key)


@pytest.mark.parametrize("key", sorted(set(INTERPRETED) - {"mamba_dt_rank", "rope", "rope_type"}))
def test_structure_that_is_broken_is_refused_by_name(key):
    wrong = ["x", 7, True, 1.5, [[]] * 3, [1.5], [True], [[0, True]], {"0": 1}, {"x": []}, DEEP, [-1], [5], [[1, 5]]]
    wrong += [[[1, 2], [2, 3]], [[2, 1]], [[1, 1]], ["h"] * 4, ["h"] * 4 + ["m"], float("nan"), HUGE]
    if key == "kv_reuse_every_i_layer":
        wrong = [value for value in wrong if type(value) is not int] + [None]  # any integer has a meaning
        refused(lambda: config_from_official(OFFICIAL | {key: "x"}), key)
    for value in wrong:
        if (key, value) == ("kv_reuse_group", [[]] * 3):  # groups of nobody: no sharing
            continue
        official = OFFICIAL | {key: value}
        if key == "kv_reuse_every_i_layer":
            official["kv_reuse_group"] = None
        refused(lambda official=official: config_from_official(official), key)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 5}, ["hidden_size=32", "num_attention_heads=5"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads=4", "num_key_value_heads=3"]),
        ({"num_attention_heads": 32}, ["even"]),
        ({"num_attention_heads": 16, "num_key_value_heads": 16}, ["rope_type", "size 4"]),
        ({"orig_max_position_embeddings": None}, ["orig_max_position_embeddings"]),
        ({"max_position_embeddings": 16}, ["max_position_embeddings", "orig_max_position_embeddings"]),
        ({"eos_token_id": 64}, ["eos_token_id=64", "64"]),
        ({"model_type": "jamba"}, ["'jamba'", "another model"]),
        ({"model_type": ...}, ["model_type"]),
        ({"hidden_size": ...}, ["'hidden_size' is missing"]),
        ({"rope_scaling": {"factor": 2}}, ["unknown setting 'rope_scaling'"]),
        ({"": 1}, ["unknown setting ''"]),
        ({"a\nb": 1}, [r"unknown setting 'a\nb'"]),
        ({"x" * 10**6: 1}, ["unknown setting 'xxx"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers", str(MAX_LAYERS)]),
        ({"vocab_size": 2**40}, ["vocab_size", str(MAX_SIZE)]),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    official = {key: value for key, value in (OFFICIAL | changes).items() if value is not ...}
    refused(lambda: config_from_official(official), *words)


@pytest.mark.parametrize("value", [None, [], "hymba", 3, True, DEEP])
def test_a_config_is_an_object(value):
    refused(lambda: config_from_official(value), "object")


@given(st.sampled_from([field.name for field in fields(HymbaConfig)]), st.one_of(st.text(), st.floats(), st.binary()))
def test_types_are_checked_in_python_too(name, value):
    try:
        config = replace(TINY, **{name: value})
    except Exception as error:
        assert type(error).__name__ == "UserError" and name in str(error)
    else:
        assert isinstance(value, float | str) and getattr(config, name) == value


# ------------------------------------------------------------------------------------------------------------ presets


@pytest.mark.parametrize(
    ("preset", "parameters"),
    # the paper's table 9 calls them 125M, 350M and 1.5B; the last is the released checkpoint's count
    [("125M", 129_944_064), ("350M", 353_701_888), ("1.5B", 1_522_797_824), ("tiny", 436_408), ("mini", 2_345_408)],
)
def test_parameters_of_the_presets(preset, parameters):
    config = HymbaConfig.preset(preset)
    assert sum(cost.parameters(config).values()) == parameters
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Hymba(config).parameters()) == parameters


def test_the_family_is_of_one_design():
    for preset in PRESETS:
        c = HymbaConfig.preset(preset)
        assert len(c.global_layers) == 3 and {0, c.n_layers - 1} <= set(c.global_layers)
        if c.n_layers >= 24:  # the paper's: all local layers share
            sharing = {layer for group in c.kv_groups for layer in group}
            assert sharing == set(range(c.n_layers)) - set(c.global_layers)
        assert (c.d_key, c.d_value) == (c.d_model // c.n_heads, 2 * c.d_key)
    refused(lambda: HymbaConfig.preset("7B"), "'7B'", "1.5B")
    assert HymbaConfig.preset("125M", n_meta=0).n_meta == 0


@given(st.integers(1, 40), st.sets(st.integers(0, 39)))
def test_sharing_in_pairs(n_layers, global_layers):
    """Neighbouring local layers, two by two, three at most, and nobody is left out who has a local neighbour."""
    groups = share_kv_in_pairs(n_layers, tuple(global_layers))
    shared = [layer for group in groups for layer in group]
    local = [layer for layer in range(n_layers) if layer not in global_layers]
    assert shared == sorted(set(shared)) and set(shared) <= set(local)
    assert all(len(group) in (2, 3) and group[-1] - group[0] == len(group) - 1 for group in groups)
    assert set(local) - set(shared) == {i for i in local if i - 1 not in local and i + 1 not in local}
