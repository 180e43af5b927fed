"""One call per token does what the model does, on the same cache, with any instruction set and any number of threads
(that threads change no bit is a test of its own; the others use one, which costs less on a busy machine)."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import (
    GOLDEN,
    GOLDEN_CASES,
    OTHER_ARCHITECTURES,
    TINY,
    VARIANTS,
    WINDOW,
    assert_close,
    random_ids,
    randomise,
    tiny_model,
)
from safetensors.torch import load_file
from torch import Tensor

from hymba import Hymba, HymbaCache, HymbaConfig, UserError
from hymba.engine import native
from hymba.engine.native import NativeDecoder
from hymba.model.cache import KINDS
from hymba.model.quant import quantize_
from hymba.ops import library

pytestmark = pytest.mark.skipif(not library.available(), reason=library.status())

# head sizes of Hymba-1.5B, five query heads to a key head, more keys than the kernel takes at a time
WIDE = HymbaConfig(
    vocab_size=97, d_model=320, n_layers=3, n_heads=5, n_kv_heads=1, d_ff=200, d_state=16, dt_rank=20, n_meta=37,
    window=300,
    global_layers=(0,), kv_groups=((1, 2),), max_length=2048, rope_original_length=512,
)  # fmt: skip


HYMBAS = {name: changes for name, changes in VARIANTS.items() if name not in OTHER_ARCHITECTURES}


@pytest.fixture(autouse=True)
def as_before():
    isa, threads = library.isa(), torch.get_num_threads()
    yield
    library.use_isa(isa)
    torch.set_num_threads(threads)


def wide_model() -> Hymba:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Hymba(WIDE)
    randomise(model)
    return model.eval()


def in_bfloat16(model: Hymba) -> Hymba:
    """A copy of the model in bfloat16, as a checkpoint is loaded: A stays in float32."""
    model = copy.deepcopy(model)
    kept = [block.heads.mamba.A_log for block in model.blocks]
    model.to(torch.bfloat16)
    for block, A_log in zip(model.blocks, kept, strict=True):
        block.heads.mamba.A_log.data = A_log.data.float()
    return model


@torch.no_grad()
def prefilled(
    model: Hymba, lengths: tuple[int, ...], ids: Tensor, max_length: int, kind: str | None = None
) -> HymbaCache:
    """A cache whose rows have read that many of their ids."""
    cache = model.new_cache(len(lengths), max_length, kind)
    for row, n in enumerate(lengths):
        if n:
            model(ids[row : row + 1, :n], cache=cache.rows(row, row + 1))
    return cache


@torch.no_grad()
def by_model(model: Hymba, cache: HymbaCache, ids: Tensor) -> Tensor:
    return torch.stack([model(ids[:, t : t + 1], cache=cache)[:, 0].float() for t in range(ids.shape[1])])


def by_decoder(model: Hymba, cache: HymbaCache, ids: Tensor) -> Tensor:
    decoder = NativeDecoder(model, cache.batch_size)
    return torch.stack([decoder.step(ids[:, t], cache) for t in range(ids.shape[1])])


def assert_same_state(one: HymbaCache, other: HymbaCache, tolerance: float = 2e-5) -> None:
    assert torch.equal(one.lengths, other.lengths)
    for x, y in ((one.ssm, other.ssm), (one.conv, other.conv), *((one.k[i], other.k[i]) for i in one.k),
                 *((one.v[i], other.v[i]) for i in one.v)):  # fmt: skip
        if x.numel():
            assert_close(x, y, tolerance)


@pytest.mark.parametrize("isa", library.isas())
@pytest.mark.parametrize("changes", HYMBAS.values(), ids=HYMBAS)
def test_decoding_equals_the_model(changes, isa):
    """Rows of different lengths over three windows; the cache is left the same, so the two may take turns."""
    library.use_isa(isa)
    model = tiny_model(**changes)
    lengths, steps = (0, 1, WINDOW + 3), 3 * WINDOW + 2
    ids = random_ids(len(lengths), WINDOW + 3 + steps)
    one, other = (prefilled(model, lengths, ids, WINDOW + 3 + steps) for _ in range(2))
    assert_close(by_decoder(model, one, ids[:, :steps]), by_model(model, other, ids[:, :steps]))
    assert_same_state(one, other)


@pytest.mark.parametrize("isa", library.isas())
@pytest.mark.parametrize("lengths", [(700,), (0, 290, 299, 620, 263)], ids=["one row", "five rows"])
def test_wide_heads_and_many_keys(lengths, isa):
    """Registers full, several chunks of keys, a ring that wraps inside a chunk."""
    library.use_isa(isa)
    model = wide_model()
    ids = random_ids(len(lengths), 720, vocab_size=WIDE.vocab_size)
    one, other = (prefilled(model, lengths, ids, 720) for _ in range(2))
    assert_close(by_decoder(model, one, ids[:, :12]), by_model(model, other, ids[:, :12]))
    assert_same_state(one, other)
    # bfloat16 is no worse than PyTorch's: both are measured against float32, over rounding errors that differ
    low = in_bfloat16(model)
    exact, expected, found = (
        prefilled(m, lengths, ids, 720) for m in (low.float(), in_bfloat16(model), in_bfloat16(model))
    )
    exact = by_model(low, exact, ids[:, :12])
    low = in_bfloat16(model)
    theirs, ours = by_model(low, expected, ids[:, :12]) - exact, by_decoder(low, found, ids[:, :12]) - exact
    assert ours.square().mean() <= 2 * theirs.square().mean()


@pytest.mark.parametrize(
    "changes", [{}, VARIANTS["qk_norm perhead-rms"], VARIANTS["relu2"], VARIANTS["untied"]], ids=str
)
def test_bfloat16_rounds_where_the_model_does(changes):
    """Not bit by bit: sums are taken in another order, and the softmax weights have bf16 rounding where the processor
    multiplies bf16. But the error against the same weights in float32 is PyTorch's: its mean square at most doubles."""
    model = in_bfloat16(tiny_model(**changes))
    ids = random_ids(4, 3 * WINDOW)
    exact = by_model(copy.deepcopy(model).float(), copy.deepcopy(model).float().new_cache(4, 32), ids)
    theirs = by_model(model, model.new_cache(4, 32), ids) - exact
    ours = by_decoder(model, model.new_cache(4, 32), ids) - exact
    assert 0 < theirs.square().mean() < 2e-3 * exact.square().mean()
    assert ours.square().mean() <= 2 * theirs.square().mean()


@pytest.mark.parametrize("isa", library.isas())
@pytest.mark.parametrize("rows", [2, 8, 13, 16, 17, 31, 66])
def test_bfloat16_batches_of_any_size(rows, isa):
    """Products go by register tiles, panels of 16 rows or matrix tiles; widths and heights that fill none of them. The
    place in the batch changes no bit."""
    library.use_isa(isa)
    model = in_bfloat16(tiny_model(d_ff=37))
    ids = random_ids(rows, 2)
    ids[-1] = ids[0]
    exact = by_model(copy.deepcopy(model).float(), copy.deepcopy(model).float().new_cache(rows, 2), ids)
    theirs = by_model(model, model.new_cache(rows, 2), ids) - exact
    found = by_decoder(model, model.new_cache(rows, 2), ids)
    ours = found - exact
    assert torch.equal(found[:, 0], found[:, -1])
    assert ours.square().mean() <= 2 * theirs.square().mean()
    assert (ours - theirs).abs().max() < 0.1 * exact.abs().max()  # no single row or entry is another one's


def assert_nearly(found: Tensor, expected: Tensor, without: Tensor) -> None:
    """In the mean square far less than what keys and values in 8 bits do, the difference to logits `without` them: an
    element between two of its steps may go either way after a rounding error before it, and what later layers round
    moves with it. Mostly none does; a mistake is as large as that difference."""
    noise = (expected - without).square().mean()
    assert 0 < noise < 2e-2 * without.square().mean()
    assert (found - expected).square().mean() <= 0.1 * noise


# heads that end in the middle of a vector: of 22 and 44, of 40 and 80
ODD_HEADS = {
    "heads of 22": {"d_model": 132, "n_heads": 6},
    "heads of 40": {"d_model": 280, "n_heads": 7, "n_kv_heads": 1},
}
SIZES = HYMBAS | ODD_HEADS


@pytest.mark.parametrize("isa", library.isas())
@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES)
def test_keys_and_values_of_8_bits(changes, isa):
    """As `test_decoding_equals_the_model`. What a step does not write, it does not read: slots are filled with NaN."""
    library.use_isa(isa)
    model = tiny_model(**changes)
    lengths, steps = (0, 1, WINDOW + 3), 3 * WINDOW + 2
    ids = random_ids(len(lengths), WINDOW + 3 + steps)
    one, other, plain = (prefilled(model, lengths, ids, WINDOW + 3 + steps, kind) for kind in ("int8", "int8", None))
    for row, length in enumerate(lengths):
        for scale in (*one.k_scale.values(), *one.v_scale.values()):
            scale[row, :, length:] = torch.nan
    found, expected = by_decoder(model, one, ids[:, :steps]), by_model(model, other, ids[:, :steps])
    assert_nearly(found, expected, by_model(model, plain, ids[:, :steps]))
    assert_same_codes(one, other)


def assert_same_codes(one: HymbaCache, other: HymbaCache) -> None:
    """But for elements between two steps, which are few."""
    assert torch.equal(one.lengths, other.lengths)
    for codes, others in ((one.k, other.k), (one.v, other.v)):
        for layer in codes:
            difference = (codes[layer].int() - others[layer].int()).abs().float()
            assert difference.max() <= 2 and difference.mean() < 0.1
    for scales, others in ((one.k_scale, other.k_scale), (one.v_scale, other.v_scale)):
        for layer in scales:
            assert_close(scales[layer].nan_to_num(), others[layer], 1e-2)


@pytest.mark.parametrize("isa", library.isas())
@pytest.mark.parametrize("lengths", [(700,), (0, 290, 299, 620, 263)], ids=["one row", "five rows"])
def test_many_keys_of_8_bits(lengths, isa):
    """As `test_wide_heads_and_many_keys`."""
    library.use_isa(isa)
    model = wide_model()
    ids = random_ids(len(lengths), 720, vocab_size=WIDE.vocab_size)
    plain, one, other = (prefilled(model, lengths, ids, 720, kind) for kind in (None, "int8", "int8"))
    found, expected = by_decoder(model, one, ids[:, :12]), by_model(model, other, ids[:, :12])
    assert_nearly(found, expected, by_model(model, plain, ids[:, :12]))
    assert_same_codes(one, other)
    # in bfloat16 the reference rounds what it expands, the kernel does not
    low = in_bfloat16(model)
    exact = by_model(low.float(), prefilled(low.float(), lengths, ids, 720, "int8"), ids[:, :12])
    low = in_bfloat16(model)
    one, other = (prefilled(low, lengths, ids, 720, "int8") for _ in range(2))
    theirs, ours = by_model(low, other, ids[:, :12]) - exact, by_decoder(low, one, ids[:, :12]) - exact
    assert ours.square().mean() <= 2 * theirs.square().mean()


@pytest.mark.parametrize("isa", library.isas())
def test_a_stored_token_is_rounded_bit_by_bit_as_the_model_rounds(isa):
    """One layer, whose keys depend on the embedding alone; a token of zeros, tiny ones, and huge ones."""
    library.use_isa(isa)
    model = tiny_model(n_layers=1, global_layers=(0,), kv_groups=(), rope="none", rope_original_length=None)
    with torch.no_grad():
        model.embedding.weight[:4] *= torch.tensor([0, 1e-12, 1e-18, 1e6])[:, None]
        model.blocks[0].heads_norm.weight *= 1e-3
    for step in range(4):
        one, other = model.new_cache(1, 4, "int8"), model.new_cache(1, 4, "int8")
        ids = torch.tensor([[step]])
        found, expected = by_decoder(model, one, ids), by_model(model, other, ids)
        assert found.isfinite().all()
        assert_same_codes(one, other)
        if step == 0:
            assert not any(x.any() for store in one.stores.values() for x in store.values())
            assert_close(found, expected)


@pytest.mark.parametrize("case", GOLDEN_CASES)
@pytest.mark.parametrize("tag", ["short", "long"])
def test_official_trajectories(case, tag):
    expected = load_file(GOLDEN / case / "golden.safetensors")
    model = Hymba.from_pretrained(GOLDEN / case)
    prompt, new = expected[f"gen_{tag}_prompt_ids"], expected[f"gen_{tag}_new_ids"]
    cache = prefilled(model, (prompt.shape[1],), prompt, prompt.shape[1] + new.shape[1])
    logits = by_decoder(model, cache, new[:, :-1])[:, 0]
    assert_close(logits, expected[f"gen_{tag}_logits_full"][1:])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("isa", library.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantised_models(kind, isa, dtype):
    """Both sides multiply with the same kernel. An activation that falls between two of its 8-bit steps may go either
    way after a rounding error before it, so single activations differ by a step, 1/127 of the largest of its group."""
    library.use_isa(isa)
    model = tiny_model() if dtype == torch.float32 else in_bfloat16(tiny_model())
    quantize_(model, kind)
    ids = random_ids(2, 12)
    expected = by_model(model, model.new_cache(2, 12), ids)
    error = by_decoder(model, model.new_cache(2, 12), ids) - expected
    assert error.square().mean() <= (1e-4 if dtype == torch.float32 else 2e-3) * expected.square().mean()


@pytest.mark.parametrize("cache", KINDS)
@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_neither_threads_nor_neighbours_nor_repetition_change_a_bit(kind, cache):
    model = tiny_model()
    if kind:
        quantize_(model, kind)
    lengths = (2, 0, 9, 20, 5)
    ids = random_ids(5, 40)

    def read() -> HymbaCache:
        return prefilled(model, lengths, ids, 40, cache)

    def run(threads: int) -> Tensor:
        cache = read()  # with one thread: PyTorch's own products depend on their number
        torch.set_num_threads(threads)
        logits = by_decoder(model, cache, ids[:, :10])
        torch.set_num_threads(1)
        return logits

    first = run(1)
    assert torch.equal(run(1), first)
    for threads in (2, 3):
        assert torch.equal(run(threads), first)
    # a subset of the rows, as a view of the same storage: the others are not touched
    rows = read()
    before = copy.deepcopy(rows)
    assert torch.equal(by_decoder(model, rows.rows(1, 4), ids[1:4, :10]), first[:, 1:4])
    assert rows.lengths.tolist() == [2, 10, 19, 30, 5]
    for row in (0, 4):
        assert torch.equal(rows.ssm[:, row], before.ssm[:, row])
        for name, stores in rows.stores.items():
            assert all(torch.equal(store[row], before.stores[name][i][row]) for i, store in stores.items())
    # alone: a single row takes another kernel for dense matrices, which adds in another order
    alone = by_decoder(model, read().rows(3, 4), ids[3:4, :10])
    if cache is None:
        assert_close(alone, first[:, 3:4])
    else:
        plain = by_decoder(model, prefilled(model, lengths, ids, 40).rows(3, 4), ids[3:4, :10])
        assert_nearly(alone, first[:, 3:4], plain)


def test_without_logits_only_the_cache_moves():
    model = tiny_model()
    ids = random_ids(2, 3)
    one, other = model.new_cache(2, 8), model.new_cache(2, 8)
    decoder = NativeDecoder(model, 4)
    for t in range(3):
        assert decoder.step(ids[:, t], one, logits=False) is None
        decoder.step(ids[:, t], other)
    assert_same_state(one, other, 0)


def test_extreme_weights_stay_finite():
    """Steps of the SSM from nothing to forgetting at once, huge scores, a token whose activations are all zero."""
    model = tiny_model()
    with torch.no_grad():
        for block in model.blocks:
            block.heads.mamba.dt_bias.copy_(torch.linspace(-100, 100, len(block.heads.mamba.dt_bias)))
            block.heads.mamba.A_log.mul_(4)
            block.heads.in_proj.weight[: TINY.d_model] *= 1e4
        model.embedding.weight[1] = 0
    ids = random_ids(1, 20)
    ids[:, 3:6] = 1
    expected = by_model(model, model.new_cache(1, 20), ids)
    found = by_decoder(model, model.new_cache(1, 20), ids)
    assert expected.isfinite().all() and found.isfinite().all()
    assert_close(found, expected, 1e-3)  # scores of 1e4 carry errors of 1e-3 into the softmax


@pytest.mark.parametrize("isa", library.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_workspace_held_does_not_matter(kind, dtype, isa, monkeypatch):
    """Rows of 3 to 30 keys, in stretches of odd and even lengths that fill whole vectors, or do not."""
    library.use_isa(isa)
    model = tiny_model() if dtype == torch.float32 else in_bfloat16(tiny_model())
    ids, found, make = random_ids(2, 27), [], NativeDecoder._make_workspace
    for byte in (0, 0xFF):
        monkeypatch.setattr(NativeDecoder, "_make_workspace", lambda s, n: make(s, n) or s._workspace.fill_(byte))  # noqa: B023
        found.append(by_decoder(model, model.new_cache(2, 27, kind), ids))
    assert found[0].isfinite().all() and torch.equal(*found)


def test_mistakes():
    model = tiny_model()
    decoder, cache = NativeDecoder(model, 2), model.new_cache(2, 2)
    for ids, message in (
        (torch.zeros(3, dtype=torch.int64), "shape"),
        (torch.zeros(2), "integers"),
        (torch.tensor([0, TINY.vocab_size]), "token ids"),
        (torch.tensor([-1, 0]), "token ids"),
    ):
        with pytest.raises(UserError, match=message):
            decoder.step(ids, cache)
    with pytest.raises(UserError, match="larger"):
        decoder.step(torch.zeros(3, dtype=torch.int64), model.new_cache(3, 2))
    with pytest.raises(UserError, match="another model"):
        decoder.step(torch.zeros(1, dtype=torch.int64), tiny_model(n_meta=2).new_cache(1, 2))
    for _ in range(2):
        decoder.step(torch.zeros(2, dtype=torch.int64), cache)
    with pytest.raises(UserError, match="max_length=2"):
        decoder.step(torch.zeros(2, dtype=torch.int64), cache)
    assert cache.lengths.tolist() == [2, 2]
    with pytest.raises(UserError, match="float16"):
        NativeDecoder(copy.deepcopy(model).half(), 1)


def test_the_reason_is_named_where_it_does_not_run(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: "there is no library")
    assert native.supports(tiny_model()) == "there is no library"


def test_the_model_keeps_its_weights_in_one_place():
    """Weights are read where the model keeps them: what is changed there is seen."""
    model = Hymba(replace(TINY, tie_embeddings=False)).eval()
    decoder, ids = NativeDecoder(model, 1), torch.tensor([5])
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not decoder.step(ids, model.new_cache(1, 4)).any()
