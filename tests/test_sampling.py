"""How a token is chosen: the filters keep exactly what they say, and draws follow the distribution that is left."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hymba import SamplingParams, UserError
from hymba.engine import sampler
from hymba.engine.sampler import choose, logprobs_of

INF = math.inf
NOTHING = ()  # tokens that were seen


def draw(logits, params=None, *, seen=NOTHING, seed=0, **fields) -> int:
    mask = torch.zeros(len(logits), dtype=torch.bool)
    mask[list(seen)] = True
    params = params or SamplingParams(**fields)
    return choose(torch.tensor(logits), params, mask, torch.Generator().manual_seed(seed))


def distribution(logits, params: SamplingParams, seen=NOTHING) -> list[float]:
    """What is left after the filters, in plain Python and in the order of the fields."""
    p = params.repetition_penalty
    logits = [(x / p if x > 0 else x * p) if i in seen else x for i, x in enumerate(logits)]
    weights = [math.exp((x - max(logits)) / params.temperature) for x in logits]

    def keep(floor: float) -> None:
        kept = [w if w >= floor else 0.0 for w in weights]
        weights[:] = [w / sum(kept) for w in kept]

    keep(0.0)
    if params.top_k:
        keep(sorted(weights, reverse=True)[: params.top_k][-1])
    reached = 0.0
    for w in sorted(weights, reverse=True):
        reached += w
        if reached >= params.top_p:
            keep(w)
            break
    keep(params.min_p * max(weights))
    return weights


def assert_follows(logits, params: SamplingParams, seen=NOTHING, every: int = 1) -> None:
    """`choose` is the inverse of the distribution function: every number of the unit interval gives the token whose
    interval it lies in. Numbers are put in, the middle and just within both ends of the interval of `every` n-th token.
    """
    mask = torch.zeros(len(logits), dtype=torch.bool)
    mask[list(seen)] = True
    begin = 0.0
    for token, weight in enumerate(distribution(logits, params, seen)):
        if weight < 1e-9 or token % every:  # the former is nearer to the border than the sums are exact
            begin += weight
            continue
        for share in (1e-3, 0.5, 1 - 1e-3):
            with pytest.MonkeyPatch.context() as patch:
                number = torch.tensor(begin + share * weight, dtype=torch.float64)
                patch.setattr(sampler.torch, "rand", lambda *_, number=number, **__: number)
                assert choose(torch.tensor(logits), params, mask, torch.Generator()) == token
        begin += weight


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) if p else -INF for p in probabilities]


KEPT = [
    ({}, [0.5, 0.25, 0.125, 0.125], {0, 1, 2, 3}),
    ({"top_k": 1}, [0.25, 0.5, 0.125, 0.125], {1}),
    ({"top_k": 2}, [0.25, 0.5, 0.125, 0.125], {0, 1}),
    ({"top_k": 3}, [0.125, 0.25, 0.5, 0.125], {0, 1, 2, 3}),  # a tie at the border
    ({"top_k": 9}, [0.5, 0.5], {0, 1}),
    ({"top_p": 0.4}, [0.25, 0.5, 0.125, 0.125], {1}),
    ({"top_p": 0.6}, [0.25, 0.5, 0.125, 0.125], {0, 1}),
    ({"top_p": 0.8}, [0.25, 0.5, 0.125, 0.125], {0, 1, 2, 3}),  # a tie at the border
    ({"top_p": 1e-9}, [0.1, 0.2, 0.4, 0.3], {2}),
    ({"min_p": 0.4}, [0.25, 0.5, 0.15, 0.1], {0, 1}),
    ({"min_p": 1.0}, [0.2, 0.4, 0.4], {1, 2}),
    ({"top_k": 2, "top_p": 0.7}, [0.4, 0.3, 0.2, 0.1], {0, 1}),  # shares of what top_k leaves: 4/7, 3/7
    ({"top_k": 2, "top_p": 0.55}, [0.4, 0.3, 0.2, 0.1], {0}),
    ({"top_p": 0.65, "min_p": 0.8}, [0.4, 0.3, 0.2, 0.1], {0}),
    ({"temperature": 1e-6}, [0.3, 0.31, 0.29, 0.1], {1}),
    ({"temperature": 1e-300}, [0.3, 0.31, 0.29, 0.1], {1}),
    ({"temperature": 1e-6}, [0.4, 0.4, 0.2], {0, 1}),
    ({"temperature": 1e6, "top_p": 0.9}, [0.97, 0.01, 0.01, 0.01], {0, 1, 2, 3}),
    ({"top_k": 3}, [0.5, 0.5, 0.0, 0.0], {0, 1}),  # what is excluded stays excluded
]


@pytest.mark.parametrize(("fields", "probabilities", "kept"), KEPT, ids=str)
def test_filters_keep_exactly(fields, probabilities, kept):
    params, logits = SamplingParams(**fields), logs(*probabilities)
    assert {i for i, w in enumerate(distribution(logits, params)) if w} == kept
    assert_follows(logits, params)


@given(
    st.lists(st.sampled_from([-INF, -2.0, -0.5, 0.0, 0.7, 1.5, 3.0]), min_size=1, max_size=9),
    st.sets(st.integers(0, 8)),
    st.fixed_dictionaries(
        {
            "repetition_penalty": st.sampled_from([0.7, 1.0, 1.3]),
            "temperature": st.sampled_from([0.1, 0.8, 1.0, 100.0]),
            "top_k": st.integers(0, 9),
            "top_p": st.sampled_from([1.0, 0.93, 0.61, 0.17]),
            "min_p": st.sampled_from([0.0, 0.031, 0.31]),
        }
    ),
)
def test_any_filters_together(logits, seen, fields):
    assume(max(logits) > -INF)
    assert_follows(logits, SamplingParams(**fields), {token for token in seen if token < len(logits)})


def test_a_large_vocabulary():
    """More candidates than top_p looks at first: flat, so that they do not suffice, and peaked, so that they do."""
    flat = torch.randn(4 * sampler.TOP_P_CANDIDATES, generator=torch.Generator().manual_seed(0))
    for logits in (flat, 5 * flat):
        for top_p in (0.3, 0.9, 0.99999):
            assert_follows(logits.tolist(), SamplingParams(top_p=top_p), every=17)


@pytest.mark.parametrize("fields", [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 2.0, "min_p": 0.1}], ids=str)
def test_draws_follow_the_distribution(fields):
    """Chi-square of 4000 draws, each from a seed of its own as requests have them. At most 9 degrees of freedom: a
    value above 33.7 comes once in 10,000 times, and the seeds are fixed."""
    logits, params, count = [0.1 * i * i % 2.3 for i in range(10)], SamplingParams(**fields), 4000
    found = [0] * len(logits)
    for seed in range(count):
        found[draw(logits, params, seed=seed)] += 1
    expected = [count * w for w in distribution(logits, params)]
    assert not any(n for n, e in zip(found, expected, strict=True) if e == 0)
    assert sum((n - e) ** 2 / e for n, e in zip(found, expected, strict=True) if e) < 33.7


# steps of 0.1, far above the temperature
@given(st.lists(st.integers(-500, 500).map(lambda i: i / 10), min_size=1, max_size=20), st.integers(0, 2**63 - 1))
def test_greedy_is_the_limit_of_small_temperatures(logits, seed):
    best = draw(logits, temperature=0)
    assert logits[best] == max(logits)
    assert logits[draw(logits, temperature=1e-9, seed=seed)] == max(logits)
    assert draw(logits, temperature=5e-324, top_k=1, seed=seed) in {i for i, x in enumerate(logits) if x == max(logits)}


def test_repetition_penalty_divides_or_multiplies():
    logits = [2.0, 1.5, -1.0, -1.2]
    assert draw(logits, temperature=0, repetition_penalty=1.5) == 0
    assert draw(logits, temperature=0, repetition_penalty=1.5, seen={0}) == 1  # 2 / 1.5 < 1.5
    assert draw(logits[2:], temperature=0, repetition_penalty=1.5, seen={0}) == 1  # -1 * 1.5 < -1.2
    assert draw(logits, temperature=0, repetition_penalty=0.5, seen={1}) == 1  # below 1 it invites


@pytest.mark.parametrize("broken", [math.nan, INF])
@pytest.mark.parametrize("fields", [{"temperature": 0}, {}, {"top_k": 1}, {"top_p": 0.5}], ids=str)
def test_logits_that_are_no_numbers_are_an_error(broken, fields):
    with pytest.raises(UserError, match="no finite logits"):
        draw([0.0, broken, 1.0], **fields)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_minus_infinity_excludes(temperature):
    assert draw([-INF, 0.3, -INF], temperature=temperature) == 1
    with pytest.raises(UserError, match="no finite logits"):
        draw([-INF, -INF], temperature=temperature)


def test_a_draw_of_nothing_is_no_excluded_token(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(0.0, dtype=torch.float64))
    assert draw([-INF, -INF, 0.3, 1.0]) == 2


def test_the_same_seed_is_the_same_draw():
    logits = [0.0] * 1000
    assert draw(logits, seed=7) == draw(logits, seed=7)
    assert len({draw(logits, seed=seed) for seed in range(20)}) > 15


@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12), st.integers(0, 15), st.data())
def test_logprobs_are_the_models_own(logits, count, data):
    token = data.draw(st.integers(0, len(logits) - 1))
    entry = logprobs_of(torch.tensor(logits), token, count)
    total = math.log(sum(math.exp(x) for x in logits))
    assert entry.token_id == token and entry.logprob == pytest.approx(logits[token] - total, abs=1e-4)
    assert len(entry.top) == min(count, len(logits))
    assert list(entry.top.values()) == pytest.approx(
        [x - total for x in sorted(logits, reverse=True)[:count]], abs=1e-4
    )


# ----------------------------------------------------------------------------------------------------------- parameters

OUT_OF_RANGE = {
    "max_tokens": [0, -1, 1.5, "8", True, None],
    "repetition_penalty": [0, -1.0, math.nan, INF, "1"],
    "temperature": [-0.1, math.nan, INF, None, "hot"],
    "top_k": [-1, 2.0, None],
    "top_p": [0, 1.01, math.nan, None],
    "min_p": [-0.1, 1.1, math.nan],
    "seed": [-1, 2**63, 1.0, "x"],
    "n": [0, -3, 1.0, None],
    "stop": [None, 5, "", ["x", ""], [3], {"x": 1}],
    "stop_token_ids": [None, 5, [-1], ["x"], "12", [1.0]],
    "ignore_eos": [None, 1, "yes"],
    "logprobs": [-1, 0.5, True],
}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in OUT_OF_RANGE.items() for v in values])
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(UserError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} must be ") and "\n" not in message


def test_every_field_has_a_rule():
    assert set(OUT_OF_RANGE) == set(SamplingParams.__dataclass_fields__)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0, "top_p": 1, "min_p": 1, "repetition_penalty": 2},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"logprobs": 0},
        {"stop": ["a", "b"], "stop_token_ids": {3}},
    ],
    ids=str,
)
def test_the_ends_of_the_ranges_are_allowed(fields):
    SamplingParams(**fields)


def test_one_stop_text_needs_no_list():
    assert SamplingParams(stop="end").stop == ("end",)
    assert hash(SamplingParams(stop=["end"])) == hash(SamplingParams(stop=("end",)))
