"""Bits per byte: every token is predicted once, whatever the windows."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hymba import Hymba, HymbaConfig, UserError
from hymba.evals import score_ids, windows
from hymba.model.hymba import IGNORED_LABEL


@given(n=st.integers(2, 200), length=st.integers(2, 40), data=st.data())
def test_windows_predict_every_token_once_with_context(n, length, data):
    stride = data.draw(st.integers(1, length))
    ids = torch.arange(n)
    inputs, targets = windows(ids, length, stride)
    counted = targets != IGNORED_LABEL
    assert sorted(targets[counted].tolist()) == list(range(1, n))
    assert torch.equal(inputs[counted] + 1, targets[counted])
    # all but the first row's tokens have at least this much in front of them
    assert not counted[1:, : length - stride].any()


def test_a_text_that_fits_one_row_costs_what_its_logits_say():
    torch.manual_seed(0)
    model = Hymba(HymbaConfig.preset("tiny")).eval()
    ids = torch.randint(1, 256, (60,))
    with torch.no_grad():
        expected = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="sum").item()
    score = score_ids(model, ids, 100, length=64)
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(expected / math.log(2) / 100, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(expected / 59), rel=1e-5)


def test_lengths_that_do_not_fit_are_refused():
    model = Hymba(HymbaConfig.preset("tiny"))
    with pytest.raises(UserError, match="at least two tokens"):
        score_ids(model, torch.tensor([1]), 1)
    with pytest.raises(UserError, match="context of 512"):
        score_ids(model, torch.tensor([1, 2, 3]), 1, length=513)
    with pytest.raises(UserError, match="stride"):
        score_ids(model, torch.tensor([1, 2, 3]), 1, length=8, stride=9)
