"""Decoding equals one long forward pass, whatever the chunks; rows are saved, forked and given back unchanged."""

import json
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, VARIANTS, WINDOW, assert_close, each_variant, random_ids, tiny_model
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from hymba import Hymba, HymbaCache, UserError
from hymba.model.cache import LayerState, RowSnapshot, expand, quantise
from hymba.visibility import EMPTY, stored_positions

LENGTH = 3 * WINDOW + 5  # far past the window
pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


def read(model: Hymba, ids: torch.Tensor, cache: HymbaCache, chunks: list[int]) -> torch.Tensor:
    """Logits of all ids, read in chunks of the given sizes, the rest one by one."""
    sizes = [*chunks, *[1] * (ids.shape[1] - sum(chunks))]
    return torch.cat([model(part, cache=cache) for part in ids.split(sizes, dim=1)], dim=1)


# ------------------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("prompt", range(1, WINDOW + 5))
def test_every_prompt_length(prompt):
    model, ids = tiny_model(), random_ids(2, LENGTH)
    assert_close(read(model, ids, model.new_cache(2), [prompt]), model(ids))


@each_variant
@pytest.mark.parametrize("chunks", [[2, 1, WINDOW + 4, WINDOW], [LENGTH - 3]], ids=str)
def test_every_variant(changes, chunks):
    """The ring is filled, overrun by a chunk longer than itself, and wrapped; decoding goes on from there."""
    model, ids = tiny_model(**changes), random_ids(2, LENGTH)
    cache = model.new_cache(2, max_length=LENGTH)
    assert_close(read(model, ids, cache, chunks), model(ids))
    assert cache.lengths.tolist() == [LENGTH, LENGTH]


@given(st.lists(st.integers(1, 2 * WINDOW + 3), max_size=8), st.integers(1, LENGTH))
def test_any_chunks(sizes, length):
    chunks, left = [], length
    for size in sizes:
        chunks.append(min(size, left))
        left -= chunks[-1]
    model, ids = tiny_model(), random_ids(2, length, seed=length)
    assert_close(read(model, ids, model.new_cache(2), [c for c in chunks if c]), model(ids))


def test_states_depend_on_what_was_read_only():
    model, ids = tiny_model(), random_ids(1, LENGTH)
    whole, steps = model.new_cache(), model.new_cache()
    model(ids, cache=whole)
    read(model, ids, steps, [])
    for name, x in whole.snapshot(0).tensors.items():
        assert_close(steps.snapshot(0).tensors[name], x)


def test_a_cache_stays_outside_the_graph():
    """Whoever forgets `no_grad` does not keep the activations of all steps alive, nor fails in the middle."""
    model, ids = tiny_model(), random_ids(1, LENGTH)
    cache = model.new_cache()
    with torch.enable_grad():
        logits = read(model, ids, cache, [WINDOW + 3, 2])
    assert_close(logits, model(ids))
    assert not any(x.requires_grad for x in (cache.conv, cache.ssm, *cache.k.values(), *cache.v.values()))


# --------------------------------------------------------------------------------------------------------------- 8 bits


@given(st.integers(1, 70), st.sampled_from([0.0, 1e-42, 1e-30, 1.0, 1e30]), st.integers(0, 99))
def test_rounding_is_to_the_nearest_of_255_steps(size, magnitude, seed):
    x = magnitude * torch.randn(3, 2, size, generator=torch.Generator().manual_seed(seed))
    x[0, 1] = 0
    q, scale = quantise(x)
    assert (q.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (3, 2))
    back = expand(q, scale, torch.float32)
    assert back.isfinite().all() and not back[0, 1].any() and scale[0, 1] == 0
    # a scale of few bits, among the denormal numbers, is itself off by half of their step
    assert ((back - x).abs() <= 0.500001 * scale[..., None] + 127 * 2**-149).all()
    if magnitude >= 1e-30:
        assert q[1:].int().abs().amax(-1).eq(127).all()  # the largest is kept, and twice is as good as once
        assert torch.equal(quantise(back)[0], q)


@contextmanager
def rounding_keys(model: Hymba):
    """Without a cache: every key and value of a text is seen rounded to 8 bits, those of the meta tokens are not."""
    extend = LayerState.extend

    def rounded(self, new, lengths):
        if self.meta is not None or model.config.n_meta == 0:
            new = new._replace(**{name: expand(*quantise(x := getattr(new, name)), x.dtype) for name in "kv"})
        return extend(self, new, lengths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerState, "extend", rounded)
        yield


def assert_nearly(actual: torch.Tensor, expected: torch.Tensor, without: torch.Tensor) -> None:
    """An element between two of its steps may go either way after a rounding error before it. That is rare, so in the
    mean square it is far less than what all the rounding to 8 bits does, the difference to logits `without` it."""
    noise = (expected - without).square().mean()
    assert 0 < noise < 1e-2 * without.square().mean()
    assert (actual - expected).square().mean() <= 2e-2 * noise


WITH_KEYS = {name: changes for name, changes in VARIANTS.items() if "mamba" not in name or "attention" in name}


@pytest.mark.parametrize("changes", WITH_KEYS.values(), ids=WITH_KEYS)
@pytest.mark.parametrize("chunks", [[2, 1, WINDOW + 4, WINDOW], [LENGTH - 3], [LENGTH], []], ids=str)
def test_in_8_bits_chunks_change_nothing_either(changes, chunks):
    """Each token sees all others rounded, so any chunks give what one pass with rounded keys and values gives."""
    model, ids = tiny_model(**changes), random_ids(2, LENGTH)
    with rounding_keys(model):
        expected = model(ids)
    cache = model.new_cache(2, LENGTH, "int8")
    assert_nearly(read(model, ids, cache, chunks), expected, model(ids))
    stored = [x for store in (cache.k, cache.v) for x in store.values()]
    assert {x.dtype for x in stored} == {torch.int8} and all(x.any() for x in stored)


def test_rows_in_8_bits_are_independent_copied_reset_and_padded():
    model = tiny_model()
    texts = random_ids(4, LENGTH)
    with rounding_keys(model):
        expected = model(texts)
    for chunk in (1, WINDOW + 3):  # padding overtakes the ring
        cache = model.new_cache(4, kind="int8")
        lengths = torch.tensor([5, 0, 3, WINDOW + 1])
        for first in range(0, int(lengths.max()), chunk):
            mask = first + torch.arange(chunk) < lengths[:, None]
            model(F.pad(texts, (0, chunk))[:, first : first + chunk], attention_mask=mask, cache=cache)
        assert cache.lengths.tolist() == lengths.tolist()
        cache.copy(3, 1)
        cache.reset(2)
        for row, text in ((0, 0), (1, 3), (2, 2), (3, 3)):
            n = int(cache.lengths[row])
            logits = read(model, texts[text : text + 1, n:], cache.rows(row, row + 1), [])
            assert_nearly(logits[0], expected[text, n:], model(texts[text : text + 1])[0, n:])


def test_a_snapshot_in_8_bits_continues_and_fits_no_other_kind(tmp_path):
    model, text = tiny_model(), random_ids(1, LENGTH)
    plain, small = model.new_cache(), model.new_cache(2, kind="int8")
    model(text[:, : LENGTH - 4], cache=small.rows(1, 2))
    small.snapshot(1).save(tmp_path / "row.safetensors")
    saved, _ = RowSnapshot.load(tmp_path / "row.safetensors")
    assert {x.dtype for name, x in saved.tensors.items() if name[1] == "."} == {torch.int8}
    assert {name.partition(".")[0] for name in saved.tensors} == {"k", "v", "k_scale", "v_scale", "conv", "ssm"}
    small.restore(0, saved)
    one, other = (read(model, text[:, LENGTH - 4 :], small.rows(row, row + 1), []) for row in (0, 1))
    assert torch.equal(one, other)
    with pytest.raises(UserError, match="kind of cache"):
        plain.restore(0, saved)
    with pytest.raises(UserError, match="kind of cache"):
        small.restore(0, plain.snapshot(0))


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="'int4'; int8"):
        tiny_model().new_cache(kind="int4")


def test_half_precision_keeps_the_ssm_state_in_float32():
    cache = tiny_model().bfloat16().new_cache()
    assert cache.ssm.dtype == torch.float32
    assert {x.dtype for x in (cache.conv, *cache.k.values(), *cache.v.values())} == {torch.bfloat16}


@given(st.integers(1, 9), st.integers(0, 30), st.integers(0, 4))
def test_a_ring_holds_the_newest_tokens(slots, length, n_meta):
    ring = [EMPTY] * slots
    for token in range(length):
        ring[token % slots] = token + n_meta
    assert stored_positions(torch.tensor([length]), slots, n_meta).tolist() == [ring]


# ---------------------------------------------------------------------------------------------------------------- rows


def filled(model: Hymba, lengths: list[int]) -> tuple[HymbaCache, list[torch.Tensor]]:
    """A cache whose rows have read texts of these lengths, and texts that go on after them."""
    cache, texts = model.new_cache(len(lengths)), []
    for row, length in enumerate(lengths):
        texts.append(random_ids(1, length + 4, seed=row))
        if length:
            model(texts[row][:, :length], cache=cache.rows(row, row + 1))
    return cache, texts


def assert_continues(model: Hymba, cache: HymbaCache, row: int, text: torch.Tensor) -> None:
    """The row goes on with the rest of the text, token by token, as one long forward pass does."""
    read_already = int(cache.lengths[row])
    logits = read(model, text[:, read_already:], cache.rows(row, row + 1), [])
    assert_close(logits, model(text)[:, read_already:])


LENGTHS = [5, 0, LENGTH, WINDOW + 1]


def test_rows_share_the_storage():
    cache = tiny_model().new_cache(4)
    view = cache.rows(1, 3)
    assert view.batch_size == 2
    for ours, theirs in [(view.lengths, cache.lengths[1:3]), (view.conv, cache.conv[:, 1:3]),
                         (view.ssm, cache.ssm[:, 1:3]), *((view.k[i], cache.k[i][1:3]) for i in cache.k),
                         *((view.v[i], cache.v[i][1:3]) for i in cache.v)]:  # fmt: skip
        assert ours.data_ptr() == theirs.data_ptr()
        assert ours.shape == theirs.shape


def test_rows_are_independent():
    model = tiny_model()
    cache, texts = filled(model, LENGTHS)
    for row, text in enumerate(texts):
        assert_continues(model, cache, row, text)


@pytest.mark.parametrize("row", range(len(LENGTHS)))
def test_a_reset_row_is_as_new(row):
    model = tiny_model()
    cache, _ = filled(model, LENGTHS)
    cache.reset(row)
    assert cache.lengths[row] == 0
    assert_continues(model, cache, row, random_ids(1, LENGTH, seed=9))


@given(st.sampled_from(range(4)), st.sampled_from(range(4)))
@example(2, 2)
def test_a_copied_row_is_a_fork(source, target):
    model = tiny_model()
    cache, texts = filled(model, LENGTHS)
    cache.copy(source, target)
    assert_continues(model, cache, target, texts[source])
    if source != target:
        assert_continues(model, cache, source, texts[source])
    for row in set(range(4)) - {source, target}:
        assert_continues(model, cache, row, texts[row])


@each_variant
def test_a_snapshot_continues_anywhere(changes, tmp_path):
    """In another row, in a longer and in a shorter cache, from memory and from disk, any number of times."""
    model = tiny_model(**changes)
    text = random_ids(1, LENGTH, seed=1)
    small, large = model.new_cache(1, max_length=LENGTH), model.new_cache(3, max_length=TINY.max_length)
    model(text[:, : LENGTH - 4], cache=small)
    snapshot = small.snapshot(0)
    snapshot.save(tmp_path / "row.safetensors", {"prompt": "Emma"})
    assert_continues(model, small, 0, text)  # what happens to the row later does not reach the snapshot

    loaded, metadata = RowSnapshot.load(tmp_path / "row.safetensors")
    assert metadata == {"prompt": "Emma"}
    assert loaded.length == LENGTH - 4
    for row, saved in ((0, snapshot), (2, loaded), (2, snapshot)):
        large.restore(row, saved)
        assert_continues(model, large, row, text)
    large.reset(1)
    model(text[:, : LENGTH - 4], cache=large.rows(1, 2))
    small.restore(0, large.snapshot(1))
    assert_continues(model, small, 0, text)


def test_a_snapshot_is_no_larger_than_what_was_read():
    cache, _ = filled(tiny_model(), [WINDOW // 2])
    assert {x.shape[1] for name, x in cache.snapshot(0).tensors.items() if name[0] in "kv"} == {WINDOW // 2}


def test_a_snapshot_of_another_model_is_refused():
    mine = tiny_model(n_meta=0)
    cache, _ = filled(mine, [5])
    snapshot = cache.snapshot(0)
    others = [tiny_model(n_meta=0, rope_theta=9.0), tiny_model(n_meta=0).bfloat16(), tiny_model(n_meta=0)]
    others[2].blocks[3].mlp.up_proj.weight.mul_(1.01)  # the same config, no meta tokens, the same norms
    for other in others:
        with pytest.raises(UserError, match="another model"):
            other.new_cache().restore(0, snapshot)
    tiny_model(n_meta=0).new_cache().restore(0, snapshot)


def test_a_snapshot_that_is_too_long_is_refused_and_nothing_changes():
    model = tiny_model()
    long, _ = filled(model, [LENGTH])
    cache = model.new_cache(1, max_length=LENGTH - 1)
    with pytest.raises(UserError, match=f"{LENGTH} tokens, the cache at most {LENGTH - 1}"):
        cache.restore(0, long.snapshot(0))
    assert_continues(model, cache, 0, random_ids(1, LENGTH - 1))


@pytest.mark.parametrize("header", [
    None, "", "[]", "{}", '{"length": "5", "model": "x"}', '{"length": -1, "model": "x"}',
    '{"length": 5.5, "model": "x"}', '{"length": 5, "model": 7}',
])  # fmt: skip
def test_a_file_that_holds_no_row_is_refused(tmp_path, header):
    path = tmp_path / "row.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={} if header is None else {"hymba_row": header})
    with pytest.raises(UserError, match="no saved row"):
        RowSnapshot.load(path)


def test_a_missing_or_damaged_file_is_refused(tmp_path):
    model = tiny_model()
    cache, _ = filled(model, [5])
    path = tmp_path / "row.safetensors"
    with pytest.raises(UserError, match="no such file"):
        RowSnapshot.load(path)
    cache.snapshot(0).save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="no saved row"):
        RowSnapshot.load(path)
    # a header that is right and tensors that are not
    header = json.dumps({"length": 5, "model": cache.fingerprint})
    save_file({"conv": torch.zeros(1)}, path, metadata={"hymba_row": header})
    with pytest.raises(UserError, match="does not fit"):
        cache.restore(0, RowSnapshot.load(path)[0])


# -------------------------------------------------------------------------------------------------------------- limits


def test_a_full_cache_says_so_and_keeps_its_rows():
    model = tiny_model()
    cache, text = model.new_cache(1, max_length=LENGTH), random_ids(1, LENGTH)
    model(text[:, : LENGTH - 2], cache=cache)
    with pytest.raises(UserError, match=f"{LENGTH + 1} tokens do not fit a cache of max_length={LENGTH}"):
        model(random_ids(1, 3), cache=cache)
    assert_continues(model, cache, 0, text)


@pytest.mark.parametrize("size", [(0, 8), (-1, 8), (1, 0), (1, TINY.max_length + 1)])
def test_sizes_that_no_cache_can_have(size):
    with pytest.raises(UserError, match=f"max_length from 1 to {TINY.max_length}"):
        tiny_model().new_cache(*size)


def test_dynamic_ntk_is_refused_where_a_cache_would_be_inexact():
    """From `rope_original_length` on every new token turns all keys, so no key can be kept."""
    model = tiny_model(rope="dynamic_ntk", rope_original_length=32)
    with pytest.raises(UserError, match="max_length=29 only"):
        model.new_cache(1, max_length=30)
    ids = random_ids(1, 29)
    assert_close(read(model, ids, model.new_cache(1, max_length=29), [4]), model(ids))
