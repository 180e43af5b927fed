"""Whatever else the engine has to do, a request gets what it would get alone; and what it remembers changes nothing."""

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import zip_longest

import pytest
import torch
from conftest import TINY, random_ids, tiny_model
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hymba import LLM, SamplingParams, Tokenizer, UserError, ops
from hymba.engine.chat import Chat
from hymba.engine.engine import Engine
from hymba.engine.sampler import choose
from hymba.engine.sequence import Sequence
from hymba.model.cache import KINDS, HymbaCache, RowSnapshot

pytest_plugins = "tiny_llm"

CONTEXT = TINY.max_length
GREEDY = SamplingParams(max_tokens=6, temperature=0)


@cache
def model():
    model = tiny_model()
    with torch.no_grad():
        model.norm.weight.mul_(0.3)  # draws that differ, not always the same few tokens
    return model


@torch.no_grad()
@cache
def alone(prompt: tuple[int, ...], params: SamplingParams, index: int = 0) -> tuple[list[int], str]:
    """A completion by full forward passes, one for each token, without engine and cache -> ids, reason of the end"""
    ids, seen = list(prompt), torch.zeros(TINY.vocab_size, dtype=torch.bool)
    generator = torch.Generator().manual_seed((params.seed or 0) + index)
    while True:
        seen[ids] = True
        ids.append(choose(model()(torch.tensor([ids]))[0, -1], params, seen, generator))
        if ids[-1] in params.stop_token_ids:
            return ids[len(prompt) :], "stop"
        if len(ids) - len(prompt) == params.max_tokens or len(ids) > CONTEXT:
            return ids[len(prompt) :], "length"


def sequences(prompt: tuple[int, ...], params: SamplingParams, **options) -> list[Sequence]:
    return [Sequence(prompt, params, index=i, max_length=CONTEXT, **options) for i in range(params.n)]


def run(engine: Engine, *requests: Sequence) -> None:
    engine.add(requests)
    finish(engine)


def finish(engine: Engine, step=None) -> None:
    for _ in range(2000):  # far more than any of these tests needs
        if not engine.busy:
            return
        (step or engine.step)()
    raise AssertionError("the engine does not come to an end")


def assert_as_alone(*requests: Sequence) -> None:
    for s in requests:
        assert (s.token_ids, s.finish_reason) == alone(tuple(s.prompt_ids), s.params, s.index)


TEXTS = [tuple(random_ids(1, length, seed=length)[0].tolist()) for length in (1, 2, 7, 8, 9, 21, 40)]
# some begin as others do, so that what is remembered can be of use
PROMPTS = [*TEXTS, TEXTS[2] + TEXTS[0], TEXTS[2] + TEXTS[3], TEXTS[5] + TEXTS[4]]
PARAMS = [
    GREEDY,
    SamplingParams(max_tokens=1, temperature=0),
    SamplingParams(max_tokens=9, temperature=1.5, top_p=0.95, seed=5),
    SamplingParams(max_tokens=6, repetition_penalty=1.3, top_k=20, seed=6, n=3),
    SamplingParams(max_tokens=9, seed=7, stop_token_ids=tuple(range(0, TINY.vocab_size, 4)), n=2),  # ends at any time
]
requests = st.tuples(st.sampled_from(PROMPTS), st.sampled_from(PARAMS), st.booleans())


# --------------------------------------------------------------------------------------------------------- the schedule


@settings(max_examples=20)
@given(
    st.lists(requests | st.integers(1, 4) | st.floats(0, 1), min_size=1, max_size=14),
    st.integers(1, 5),
    st.integers(1, 50),
    st.integers(0, 3),
)
def test_any_schedule_gives_what_each_gets_alone(schedule, max_batch, prefill_chunk, snapshots):
    """Requests are added, some steps are made, one that was added is cancelled, in any order; then all is finished."""
    engine = Engine(model(), max_batch=max_batch, prefill_chunk=prefill_chunk, snapshots=snapshots)
    added, got = [], Counter()

    def step() -> None:
        for s in engine.step():
            got[s] += 1
        assert all(len(s.token_ids) == got[s] for s in added)  # `step` tells of every token
        assert len(engine._snapshots) <= snapshots

    for event in schedule:
        if isinstance(event, tuple):
            prompt, params, keep = event
            new = sequences(prompt, params, keep=keep)
            engine.add(new)
            added += new
        elif isinstance(event, int):
            for _ in range(event):
                step()
        elif added:
            engine.cancel(added[int(event * (len(added) - 1))])
    finish(engine, step)
    for s in added:
        if s.finish_reason == "cancelled":
            tokens, _ = alone(tuple(s.prompt_ids), s.params, s.index)
            assert s.token_ids == tokens[: len(s.token_ids)]
        else:
            assert_as_alone(s)


@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_a_queue_longer_than_the_batch(max_batch):
    engine = Engine(model(), max_batch=max_batch, prefill_chunk=6)
    added = [s for prompt in PROMPTS for params in PARAMS[:3] for s in sequences(prompt, params)]
    run(engine, *added)
    assert_as_alone(*added)


def test_completions_of_a_prompt_read_it_once(monkeypatch):
    copies = []
    monkeypatch.setattr(
        HymbaCache, "copy", lambda self, a, b, copy=HymbaCache.copy: copies.append(b) or copy(self, a, b)
    )
    engine = Engine(model(), max_batch=5)
    completions = sequences(PROMPTS[6], SamplingParams(max_tokens=4, seed=1, n=4))
    engine.add(completions)
    assert engine.step() == completions and copies[:3] == [1, 2, 3]
    assert [s.read for s in completions] == [len(PROMPTS[6]), 0, 0, 0]
    run(engine)
    assert_as_alone(*completions)
    assert len({tuple(s.token_ids) for s in completions}) > 1


@pytest.mark.parametrize("backend", ops.BACKENDS)
def test_in_8_bits_neither_neighbours_nor_what_is_remembered_change_anything(backend):
    """A crowd, pieces of six tokens and memory, against one request after the other, read at once."""
    with ops.use_backend(backend):
        one, many = (Engine(model(), max_batch=n, prefill_chunk=m, cache="int8") for n, m in ((1, 64), (3, 6)))
        requests, same = ([sequences(p, q, keep=k) for p in PROMPTS for q in PARAMS] for k in (False, True))
        for request in requests:
            run(one, *request)
        run(many, *(s for request in same for s in request))
    assert one.cache.kind == many.cache.kind == "int8"
    assert not one._snapshots and many._snapshots
    results = [[(s.token_ids, s.finish_reason) for request in group for s in request] for group in (requests, same)]
    assert results[0] == results[1]


def test_seeds_of_completions_follow_each_other():
    params = SamplingParams(max_tokens=5, seed=10, n=3)
    completions = sequences(PROMPTS[3], params)
    run(Engine(model()), *completions)
    singles = [sequences(PROMPTS[3], SamplingParams(max_tokens=5, seed=10 + i))[0] for i in range(3)]
    run(Engine(model()), *singles)
    assert [s.token_ids for s in completions] == [s.token_ids for s in singles]


def test_without_a_seed_every_draw_is_another():
    texts = [sequences(PROMPTS[3], SamplingParams(max_tokens=8))[0] for _ in range(4)]
    run(Engine(model()), *texts)
    assert len({tuple(s.token_ids) for s in texts}) > 1


# ---------------------------------------------------------------------------------------------------- broken off, ended


def test_a_cancelled_prompt_is_not_read_to_its_end():
    engine = Engine(model(), max_batch=2, prefill_chunk=4)
    [long], [short] = sequences(PROMPTS[6], GREEDY, keep=True), sequences(PROMPTS[1], GREEDY)
    engine.add([long])
    for _ in range(3):
        engine.step()
    engine.cancel(long)
    run(engine, short)
    assert long.read == 12 and long.finish_reason == "cancelled" and not long.token_ids
    assert list(engine._snapshots) == [PROMPTS[6][:12]]  # what was read is known
    assert_as_alone(short)
    [again] = sequences(PROMPTS[6], GREEDY)
    run(engine, again)
    assert_as_alone(again)


def test_a_fork_survives_the_one_who_reads_for_it():
    engine = Engine(model(), max_batch=4, prefill_chunk=4)
    completions = sequences(PROMPTS[6], SamplingParams(max_tokens=4, seed=1, n=3))
    engine.add(completions)
    engine.step()
    engine.cancel(completions[0])
    engine.cancel(completions[2])
    run(engine)
    assert_as_alone(completions[1])
    assert [len(s.token_ids) for s in completions] == [0, 4, 0]


def test_completions_fork_from_their_own_prompt_only():
    engine = Engine(model(), max_batch=6)
    params = SamplingParams(max_tokens=4, seed=1, n=2)
    first, second = sequences(PROMPTS[3], params), sequences(PROMPTS[4], params)
    engine.add([*first, *second])
    engine.cancel(second[0])  # it waits still, and would have read for the other one
    run(engine)
    assert_as_alone(*first, second[1])


@pytest.mark.parametrize("moment", ["a layer that reads", "a token that is chosen"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, UserError])
def test_a_step_that_is_broken_off_leaves_nothing_half_done(moment, kind, monkeypatch):
    engine = Engine(model(), max_batch=3, prefill_chunk=5)
    running, reading = (
        sequences(PROMPTS[3], SamplingParams(max_tokens=30, seed=3), keep=True),
        sequences(PROMPTS[6], GREEDY),
    )
    waiting = sequences(PROMPTS[4], GREEDY)
    engine.add(running)
    engine.step(), engine.step()
    engine.add(reading)
    engine.step()
    known = dict(engine._snapshots)

    def fail(*_):
        raise kind("stop")

    with pytest.MonkeyPatch.context() as patch:
        if moment == "a layer that reads":
            patch.setattr(model().blocks[2], "forward", fail)
        else:
            patch.setattr(Sequence, "append", fail)
        with pytest.raises(kind):
            engine.step()
    assert [s.finish_reason for s in (*running, *reading)] == ["cancelled"] * 2
    assert not engine.busy and engine._snapshots == known  # nobody knows what the rows hold
    later = sequences(PROMPTS[3], SamplingParams(max_tokens=9, seed=3))
    run(engine, *waiting, *later)
    assert_as_alone(*waiting, *later)


def test_logits_that_are_no_numbers_end_the_step():
    broken = tiny_model()
    engine = Engine(broken)
    with torch.no_grad():
        broken.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="no finite logits"):
        run(Engine(broken), *sequences(PROMPTS[3], GREEDY))
    assert not engine.busy


@pytest.mark.parametrize("length", [1, CONTEXT - 3, CONTEXT - 1, CONTEXT])
def test_the_context_ends_a_sequence(length):
    prompt = tuple(random_ids(1, length)[0].tolist())
    [s] = sequences(prompt, SamplingParams(max_tokens=1000, temperature=0))
    run(Engine(model()), s)
    assert s.finish_reason == "length" and len(s.token_ids) == CONTEXT - length + 1  # the last is not read
    assert_as_alone(s)


@pytest.mark.parametrize("max_length", [1, 5, 13])
def test_a_shorter_context_changes_only_the_end(max_length):
    prompt = PROMPTS[0]
    s = Sequence(prompt, SamplingParams(max_tokens=99, temperature=0), max_length=max_length)
    run(Engine(model(), max_length=max_length), s)
    tokens, _ = alone(prompt, SamplingParams(max_tokens=13, temperature=0))
    assert s.token_ids == tokens[:max_length] and s.finish_reason == "length"


def test_end_tokens():
    tokens, _ = alone(PROMPTS[3], SamplingParams(max_tokens=6, temperature=0))
    end = tokens[2]
    first = tokens.index(end) + 1
    by_eos, by_id = {"eos_token_id": end}, SamplingParams(max_tokens=6, temperature=0, stop_token_ids=[1, end])
    ignoring = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    cases = [
        *sequences(PROMPTS[3], GREEDY, **by_eos),
        *sequences(PROMPTS[3], by_id),
        *sequences(PROMPTS[3], ignoring, **by_eos),
    ]
    run(Engine(model()), *cases)
    assert [s.token_ids for s in cases] == [tokens[:first], tokens[:first], tokens]
    assert [s.finish_reason for s in cases] == ["stop", "stop", "length"]


@torch.no_grad()
def test_logprobs_are_those_of_a_full_forward():
    params = SamplingParams(max_tokens=5, temperature=0.7, repetition_penalty=1.4, top_k=3, seed=2, logprobs=4)
    [s] = sequences(PROMPTS[4], params)
    run(Engine(model(), prefill_chunk=3), s, *sequences(PROMPTS[5], GREEDY))
    logits = model()(torch.tensor([s.prompt_ids + s.token_ids]))[0, len(s.prompt_ids) - 1 : -1]
    expected = logits.log_softmax(-1)
    best = expected.topk(4)
    assert sum(e.logprob for e in s.logprobs) == pytest.approx(
        float(expected.gather(1, torch.tensor(s.token_ids)[:, None]).sum()), abs=1e-4
    )
    for entry, token, ids, values in zip(
        s.logprobs, s.token_ids, best.indices.tolist(), best.values.tolist(), strict=True
    ):
        assert entry.token_id == token and list(entry.top) == ids
        assert list(entry.top.values()) == pytest.approx(values, abs=1e-4)


# --------------------------------------------------------------------------------------------------- what is remembered


@pytest.fixture
def restored(monkeypatch) -> list[int]:
    """How many tokens each prompt that was continued did not have to read again."""
    lengths: list[int] = []
    restore = HymbaCache.restore

    def spy(cache, row, snapshot) -> None:
        restore(cache, row, snapshot)
        lengths.append(snapshot.length)

    monkeypatch.setattr(HymbaCache, "restore", spy)
    return lengths


@pytest.mark.parametrize("tail", [1, 5, 30])
def test_a_continued_sequence_equals_one_read_from_the_beginning(tail, restored):
    engine = Engine(model(), prefill_chunk=7)
    [first] = sequences(PROMPTS[4], SamplingParams(max_tokens=12, seed=1), keep=True)
    run(engine, first)
    read = (*first.prompt_ids, *first.token_ids[:-1])  # the last one nobody had to read
    [second] = sequences(read + tuple(random_ids(1, tail)[0].tolist()), SamplingParams(max_tokens=9, seed=2))
    run(engine, second)
    assert restored == [len(read)]
    assert_as_alone(first, second)


def test_the_longest_that_fits_is_continued(restored):
    engine = Engine(model())
    for length in (5, 9, 20):
        run(engine, *sequences(PROMPTS[5][:length], SamplingParams(max_tokens=1), keep=True))
    for length in (20, 12, 9, 5):  # at least one token is left to be read
        run(engine, *sequences(PROMPTS[5][:length], GREEDY))
    assert restored == [5, 9, 9, 9, 5]
    run(engine, *sequences(PROMPTS[4], GREEDY))
    assert len(restored) == 5


def test_what_was_used_longest_ago_is_forgotten():
    engine = Engine(model(), snapshots=2)
    a, b, c = PROMPTS[2], PROMPTS[3], PROMPTS[4]
    one = SamplingParams(max_tokens=1)
    run(engine, *sequences(a, one, keep=True))
    run(engine, *sequences(b, one, keep=True))
    run(engine, *sequences(a + b, one))  # uses a
    run(engine, *sequences(c, one, keep=True))
    assert set(engine._snapshots) == {a, c}


def test_nothing_is_remembered_unasked():
    engine = Engine(model())
    run(engine, *sequences(PROMPTS[4], GREEDY))
    assert not engine._snapshots
    engine = Engine(model(), snapshots=0)
    run(engine, *sequences(PROMPTS[4], GREEDY, keep=True))
    assert not engine._snapshots


@pytest.mark.parametrize(
    "settings", [{"max_batch": 0}, {"prefill_chunk": 0}, {"max_length": 0}, {"max_length": CONTEXT + 1}], ids=str
)
def test_settings_of_the_engine_are_checked(settings):
    with pytest.raises(UserError, match=next(iter(settings)).replace("max_batch", "batch")):
        Engine(model(), **settings)


# ----------------------------------------------------------------------------------------------------------------- text


@cache
def letters() -> Tokenizer:
    return Tokenizer.train(["abab aabb baba bbaa"] * 20, 300)


def spelled(text: str) -> list[int]:
    return letters().encode(text, add_special_tokens=False)


# what texts are made of: tokens of one letter and of several, characters of several tokens, and parts of these
PARTS = [
    *map(spelled, ["a", "b", "ab", "ba", "abab", " ", "é", "😀"]),
    spelled("é")[:1],
    spelled("😀")[:2],
    spelled("😀")[3:],
]


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=8),
    st.lists(st.text("ab 😀é", min_size=1, max_size=4), max_size=3),
)
@example([spelled("ab")], ["b", "a"])  # two at once: the first in the text counts
@example([spelled("abab"), spelled("b")], ["abb", "babb"])
@example([spelled("a"), spelled("a"), spelled("b")], ["aab"])
def test_text_ends_before_the_first_stop_text(parts, stops):
    """Tokens are forced: the text is what they say until a stop text is whole, it never has a stop text in it, and
    every state of it on the way is a beginning of the end."""
    ids = [id for part in parts for id in part]
    params = SamplingParams(max_tokens=len(ids), temperature=0, stop=stops)
    s = Sequence([1], params, max_length=99, detokenizer=letters().detokenizer())
    states, detokenizer, certain = [], letters().detokenizer(), ""
    expected, count = None, len(ids)
    for i, id in enumerate(ids):
        if not s.finished:
            s.append(torch.nn.functional.one_hot(torch.tensor(id), letters().vocab_size).float())
            states.append(s.text)
        certain += detokenizer.feed(id)
        ends = [certain.find(stop) for stop in stops if stop in certain]
        if expected is None and ends:
            expected, count = certain[: min(ends)], i + 1
    assert s.text == (letters().decode(ids) if expected is None else expected)
    assert s.finish_reason == ("length" if expected is None else "stop") and s.token_ids == ids[:count]
    assert all(s.text.startswith(state) for state in states)
    assert not any(stop in state for stop in stops for state in states)
    if not stops:  # nothing but a part of a character is held back
        assert all(s.text.startswith(letters().decode(ids[: i + 1]).rstrip("�")) for i in range(len(ids)))
        assert all(len(letters().decode(ids[: i + 1])) - len(state) <= 3 for i, state in enumerate(states))


def test_a_token_that_ends_is_no_text():
    [a] = spelled("a")
    s = Sequence(
        [1], SamplingParams(temperature=0, stop_token_ids=[a]), max_length=99, detokenizer=letters().detokenizer()
    )
    s.append(torch.nn.functional.one_hot(torch.tensor(a), letters().vocab_size).float())
    assert (s.text, s.token_ids, s.finish_reason) == ("", [a], "stop")


# ------------------------------------------------------------------------------------------------------------------ LLM

WORDS = ["It is a truth", "Anne", "universally acknowledged, that a single man", "a"]
SEEDED = SamplingParams(max_tokens=12, seed=3, temperature=1.2, n=2)


def test_results_are_in_the_order_of_the_prompts(llm):
    ids = llm.tokenizer.encode(WORDS[1])
    outputs = llm.generate([WORDS[0], ids, *WORDS[2:]], SEEDED)
    assert [o.prompt for o in outputs] == [WORDS[0], None, *WORDS[2:]]
    assert [o.prompt_ids for o in outputs] == [llm.tokenizer.encode(word) for word in WORDS]
    for output, word in zip(outputs, WORDS, strict=True):
        [single] = llm.generate(word, SEEDED)
        assert output.completions == single.completions and len(single.completions) == 2
        first = single.completions[0]
        assert (single.text, single.token_ids, single.finish_reason) == (
            first.text,
            first.token_ids,
            first.finish_reason,
        )
        assert first.text == llm.tokenizer.detokenizer(output.prompt_ids).feed(first.token_ids[0])[:0] + first.text


def test_prompts_of_ids_in_any_form(llm):
    ids = llm.tokenizer.encode(WORDS[0])
    tensor = torch.tensor(ids)
    expected = llm.generate([ids], GREEDY)[0].token_ids
    for prompts in (ids, [tensor], [tensor.numpy()], (tuple(ids),)):
        [output] = llm.generate(prompts, GREEDY)
        assert output.token_ids == expected and output.prompt_ids == ids
    assert llm.generate([]) == [] and llm.generate(iter(WORDS[:1]), GREEDY)[0].prompt == WORDS[0]


BAD = {
    "empty": "",
    "no ids": [],
    "too long": [5] * 600,
    "outside the vocabulary": [3, 400],
    "(0 to 399)": [-1],
    "text or a list": 5.0,
    "a text or": [1.5],
    "token ids": None,
    "surrogate": "\ud800",
}


@pytest.mark.parametrize("words", BAD)
def test_one_bad_prompt_queues_nothing(words, llm):
    bad = BAD[words]
    with pytest.raises(UserError) as caught:
        llm.generate([WORDS[0], bad], GREEDY)
    assert str(caught.value).startswith("prompt 2: ") and "\n" not in str(caught.value)
    assert words in str(caught.value) or words in ("no ids", "too long")
    assert not llm.engine.busy
    with pytest.raises(UserError):
        list(llm.stream([bad], GREEDY))
    with pytest.raises(UserError):
        llm.generate(bad if bad != [] else [[]], GREEDY)


def test_a_prompt_that_fills_the_context(llm):
    [output] = llm.generate([[5] * 512], GREEDY)
    assert len(output.token_ids) == 1 and output.finish_reason == "length"
    with pytest.raises(UserError, match="513 tokens, the context 512"):
        llm.generate([[5] * 513])


def test_streamed_pieces_are_the_whole(llm):
    expected = llm.generate(WORDS, SEEDED)
    texts, ids, ends = Counter(), {}, {}
    for chunk in llm.stream(WORDS, SEEDED):
        place = chunk.prompt_index, chunk.completion_index
        assert place not in ends
        assert chunk.text or chunk.finish_reason
        texts[place] = (texts[place] or "") + chunk.text
        ids[place] = ids.get(place, []) + chunk.token_ids
        if chunk.finish_reason:
            ends[place] = chunk.finish_reason
    for i, output in enumerate(expected):
        for j, c in enumerate(output.completions):
            assert (texts[i, j], ids[i, j], ends[i, j]) == (c.text, c.token_ids, c.finish_reason)


def test_streams_may_be_read_by_turns(llm):
    expected = [output.text for output in llm.generate(WORDS, GREEDY)]
    streams = [llm.stream(word, GREEDY) for word in WORDS]
    texts = [""] * len(WORDS)
    for chunks in zip_longest(*streams):
        for i, chunk in enumerate(chunks):
            texts[i] += chunk.text if chunk else ""
    assert texts == expected


def test_a_stream_that_is_left_stops_the_work(llm):
    stream = llm.stream(WORDS, SEEDED)
    next(stream)
    assert llm.engine.busy
    stream.close()
    assert not llm.engine.busy


def test_an_interrupted_call_leaves_nothing_behind(llm, monkeypatch):
    with monkeypatch.context() as patch:
        steps = iter(range(3))
        step = llm.engine.step
        patch.setattr(
            llm.engine, "step", lambda: step() if next(steps) < 2 else (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            llm.generate([*WORDS, *WORDS], GREEDY)
    assert not llm.engine.busy


def test_the_end_token_of_the_config_ends(llm, monkeypatch):
    [output] = llm.generate([WORDS[0]], GREEDY)
    end = output.token_ids[1]
    monkeypatch.setattr(llm.model, "config", replace(llm.config, eos_token_id=end))
    [output] = llm.generate([WORDS[0]], GREEDY)
    assert output.finish_reason == "stop" and output.token_ids[-1] == end and len(output.token_ids) <= 2


def test_a_tokenizer_of_another_model_is_refused(checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    Tokenizer.train(["abc " * 9, (checkpoint / "tokenizer.json").read_text()], 600).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="do not belong together"):
        LLM(tmp_path)


# ----------------------------------------------------------------------------------------------------------------- chat

CHAT = SamplingParams(max_tokens=20, seed=4, temperature=0.8)
TALK = ["Who is Anne?", "And Frederick?", "Thank you."]


def say(chat: Chat, text: str) -> str:
    return "".join(chat.send(text))


@pytest.fixture
def talkative(monkeypatch):
    """The model says given texts, whatever it computes: what random weights say is not even UTF-8."""

    def talk(llm: LLM, *texts: str) -> None:
        end = "\n" + llm.tokenizer.turn_end()
        ids = [id for text in texts for id in llm.tokenizer.encode(text + end, add_special_tokens=False)]
        script = iter(ids)
        monkeypatch.setattr("hymba.engine.sequence.choose", lambda *_: next(script))

    return talk


def test_a_reply_is_that_to_the_whole_conversation(llm, checkpoint):
    chat, other = Chat(llm, CHAT, system="Be brief."), LLM(checkpoint)
    for text in TALK:
        before = [*chat.messages, {"role": "user", "content": text}]
        reply = say(chat, text)
        prompt = other.tokenizer.apply_chat_template(before)
        ids = other.tokenizer.encode(prompt, add_special_tokens=False)
        assert ids.count(other.tokenizer.bos_token_id) == 1
        [output] = other.generate([ids], chat.params)
        assert reply == output.text
        assert chat.messages == [*before, {"role": "assistant", "content": reply.rstrip()}]
        assert chat.finish_reason == output.finish_reason


def test_a_turn_reads_only_what_is_new(llm, restored, talkative):
    chat, replies = Chat(llm, CHAT), ["A Miss Elliot.", "A captain.", "You are welcome."]
    mark = llm.tokenizer.encode(llm.tokenizer.turn_end(), add_special_tokens=False)
    talkative(llm, *replies)
    for text, reply in zip(TALK, replies, strict=True):
        known = llm.tokenizer.apply_chat_template(chat.messages, add_generation_prompt=False)
        known = llm.tokenizer.encode(known, add_special_tokens=False)
        assert say(chat, text).strip() == reply and chat.finish_reason == "stop"
        assert chat.messages[-1]["content"] == reply
        if chat.messages[2:]:  # all that was said, and most of the mark that ended it
            assert len(known) <= restored[-1] < len(known) + len(mark)
    assert len(restored) == len(TALK) - 1


@pytest.mark.parametrize("cache", KINDS)
def test_a_saved_conversation_goes_on(cache, checkpoint, tmp_path, restored, talkative):
    llm = LLM(checkpoint, cache=cache)
    chat, file = Chat(llm, CHAT, system="Be brief."), tmp_path / "talk"
    with pytest.raises(UserError, match="nothing was said"):
        chat.save(file)
    talkative(llm, "A Miss Elliot.")
    say(chat, TALK[0])
    chat.save(file)
    prompt = llm.tokenizer.apply_chat_template(chat.messages, add_generation_prompt=False)
    length = len(llm.tokenizer.encode(prompt, add_special_tokens=False))
    other = Chat(LLM(checkpoint, cache=cache), CHAT)
    other.load(file)
    assert other.messages == chat.messages
    talkative(llm, "A captain.", "A captain.")
    assert say(other, TALK[1]) == say(chat, TALK[1])
    assert restored[0] == restored[1] >= length  # in the other one, too, only what is new is read
    other.reset()
    assert other.messages == []


def test_a_conversation_of_another_model_is_refused(llm, checkpoint, tmp_path):
    chat, file = Chat(llm, CHAT), tmp_path / "talk"
    say(chat, TALK[0])
    chat.save(file)
    with pytest.raises(UserError, match="another model"):
        Chat(LLM(checkpoint, dtype="bfloat16"), CHAT).load(file)
    with pytest.raises(UserError, match="kind of cache"):
        Chat(LLM(checkpoint, cache="int8"), CHAT).load(file)
    for content in (b"", b"{}", json.dumps({"x": 1}).encode(), file.read_bytes()[:200]):
        (tmp_path / "broken").write_bytes(content)
        with pytest.raises(UserError, match="broken"):
            chat.load(tmp_path / "broken")
    with pytest.raises(UserError, match="no such file"):
        chat.load(tmp_path / "missing")


def test_a_memory_that_does_not_fit_is_read_anew(llm, checkpoint, tmp_path):
    """A shorter context, or a file that lies: the reply is the same, because the prompt is read again."""
    chat, file = Chat(llm, CHAT), tmp_path / "talk"
    say(chat, TALK[0])
    chat.save(file)
    row, metadata = RowSnapshot.load(file)
    lie = {name: x[..., :1] for name, x in row.tensors.items()}
    RowSnapshot(lie, row.length, row.model).save(file, metadata)
    other = Chat(LLM(checkpoint), CHAT)
    other.load(file)
    assert say(other, TALK[1]) == say(chat, TALK[1])


def test_a_stopped_reply_is_kept(llm, checkpoint):
    chat = Chat(llm, CHAT)
    reply = chat.send(TALK[0])
    said = next(reply) + next(reply)
    reply.close()
    assert chat.messages[-1]["role"] == "assistant" and chat.messages[-1]["content"].startswith(said.rstrip())
    assert chat.finish_reason == "cancelled" and not llm.engine.busy
    fresh = Chat(LLM(checkpoint), CHAT)
    fresh.messages = list(chat.messages)
    assert say(chat, TALK[1]) == say(fresh, TALK[1])


def test_a_message_that_cannot_be_sent_changes_nothing(llm):
    chat = Chat(llm, CHAT)
    say(chat, TALK[0])
    before = list(chat.messages)
    for text in ("", "  \n", "long " * 600, "\ud800"):
        with pytest.raises(UserError):
            say(chat, text)
        assert chat.messages == before and not llm.engine.busy


def test_a_checkpoint_without_template_cannot_chat(llm, monkeypatch):
    monkeypatch.setattr(llm.tokenizer, "_template", None)
    with pytest.raises(UserError, match="hymba generate"):
        Chat(llm)
