"""What Hymba is compared with (paper, tables 1 and 3): all of it can be said, and the layers are `transformers`' own.

That the laws of the model hold for all of them is tested beside the laws: they are among the variants of `conftest.py`.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from checkpoints import change_config, refused, same
from conftest import (
    OTHER_ARCHITECTURES,
    TINY,
    assert_close,
    assert_same_gradients,
    gradients,
    random_ids,
    randomise,
    tiny_model,
)
from torch import Tensor, nn

from hymba import Hymba, HymbaConfig, cost
from hymba.bench.check import fast_against_reference
from hymba.config import share_kv_in_pairs
from hymba.convert import OF_RELEASED_CODE, config_to_official
from hymba.engine import native
from hymba.engine.engine import Engine
from hymba.engine.sampling import SamplingParams
from hymba.engine.sequence import Sequence
from hymba.model.quant import quantize_
from hymba.ops import library

each_architecture = pytest.mark.parametrize("changes", OTHER_ARCHITECTURES.values(), ids=OTHER_ARCHITECTURES)

# ------------------------------------------------------------------------------------------------ the rows of table 1

# the sizes that the paper's ratios and cache sizes imply: 12 layers of width 1024, heads of size 64
ROW_4 = HymbaConfig(
    vocab_size=32001, d_model=1024, n_layers=12, n_heads=16, n_kv_heads=16, d_head=64, d_ff=4096, dt_rank=64, n_meta=0,
    window=None, global_layers=(), kv_groups=(), rope="default",
)  # fmt: skip
ROW_1 = ROW_4.with_mixers("mamba")
ROW_5 = replace(ROW_4, n_kv_heads=4)
ROW_6 = replace(ROW_4.with_mixers("attention"), n_kv_heads=16)
ROW_7 = replace(ROW_5, window=256)
ROW_8 = replace(ROW_7, global_layers=(0, 5, 11))
ROW_9 = replace(ROW_8, kv_groups=share_kv_in_pairs(12, (0, 5, 11)))
TABLE_1 = {
    1: ROW_1,
    2: replace(ROW_4, n_heads=4, n_kv_heads=4),
    3: replace(ROW_4, n_heads=8, n_kv_heads=8),
    4: ROW_4,
    5: ROW_5,
    6: ROW_6,
    7: ROW_7,
    8: ROW_8,
    9: ROW_9,
    10: ROW_9.with_mixers("attention"),
    11: replace(ROW_9, fusion="concat"),
    12: replace(ROW_1, n_meta=128),
    13: replace(ROW_9, n_meta=128),
}


def attention_to_mamba(config: HymbaConfig) -> float:
    parts = cost.parameters(config)
    mamba = parts["Mamba projections"] + parts["Mamba conv, A, D, bias"] + parts["output projections"]
    return parts["attention projections"] / mamba


def kv(row: int) -> int:
    return cost.cache_bytes(TABLE_1[row], 1, 8192, 2)["kv"]


def test_the_rows_of_table_1_relate_as_in_the_paper():
    """Parameters and cache of attention grow with the heads; each compression is smaller; meta tokens cost nothing."""
    ratio = {row: attention_to_mamba(config) for row, config in TABLE_1.items()}
    assert ratio[1] == ratio[12] == 0
    assert (ratio[2], ratio[3]) == pytest.approx((ratio[4] / 4, ratio[4] / 2))
    assert ratio[4] > ratio[5] == ratio[7] == ratio[8] > ratio[9] == ratio[13] > ratio[11]
    assert (kv(1), 4 * kv(2), 2 * kv(3)) == (0, kv(4), kv(4))
    assert kv(4) > kv(5) > kv(8) > kv(9) == kv(11) == kv(13) > kv(7) and kv(10) < kv(9)
    assert kv(7) * 8192 == kv(5) * 257
    assert TABLE_1[13].is_hymba and not any(TABLE_1[row].is_hymba for row in (1, 2, 3, 6, 10, 11, 12))
    for row in (7, 8, 9, 13):
        assert replace(TABLE_1[row], d_head=None).layers == TABLE_1[row].layers  # heads fill the width


def test_narrow_attention_is_taken_as_often_as_it_fits():
    """A quarter of the heads, whose output is repeated, is four times the same heads under a mean."""
    narrow = tiny_model(n_heads=1, n_kv_heads=1, d_head=8, kv_groups=())
    full = tiny_model(n_heads=4, n_kv_heads=1, kv_groups=())
    weights = {name: x.clone() for name, x in narrow.state_dict().items()}
    for i in range(TINY.n_layers):
        query, rest = weights[f"blocks.{i}.heads.in_proj.weight"].split([8, 8 + 16 + 2 * 64])
        weights[f"blocks.{i}.heads.in_proj.weight"] = torch.cat([query.repeat(4, 1), rest])
    full.load_state_dict(weights)
    ids = random_ids(2, 30)
    with torch.no_grad():
        assert_close(narrow(ids), full(ids))


# ------------------------------------------------------------------------------------------ everything around the model


@each_architecture
def test_the_engine_generates_what_the_model_says(changes):
    """The native step, which knows Hymba's own layers only, stands aside."""
    model = tiny_model(**changes)
    if library.available():
        assert "Hymba's own layers" in native.supports(model)
    engine = Engine(model, max_batch=2, prefill_chunk=5)
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (13, 1, 9)]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    sequences = [Sequence(prompt, params, max_length=engine.max_length) for prompt in prompts]
    engine.add(sequences)
    while engine.busy:
        engine.step()
    for sequence in sequences:
        text = torch.tensor([sequence.prompt_ids + sequence.token_ids])
        with torch.no_grad():
            chosen = model(text)[0, len(sequence.prompt_ids) - 1 : -1].argmax(-1)
        assert chosen.tolist() == sequence.token_ids


@each_architecture
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_weights_are_saved_and_loaded(changes, kind, tmp_path):
    model, ids = tiny_model(**changes), random_ids(2, 20)
    quantize_(model, kind)
    assert not [name for name, x in model.blocks.named_modules() if type(x) is nn.Linear]
    with torch.no_grad():
        expected = model(ids)
        model.save_pretrained(tmp_path)
        assert torch.equal(Hymba.from_pretrained(tmp_path)(ids), expected)


@pytest.mark.parametrize("name", ["mamba2", "samba", "mamba and one attention head", "hybrid and attention"])
def test_the_bench_checks_it(name):
    config = replace(TINY, **OTHER_ARCHITECTURES[name])
    assert fast_against_reference(config).keys() == {"float32", "bfloat16"}


# --------------------------------------------------------------------------------------------------------- the config


@each_architecture
def test_the_released_code_is_not_pointed_to(changes, tmp_path):
    """It would take the model for its own."""
    config = replace(TINY, **changes)
    assert not config.is_hymba
    assert not set(OF_RELEASED_CODE) & set(config_to_official(config, torch.float32))


def test_an_official_config_has_no_key_of_ours():
    official = config_to_official(TINY, torch.float32)
    assert set(OF_RELEASED_CODE) <= set(official) and not {"mixers", "fusion", "d_head", "d_ssm_head"} & set(official)


def test_our_keys_are_checked(tmp_path):
    model = tiny_model(mixers=("attention",))
    model.save_pretrained(tmp_path)
    assert same(Hymba.from_pretrained(tmp_path), model)
    for key, value in [("mixers", ["rwkv"]), ("mixers", []), ("mixers", "attention"), ("mixers", [1]), ("mixers", None),
                       ("mixers", ["mamba", "mamba2"]), ("fusion", "sum"), ("fusion", "concat"), ("d_head", 0),
                       ("d_head", 2.5), ("d_head", 3), ("d_ssm_head", 0), ("d_ssm_head", None)]:  # fmt: skip
        model.save_pretrained(tmp_path)
        change_config(tmp_path, **{key: value})
        refused(lambda: Hymba.from_pretrained(tmp_path), "config.json", key)


@pytest.mark.parametrize(("changes", "words"), [
    ({"mixers": ("mamba",)}, ["rope='ntk' has no effect", "set rope='none'"]),
    ({"mixers": ("mamba",), "rope": "none"}, ["global_layers: layer 0 has no attention", "mamba"]),
    ({"mixers": ("mamba",), "rope": "none", "global_layers": ()}, ["kv_groups: layer 1 has no attention"]),
    ({"mixers": ("mamba",), "rope": "none", "qk_norm": "rms"}, ["qk_norm='rms' has no effect"]),
    ({"mixers": ("mamba",), "rope": "none", "d_head": 8}, ["d_head=8 has no effect", "d_head=None"]),
    ({"mixers": ("attention",), "fusion": "concat"}, ["fusion='concat' has no effect"]),
    ({"mixers": ("hybrid", "attention")}, ["kv_groups: [1, 2]", "different mixers"]),
    ({"mixers": ("mamba2", "hybrid")}, ["Mamba-1", "Mamba-2", "not both"]),
    ({"mixers": ("mamba2",), "d_ssm_head": 48}, ["64", "d_ssm_head=48"]),
    ({"mixers": ()}, ["mixers=()"]),
    ({"mixers": ("hybrid",) * 6}, ["mixers", "n_layers=5"]),
    ({"mixers": "mamba"}, ["mixers='mamba' must be a tuple of str"]),
    ({"d_ff": 0, "mlp_activation": "relu2"}, ["mlp_activation='relu2' has no effect"]),
    ({"d_ff": -1}, ["d_ff=-1", "no MLP"]),
    ({"d_head": 7, "fusion": "concat"}, ["d_head=7", "even"]),
    ({"d_head": 6}, ["fusion='mean'", "24", "concat"]),
    ({"d_head": 16}, ["fusion='mean'", "64"]),
    ({"n_heads": 3, "n_kv_heads": 1}, ["n_heads=3", "d_head"]),
])  # fmt: skip
def test_what_has_no_effect_or_no_meaning_is_refused(changes, words):
    refused(lambda: replace(TINY, **changes), *words)


def test_with_mixers_keeps_what_has_an_effect():
    hymba = replace(TINY, qk_norm="rms", fusion="concat")
    assert hymba.with_mixers("hybrid") == hymba
    attention = hymba.with_mixers("attention")
    assert attention == replace(hymba, mixers=("attention",), fusion="mean")
    samba = hymba.with_mixers("mamba", "attention", d_ff=64)
    assert (samba.global_layers, samba.kv_groups, samba.qk_norm, samba.d_ff) == ((), (), "rms", 64)
    mamba = hymba.with_mixers("mamba")
    assert (mamba.rope, mamba.qk_norm, mamba.global_layers, mamba.kv_groups) == ("none", "none", (), ())
    assert mamba.with_mixers("mamba2", d_ssm_head=16).n_ssm_heads == 4


# ------------------------------------------------------------------------------------ the same layers in `transformers`


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="compares with the layers of `transformers`, which is not there")


Weights = dict[str, Tensor]


def assert_same_model(ours: Hymba, theirs: nn.Module, as_ours: Callable[[Weights], Weights]) -> None:
    """Logits, and gradients of the loss, for weights under which every part matters.

    as_ours: their parameters -> ours; linear, so that it takes their gradients to ours too
    """
    randomise(theirs.eval())
    weights = as_ours({name: x.detach() for name, x in theirs.named_parameters()})
    ours.load_state_dict(weights | {"meta_tokens": ours.meta_tokens})
    ids = random_ids(2, 150).clamp(min=3)  # our embedding of the padding id has no gradient
    logits = theirs(ids, use_cache=False).logits
    assert_close(ours(ids), logits)
    ours(ids, labels=ids).backward()
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert_same_gradients(gradients(ours), as_ours({name: x.grad for name, x in theirs.named_parameters()}))


def renamed(w: Weights, source: str, target: str, names: dict[str, str]) -> Weights:
    return {f"{target}.{ours}": w[f"{source}.{theirs}"] for ours, theirs in names.items()}


def queries_keys_values(w: Weights, attention: str) -> Tensor:
    return torch.cat([w[f"{attention}.{x}_proj.weight"] for x in "qkv"])


MLP = {"mlp.gate_proj.weight": "gate_proj.weight", "mlp.up_proj.weight": "up_proj.weight",
       "mlp.down_proj.weight": "down_proj.weight"}  # fmt: skip
# their config, and ours
THEIRS = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "tie_word_embeddings": False, "pad_token_id": 0}
OURS = {"n_layers": 2, "n_meta": 0, "window": None, "global_layers": (), "kv_groups": (), "tie_embeddings": False,
        "max_length": 256}  # fmt: skip


@pytest.mark.parametrize("window", [None, 9])
def test_attention_layers_are_those_of_llama(transformers, window):
    """And with a window those of Mistral, which counts the token itself in."""
    sizes = {**THEIRS, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
             "rms_norm_eps": 1e-5, "attn_implementation": "eager"}  # fmt: skip
    if window is None:
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    else:
        theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, sliding_window=window + 1))

    def as_ours(w: Weights) -> Weights:
        weights = {"embedding.weight": w["model.embed_tokens.weight"], "norm.weight": w["model.norm.weight"],
                   "lm_head.weight": w["lm_head.weight"]}  # fmt: skip
        for i in range(2):
            layer, block = f"model.layers.{i}", f"blocks.{i}"
            weights |= renamed(w, f"{layer}.mlp", block, MLP)
            weights |= renamed(w, layer, block, {
                "heads_norm.weight": "input_layernorm.weight", "mlp_norm.weight": "post_attention_layernorm.weight",
                "heads.out_proj.weight": "self_attn.o_proj.weight",
            })  # fmt: skip
            weights[f"{block}.heads.in_proj.weight"] = queries_keys_values(w, f"{layer}.self_attn")
        return weights

    changes = {"mixers": ("attention",), "rope": "default", "d_head": 12, "norm_eps": 1e-5, "window": window}
    assert_same_model(tiny_model(**OURS | changes), theirs, as_ours)


def test_mamba_layers_are_those_of_jamba(transformers):
    """A layer of Mamba, then one of attention without RoPE, each with an MLP, in Samba's order."""
    theirs = transformers.JambaForCausalLM(transformers.JambaConfig(
        **THEIRS, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, attn_layer_period=2,
        attn_layer_offset=1, num_experts=1, num_experts_per_tok=1, mamba_d_state=4, mamba_dt_rank=3, rms_norm_eps=1e-6,
        attn_implementation="eager",
    ))  # fmt: skip

    def as_ours(w: Weights) -> Weights:
        weights = {"embedding.weight": w["model.embed_tokens.weight"], "lm_head.weight": w["lm_head.weight"],
                   "norm.weight": w["model.final_layernorm.weight"]}  # fmt: skip
        for i in range(2):
            layer, block = f"model.layers.{i}", f"blocks.{i}"
            weights |= renamed(w, f"{layer}.feed_forward", block, MLP)
            weights |= renamed(w, layer, block, {"heads_norm.weight": "input_layernorm.weight",
                                                 "mlp_norm.weight": "pre_ff_layernorm.weight"})  # fmt: skip
        weights |= renamed(w, "model.layers.0.mamba", "blocks.0.heads", {
            "in_proj.weight": "in_proj.weight", "out_proj.weight": "out_proj.weight", "mamba.conv_bias": "conv1d.bias",
            "mamba.x_proj.weight": "x_proj.weight", "mamba.dt_norm.weight": "dt_layernorm.weight",
            "mamba.B_norm.weight": "b_layernorm.weight", "mamba.C_norm.weight": "c_layernorm.weight",
            "mamba.dt_weight": "dt_proj.weight", "mamba.dt_bias": "dt_proj.bias", "mamba.A_log": "A_log",
            "mamba.D": "D",
        })  # fmt: skip
        weights["blocks.0.heads.mamba.conv_weight"] = w["model.layers.0.mamba.conv1d.weight"].squeeze(1)
        weights["blocks.1.heads.in_proj.weight"] = queries_keys_values(w, "model.layers.1.self_attn")
        weights["blocks.1.heads.out_proj.weight"] = w["model.layers.1.self_attn.o_proj.weight"]
        return weights

    assert_same_model(tiny_model(**OURS | {"mixers": ("mamba", "attention"), "rope": "none"}), theirs, as_ours)


def test_mamba2_layers_are_those_of_mamba2(transformers):
    theirs = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(
        **THEIRS, num_heads=4, head_dim=16, state_size=4, n_groups=1, chunk_size=32, layer_norm_epsilon=1e-6,
    ))  # fmt: skip

    def as_ours(w: Weights) -> Weights:
        weights = {"embedding.weight": w["backbone.embeddings.weight"], "lm_head.weight": w["lm_head.weight"],
                   "norm.weight": w["backbone.norm_f.weight"]}  # fmt: skip
        for i in range(2):
            layer, block = f"backbone.layers.{i}", f"blocks.{i}"
            weights[f"{block}.heads_norm.weight"] = w[f"{layer}.norm.weight"]
            weights |= renamed(w, f"{layer}.mixer", f"{block}.heads", {
                "in_proj.weight": "in_proj.weight", "out_proj.weight": "out_proj.weight",
                "mamba.conv_bias": "conv1d.bias", "mamba.dt_bias": "dt_bias", "mamba.A_log": "A_log", "mamba.D": "D",
                "mamba.norm.weight": "norm.weight",
            })  # fmt: skip
            weights[f"{block}.heads.mamba.conv_weight"] = w[f"{layer}.mixer.conv1d.weight"].squeeze(1)
        return weights

    assert_same_model(tiny_model(**OURS | OTHER_ARCHITECTURES["mamba2"] | {"n_meta": 0}), theirs, as_ours)
