"""Every analysis on a model where the right answer is known by construction, and laws that hold for any model."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import OTHER_ARCHITECTURES, TINY, assert_close, each_variant, random_ids, tiny_model
from torch import Tensor

from hymba import Hymba, Tokenizer
from hymba.analysis import ANALYSES, texts
from hymba.analysis.attention import CATEGORIES, AttentionMeter, probabilities
from hymba.analysis.branches import OutputMeter, bits, gates, without
from hymba.analysis.memory import MemoryMeter, influence, reach, receptive_field
from hymba.analysis.observe import observe
from hymba.analysis.report import FIGURES, write
from hymba.analysis.run import analyze, passes
from hymba.cli import run
from hymba.errors import UserError
from hymba.ops.reference import rotate

pytest_plugins = "tiny_llm"

M = TINY.n_meta
SURE = 1e4  # a score that leaves nothing to the other keys


def one_layer(**changes) -> Hymba:
    """One hybrid layer whose input is the same at every token: what it attends to is up to positions alone."""
    changes = {"n_layers": 1, "kv_groups": (), "global_layers": (), "rope": "default", **changes}
    model = tiny_model(rope_original_length=None, **changes)
    with torch.no_grad():
        model.embedding.weight.fill_(1)
        model.meta_tokens.fill_(1)
        model.blocks[0].heads_norm.weight.fill_(1)
    return model


@torch.no_grad()
def set_rows(weight: Tensor, first: int, value: Tensor) -> None:
    """Rows of a matrix that make `value` of an input of ones."""
    weight[first : first + len(value)] = value[:, None] / weight.shape[1]


def attend_to_distance(model: Hymba, distance: int) -> None:
    """Make every head look at the token `distance` back: keys are rotated ones, queries the same, turned back."""
    c = model.config
    key = torch.ones(1, 1, 1, c.d_key)
    cos, sin = model.rope(torch.tensor([[-distance]]), torch.tensor([1]))
    query = SURE * rotate(key, cos, sin).flatten()
    weight = model.blocks[0].heads.in_proj.weight
    set_rows(weight, 0, query.repeat(c.n_heads))
    set_rows(weight, c.d_model, key.flatten().repeat(c.n_kv_heads))


def read(model: Hymba, ids: Tensor, meter):
    with observe(model, meter), torch.no_grad():
        for row in ids:
            model.hidden(row[None])
    return meter


# ------------------------------------------------------------------------------------------------------------ attention


def test_a_head_that_looks_at_the_previous_token():
    model, T = one_layer(), 24
    attend_to_distance(model, 1)
    meter = read(model, random_ids(2, T), AttentionMeter())
    # the second token's neighbour is the first one, which counts as BOS
    expected = torch.tensor([0, 1 / (T - 1), 0, (T - 2) / (T - 1)]).expand(1, TINY.n_heads, 4)
    assert_close(meter.mass(), expected.double())
    assert float(meter.entropy().max()) < 1e-6


def test_a_head_that_looks_at_itself():
    model = one_layer()
    attend_to_distance(model, 0)
    mass = read(model, random_ids(1, 30), AttentionMeter()).mass()
    assert_close(mass, torch.tensor([0.0, 0, 1, 0]).expand(1, TINY.n_heads, 4).double())


@pytest.mark.parametrize("window", [None, 8])
def test_uniform_attention_has_the_entropy_log_n(window):
    model, T = one_layer(window=window), 300  # more than one piece of queries
    model.config = replace(model.config, max_length=T)
    with torch.no_grad():
        model.blocks[0].heads.in_proj.weight[: TINY.d_model] = 0
    meter = read(model, random_ids(1, T), AttentionMeter())
    texts_seen = [t + 1 if window is None else min(t + 1, window + 1) for t in range(1, T)]
    entropy = sum(math.log(M + n) for n in texts_seen) / (T - 1)
    assert_close(meter.entropy(), torch.full((1, TINY.n_heads), entropy).double())
    assert_close(meter.uniform_entropy(), torch.tensor([entropy]).double())
    meta = sum(M / (M + n) for n in texts_seen) / (T - 1)
    bos = sum((window is None or t <= window) / (M + n) for t, n in enumerate(texts_seen, 1)) / (T - 1)
    itself = sum(1 / (M + n) for n in texts_seen) / (T - 1)
    expected = torch.tensor([meta, bos, itself, 1 - meta - bos - itself]).double()
    assert_close(meter.mass(), expected.expand(1, TINY.n_heads, 4))
    assert_close(meter.meta_tokens(), torch.full((1, TINY.n_heads, M), meta / M).double())


def test_a_head_that_looks_at_one_meta_token():
    model = one_layer(rope="none")
    D = TINY.d_model
    with torch.no_grad():
        model.embedding.weight.zero_()[:, 0] = 1
        model.meta_tokens.zero_()[:, 1] = 1
        model.meta_tokens[2] = torch.eye(D)[2]
        weight = model.blocks[0].heads.in_proj.weight
        weight[: D + TINY.n_kv_heads * TINY.d_key] = 0
        weight[:D, 0] = SURE  # every text token asks for
        weight[D : D + TINY.n_kv_heads * TINY.d_key, 2] = 1  # what the third meta token alone has
    shares = read(model, random_ids(1, 30), AttentionMeter()).meta_tokens()
    assert_close(shares, torch.tensor([0.0, 0, 1]).expand(1, TINY.n_heads, M).double())


@each_variant
def test_probabilities_are_those_of_the_model(changes):
    """They add up to one over the categories, and times the values they are what the operation returns."""
    model, ids = tiny_model(**changes), random_ids(1, 40)
    heard = []

    def compare(layer, name, arguments, output):
        if name != "attention":
            return
        heard.append(layer)
        arguments.pop("documents", None)
        sources = arguments["sources"]
        values = torch.cat([source.v[0] for source in sources], dim=1)  # (G, S, dv)
        positions = torch.cat([source.positions[0] for source in sources])
        parts = []
        for _, keys, _, p in probabilities(**arguments):
            v = values[:, torch.isin(positions, keys)].repeat_interleave(p.shape[0] // values.shape[0], dim=0)
            parts.append((p @ v).transpose(0, 1).flatten(1))
        assert_close(torch.cat(parts)[None], output)

    read(model, ids, compare)
    attending = [plan.index for plan in model.config.layers if plan.attends]
    assert heard == attending, "text is heard once a layer, the meta tokens never"
    meter = read(model, ids, AttentionMeter())
    assert meter.layers == attending
    if not attending:
        return
    assert_close(meter.mass().sum(-1), torch.ones(len(attending), model.config.n_heads).double(), 1e-6)
    assert_close(meter.meta_tokens().sum(-1), meter.mass()[..., 0]) if model.config.n_meta else None
    assert (meter.entropy() <= meter.uniform_entropy()[:, None] + 1e-6).all()


@torch.no_grad()
def test_what_is_heard_of_each_layer():
    """The operations of heads on text, each of its own layer"""
    model, heard = tiny_model(), []
    with observe(model, lambda layer, name, arguments, output: heard.append((layer, name))):
        model(random_ids(1, 12))
    assert heard == [
        (layer, name)
        for layer in range(TINY.n_layers)
        for name in ("heads", "rotate", "attention", "branch_conv", "selection", "selective_scan")
    ]


def test_observation_changes_nothing():
    model, ids = tiny_model(), random_ids(2, 30)
    before = model(ids)
    with observe(model, AttentionMeter(), OutputMeter(), MemoryMeter()):
        assert torch.equal(model(ids), before)
    assert torch.equal(model(ids), before)
    assert not any(block._forward_pre_hooks for block in model.blocks)


# ------------------------------------------------------------------------------------------------------------- branches


def test_a_layer_that_is_switched_off_has_no_importance():
    model, ids = tiny_model(), random_ids(2, 30)
    with torch.no_grad():
        model.blocks[1].heads.out_proj.weight.zero_()
        model.blocks[3].heads.attn_norm.weight.zero_()
    base = bits(model, ids)

    def change(layer: int, name: str) -> float:
        with without(model, layer, name):
            return bits(model, ids) - base

    assert change(1, "attention") == change(1, "mamba") == change(3, "attention") == 0
    assert abs(change(3, "mamba")) > 0.1 and abs(change(0, "attention")) > 0.1
    assert bits(model, ids) == base, "the model is whole again"


@pytest.mark.parametrize(("name", "norm"), [("attention", "attn_norm"), ("mamba", "ssm_norm")])
def test_removal_is_a_gate_of_zero(name, norm):
    """The paper's removal: beta set to zero, and the other branch keeps its scale."""
    model, ids = tiny_model(), random_ids(1, 30)
    with without(model, 2, name):
        removed = model(ids)
    with torch.no_grad():
        getattr(model.blocks[2].heads, norm).weight.zero_()
    assert_close(removed, model(ids), 1e-6)


def test_bits_of_a_model_that_knows_nothing():
    model, ids = tiny_model(), random_ids(3, 20)
    with torch.no_grad():
        model.norm.weight.zero_()
    assert bits(model, ids) == pytest.approx(3 * 19 * math.log2(TINY.vocab_size))


def test_gates_and_outputs_of_known_magnitude():
    model, ids = tiny_model(), random_ids(1, 20)
    c = model.config
    before = read(model, ids, OutputMeter())
    last = model.blocks[-1].heads
    with torch.no_grad():
        last.attn_norm.weight.fill_(-3)
        last.ssm_norm.weight.fill_(0.5)
        last.in_proj.weight[c.d_model + c.n_kv_heads * c.d_key :][: c.n_kv_heads * c.d_value] *= 3  # the values
    after = read(model, ids, OutputMeter())
    assert gates(model, "attention")[4].tolist() == [3] * c.d_inner
    assert gates(model, "mamba")[4].tolist() == [0.5] * c.d_inner
    assert after.outputs("attention")[4] == pytest.approx(3 * before.outputs("attention")[4])
    assert after.outputs("mamba") == before.outputs("mamba")
    assert list(after.outputs("mamba")) == list(range(c.n_layers))


# --------------------------------------------------------------------------------------------------------------- memory


def test_receptive_field_ends_with_the_windows():
    """Attention alone: each local layer looks `window` tokens back."""
    model = tiny_model(n_layers=3, global_layers=(), kv_groups=(), window=4)
    with torch.no_grad():
        for block in model.blocks:
            block.heads.ssm_norm.weight.zero_()
    assert reach(influence(model, random_ids(2, 30))) == 3 * 4


def test_receptive_field_ends_with_the_convolutions():
    """Mamba alone, with states that are forgotten at once: each layer looks `d_conv - 1` tokens back."""
    model = tiny_model(n_layers=3, global_layers=(), kv_groups=())
    with torch.no_grad():
        for block in model.blocks:
            block.heads.attn_norm.weight.zero_()
            block.heads.mamba.A_log.fill_(20)
    assert reach(influence(model, random_ids(2, 30))) == 3 * (TINY.d_conv - 1)


def test_influence_is_the_jacobian():
    """Random directions estimate the Frobenius norm: with many, the estimate is the norm that autograd gives."""
    model, ids = tiny_model(n_layers=2, global_layers=(0,), kv_groups=()), random_ids(1, 6)

    def last(embedded: Tensor) -> Tensor:
        hook = model.embedding.register_forward_hook(lambda *_: embedded)
        try:
            return model.hidden(ids)[0, -1]
        finally:
            hook.remove()

    jacobian = torch.autograd.functional.jacobian(last, model.embedding(ids).detach())  # (D, 1, T, D)
    exact = jacobian[:, 0].square().sum((0, 2)).sqrt().flip(0)
    # the error of a mean of 60 squares; a mistake of structure is larger than the norm itself
    assert_close(influence(model, ids, probes=60), exact, 0.15)


def test_parts_of_the_influence():
    share = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]).double()
    assert [receptive_field(share, part) for part in (0.4, 0.75, 0.9)] == [0, 1, 2]
    assert reach(share) == 3


def test_memory_of_a_mamba2_head():
    model = tiny_model(**OTHER_ARCHITECTURES["mamba2"])
    step, memory = 0.5, 40.0
    with torch.no_grad():
        for block in model.blocks:
            c = model.config
            block.heads.in_proj.weight[-c.n_ssm_heads :] = 0  # dt is its bias
            block.heads.mamba.dt_bias.fill_(math.log(math.expm1(step)))
            block.heads.mamba.A_log.fill_(math.log(1 / (step * memory)))
    for found in read(model, random_ids(2, 20), MemoryMeter()).lengths().values():
        assert_close(found, torch.full((model.config.n_ssm_heads, 1), memory).double())


def test_removal_of_all_that_a_layer_does():
    """Where there is one branch only, removing it leaves the residual stream as it was."""
    model, ids = tiny_model(**OTHER_ARCHITECTURES["samba"]), random_ids(1, 30)
    for layer, name in enumerate(("mamba", "attention")):
        with without(model, layer, name):
            removed = model(ids)
        kept = model.blocks[layer].heads.out_proj.weight.detach().clone()
        with torch.no_grad():
            model.blocks[layer].heads.out_proj.weight.zero_()
            assert_close(removed, model(ids), 1e-6)
            model.blocks[layer].heads.out_proj.weight.copy_(kept)


def test_memory_of_known_length():
    model = tiny_model()
    step, memory = 0.125, torch.tensor([1.0, 5, 20, 1000])
    with torch.no_grad():
        for block in model.blocks:
            mamba = block.heads.mamba
            mamba.dt_weight.zero_()
            mamba.dt_bias.fill_(math.log(math.expm1(step)))  # inverse of softplus
            mamba.A_log.copy_((1 / (step * memory)).log().expand(TINY.d_inner, 4))
    lengths = read(model, random_ids(2, 20), MemoryMeter()).lengths()
    assert list(lengths) == list(range(TINY.n_layers))
    for found in lengths.values():
        assert_close(found, memory.double().expand(TINY.d_inner, 4))


# ------------------------------------------------------------------------------------------------------------- together


def test_all_analyses_of_a_checkpoint(checkpoint: Path):
    model, tokenizer = Hymba.from_pretrained(checkpoint), Tokenizer.from_pretrained(checkpoint)
    done = []
    found = analyze(model, tokenizer, rows=2, length=48, advance=lambda: done.append(1))
    assert len(done) == passes(model, ANALYSES, 2)
    assert json.loads(json.dumps(found, allow_nan=False))
    assert set(ANALYSES) < set(found)
    L, H, c = model.config.n_layers, model.config.n_heads, model.config
    assert torch.tensor([found["attention"]["mass"][name] for name in CATEGORIES]).shape == (4, L, H)
    assert {torch.tensor(share).shape for share in found["meta"]["shares"].values()} == {(L, c.n_meta)}
    assert all(0 < overlap <= 1 for overlap in found["meta"]["overlap"].values())
    assert found["importance"]["mamba"]["layers"] == list(range(L))
    assert sum(found["receptive-field"]["share"]) == pytest.approx(1, abs=1e-4)
    assert torch.tensor(found["memory"]["channels"]).shape == (L, c.d_inner)
    assert found["text"]["length"] == 48 and found["text"]["rows"] == 2
    again = analyze(model, tokenizer, rows=2, length=48)
    assert found == again, "the same numbers every time"


@pytest.mark.parametrize("changes", OTHER_ARCHITECTURES.values(), ids=OTHER_ARCHITECTURES)
def test_models_that_lack_a_branch(changes, checkpoint: Path):
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    model = tiny_model(vocab_size=tokenizer.vocab_size, **changes)
    done = []
    found = analyze(model, tokenizer, rows=1, length=24, advance=lambda: done.append(1))
    assert len(done) == passes(model, ANALYSES, 1)
    attend = [plan.index for plan in model.config.layers if plan.attends]
    recur = [plan.index for plan in model.config.layers if plan.recurs]
    assert ("attention" in found) == bool(attend) and ("memory" in found) == bool(recur)
    assert ("meta" in found) == bool(attend and model.config.n_meta)
    for name, layers in (("attention", attend), ("mamba", recur)):
        assert found["importance"].get(name, {"layers": []})["layers"] == layers
        assert found["magnitudes"].get(name, {"layers": []})["layers"] == layers
    for name, part in found["magnitudes"].items():
        hybrid = [plan.index for plan in model.config.layers if plan.mixer == "hybrid"]
        assert part.get("gate", {"layers": []})["layers"] == hybrid, name


def test_only_what_is_asked_for(checkpoint: Path):
    model, tokenizer = Hymba.from_pretrained(checkpoint), Tokenizer.from_pretrained(checkpoint)
    for name in ANALYSES:
        found = analyze(model, tokenizer, only=[name], rows=1, length=16)
        assert {key for key in found if key in ANALYSES} == {name}
    with pytest.raises(UserError, match="choose from attention"):
        analyze(model, tokenizer, only=["heads"])


def test_rows_of_a_text(checkpoint: Path):
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    text = texts.prose()
    rows = texts.encode(tokenizer, text, 3, 20)
    assert rows.shape == (3, 20) and (rows[:, 0] == tokenizer.bos_token_id).all()
    joined = tokenizer.decode(rows[:, 1:].flatten().tolist())
    assert text.startswith(joined) and texts.text_bytes(tokenizer, rows) == len(joined.encode())
    assert texts.encode(tokenizer, "A short one.", 3, 100).shape[0] == 1
    with pytest.raises(UserError, match="too short"):
        texts.encode(tokenizer, "", 3, 100)
    assert texts.numbers() == texts.numbers()
    assert all(len(make().encode()) > 20_000 for make in texts.KINDS.values())


# ---------------------------------------------------------------------------------------------------------- the command


def test_command_writes_a_folder(checkpoint: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "inside"
    arguments = ["--rows", "1", "--length", "40", "--only", "receptive-field", "--only", "memory", "--out", str(out)]
    assert run(["analyze", str(checkpoint), str(checkpoint), "--names", "one,two", *arguments]) == 0
    figures = {"receptive-field", "memory"}
    files = {f"{name}.{kind}" for name in figures for kind in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == files | {"README.md", "analysis.json"}
    page = (out / "README.md").read_text()
    assert all(f"]({name}.png)" in page for name in figures)
    assert list(json.loads((out / "analysis.json").read_text())["models"]) == ["one", "two"]


@pytest.mark.filterwarnings("error::UserWarning")  # a layout that cannot be made
def test_figures_of_different_models(checkpoint: Path, tmp_path: Path):
    """Every figure can be drawn of models side by side of which each lacks something, and shows those that do not."""
    pytest.importorskip("matplotlib")
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    found = {
        name: analyze(tiny_model(vocab_size=tokenizer.vocab_size, **changes), tokenizer, rows=1, length=40)
        for name, changes in {"hymba": {}, "llama": OTHER_ARCHITECTURES["attention"],
                              "mamba": OTHER_ARCHITECTURES["mamba2"]}.items()
    }  # fmt: skip
    write(found, tmp_path)
    assert {path.stem for path in tmp_path.glob("*.svg")} == set(FIGURES)
    for figure, shown in {
        "memory": ("hymba", "mamba"),
        "attention-mass": ("hymba", "llama"),
        "gates": ("hymba",),
    }.items():
        drawn = (tmp_path / f"{figure}.svg").read_text()
        assert [name for name in found if f">{name}<" in drawn] == list(shown), figure


def test_command_prints_json(checkpoint: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged. " * 20)
    assert run(["analyze", str(checkpoint), "--only", "memory", "--text", str(text), "--length", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"]
    assert "memory" in found[checkpoint.name] and "attention" not in found[checkpoint.name]
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((".", ".", "--json"), "give different ones with --names"),
        ((".", "--names", "a,b", "--json"), "2 names for 1 models"),
        ((".", "--text", "nowhere.txt", "--json"), "nowhere.txt cannot be read"),
        (("nowhere", "--json"), "no such folder"),
        ((".", "--only", "all", "--json"), "is not one of"),
    ],
)
def test_command_refuses(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(["analyze", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_command_without_matplotlib(checkpoint: Path, capsys, monkeypatch):
    monkeypatch.setattr("hymba.analysis.report.find_spec", lambda name: None)
    assert run(["analyze", str(checkpoint)]) == 2
    assert "install hymba[plots]" in capsys.readouterr().err
