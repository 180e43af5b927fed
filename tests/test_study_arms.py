"""The arms of the study are what the paper's tables say, of one size, and each is a change to a neighbour."""

from dataclasses import fields

import pytest

from hymba import Hymba, HymbaConfig
from hymba.config import share_kv_in_pairs
from hymba.errors import UserError
from hymba.study.arms import ARMS, TOLERANCE, build
from hymba.study.paper import TABLE_1

SMALL = HymbaConfig(
    vocab_size=512, d_model=64, n_layers=6, n_heads=4, n_kv_heads=2, d_ff=128, d_ssm_head=32, dt_rank=4, n_meta=8,
    window=32, global_layers=(0, 2, 5), kv_groups=share_kv_in_pairs(6, (0, 2, 5)), rope="default",
    rope_original_length=None, max_length=512,
)  # fmt: skip


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_has_the_parameters_of_hymba(name):
    built = build(name, SMALL)
    actual = sum(p.numel() for p in Hymba(built.config).parameters())
    target = sum(p.numel() for p in Hymba(SMALL).parameters())
    assert actual == built.parameters
    assert abs(actual - target) <= TOLERANCE * target
    assert bool(built.adjusted) == (built.config != built.arm.config(SMALL))


@pytest.mark.parametrize("preset", ["125M", "350M"])
def test_arms_can_be_built_at_the_papers_sizes(preset):
    hymba = HymbaConfig.preset(preset)
    sizes = {name: build(name, hymba).parameters for name in ARMS}
    assert max(sizes.values()) <= (1 + 2 * TOLERANCE) * min(sizes.values())


def test_the_rows_of_table_1():
    assert sorted(arm.row for arm in ARMS.values() if arm.row) == sorted(TABLE_1) == list(range(1, 14))
    assert {name for name, arm in ARMS.items() if arm.table_3} == {"mamba2", "mamba2-ffn", "llama", "samba", "hymba"}


# what each arm must be, in the words of the tables: mixers, key heads, full layers, groups that share, meta tokens
H, M, A = ("hybrid",), ("mamba",), ("attention",)
EVERY, THREE, NONE = (0, 1, 2, 3, 4, 5), (0, 2, 5), ()
PLANS = {
    "mamba": (M, None, NONE, NONE, 0),
    "heads-quarter": (H, 1, EVERY, NONE, 0),
    "heads-half": (H, 2, EVERY, NONE, 0),
    "heads-all": (H, 4, EVERY, NONE, 0),
    "gqa": (H, 2, EVERY, NONE, 0),
    "attention": (A, 4, EVERY, NONE, 0),
    "all-local": (H, 2, NONE, NONE, 0),
    "local-global": (H, 2, THREE, NONE, 0),
    "shared-kv": (H, 2, THREE, ((3, 4),), 0),
    "attention-compressed": (A, 2, THREE, ((3, 4),), 0),
    "concat": (H, 2, THREE, ((3, 4),), 0),
    "mamba-meta": (M, None, NONE, NONE, 8),
    "hymba": (H, 2, THREE, ((3, 4),), 8),
    "mamba2": (("mamba2",), None, NONE, NONE, 0),
    "mamba2-ffn": (("mamba2",), None, NONE, NONE, 0),
    "llama": (A, 2, EVERY, NONE, 0),
    "samba": (("mamba", "attention"), 2, NONE, NONE, 0),
}


@pytest.mark.parametrize("name", ARMS)
def test_the_plan_of_every_arm(name):
    c = build(name, SMALL).config
    mixers, kv_heads, full, groups, meta = PLANS[name]
    assert c.mixers == mixers
    assert c.n_meta == meta
    attends = [plan for plan in c.layers if plan.attends]
    if kv_heads is not None:
        assert c.n_kv_heads == kv_heads
    assert tuple(plan.index for plan in attends if plan.window is None) == full
    assert {plan.index: plan.producer for plan in attends if not plan.produces_kv} == {
        layer: group[0] for group in groups for layer in group[1:]
    }
    assert c.fusion == ("concat" if name == "concat" else "mean")
    assert (c.d_ff == 0) == (name == "mamba2")
    if c.mixers != A and c.mixers[0] != "mamba2":
        assert c.d_state == SMALL.d_state


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.neighbour])
def test_an_arm_differs_from_its_neighbour_in_one_respect(name):
    arm = ARMS[name]
    ours, theirs = arm.config(SMALL), ARMS[arm.neighbour].config(SMALL)
    differing = {f.name for f in fields(ours) if getattr(ours, f.name) != getattr(theirs, f.name)}
    # what goes with a change: half of the heads are key heads, too, and keep their size; layers without attention have
    # no full or shared layers, no rotation, and no fusion
    together = [
        {"n_heads", "n_kv_heads", "d_head"},
        {"mixers", "d_state", "rope", "global_layers", "kv_groups", "fusion"},
        {"window", "global_layers"},
    ]
    assert len(differing) == 1 or any(differing <= group for group in together), differing


def test_what_cannot_be_built_is_said_in_a_line():
    with pytest.raises(UserError, match="unknown arm 'llamas'; choose from mamba"):
        build("llamas", SMALL)
    with pytest.raises(UserError, match="n_heads=5 cannot be halved"):
        build("heads-half", HymbaConfig.preset("1.5B", n_heads=5))
    with pytest.raises(UserError, match="the arm concat comes no closer"):
        build("concat", HymbaConfig.preset("350M", d_ff=16))
