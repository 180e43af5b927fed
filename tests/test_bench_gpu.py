"""`hymba bench gpu`, as far as it goes without a GPU: what it compares, what it keeps, that all it measures works."""

import math
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from hymba import HymbaConfig, ops
from hymba.bench.gpu import check, kernels, measure, models, operators, suite
from hymba.ops import reference


def test_bench_gpu_compares_the_best_of_each():
    def row(batch, speed, cache, kv):
        return {"batch": batch, "tokens/s": speed, "cache MB a row": cache, "KV MB a row": kv}

    ours = [row(1, 10.0, 4.0, 2.0), row(128, 30.0, 4.0, 2.0)]
    llama = {"decode": [row(64, 6.0, 40.0, 40.0), row(1, 2.0, 40.0, 40.0)], "prefill": {"tokens/s": 7.0}}
    mamba = {"decode": [row(128, 60.0, 2.0, 0.0)], "prefill": None}
    report = {
        "decode": ours, "prefill": [{"batch": 8, "tokens/s": 50.0}, {"batch": 1, "tokens/s": 14.0}],
        "peers": {"Llama": llama, "Mamba": mamba, "too large": {"decode": [{"batch": 0}], "prefill": None}},
    }  # fmt: skip
    assert suite.compared(report) == {
        "Llama": {
            "throughput": 5.0, "cache": 10.0, "keys and values": 20.0, "throughput at batch 1": 5.0, "prefill": 2.0
        },
        "Mamba": {"throughput": 0.5, "cache": 0.5},
    }  # fmt: skip
    assert suite.compared(report | {"decode": "OutOfMemoryError: "}) == {}


def _three_and(end: str):
    yield from range(3)
    if end == "fails":
        raise ValueError("no fourth")
    if end == "waits":
        time.sleep(600)


@pytest.mark.parametrize(
    ("end", "seconds", "error"),
    [("", 300, None), ("fails", 300, "ValueError no fourth"), ("waits", 20, "longer than 20 s")],
)
def test_what_a_peer_gave_is_kept_however_it_ends(end, seconds, error):
    got = []
    with pytest.raises((RuntimeError, TimeoutError), match=error) if error else nullcontext():
        for x in measure.apart(seconds, _three_and, end):
            got.append(x)
    assert got == [0, 1, 2]


def test_bench_gpu_goes_on_after_a_section_that_failed(monkeypatch, capsys):
    """And each section gets the time that those before it left."""
    limit = {"copy": 1e12, "product": 1e12}
    ends = {}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(suite.measure, "limits", lambda: limit)
    monkeypatch.setattr(suite.check, "check", lambda: {"scan": 1e-7})
    monkeypatch.setattr(suite.kernels, "kernels", lambda limit, deadline: 1 / 0)
    monkeypatch.setattr(suite.models, "prefill", lambda limit, deadline: ends.setdefault("prefill", deadline) and [])
    monkeypatch.setattr(suite.peers, "peers", lambda batches, deadline: ends.setdefault("peers", deadline) and {})
    report = suite.run(["check", "kernels", "prefill", "peers"], [1], 100.0)
    assert report["check"] == {"scan": 1e-7} and report["limits"] == limit and report["prefill"] == []
    assert report["kernels"].startswith("ZeroDivisionError") and report["against"] == {}
    assert ends["peers"] - ends["prefill"] == pytest.approx(100 * (1 - suite.ENDS["prefill"]))
    assert "failed: ZeroDivisionError" in capsys.readouterr().out


@pytest.fixture
def bench_on_cpu(monkeypatch):
    """What `hymba bench gpu` measures, computed by the reference on tiny shapes, without clocks and graphs."""

    def timed(work, **options):
        work()
        return 1.0

    instead = {"GPU": torch.device("cpu"), "captured": lambda work: work, "timed": timed}
    for module in (check, kernels, measure, models, operators):
        for name in instead.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, instead[name])
    config = HymbaConfig.preset("tiny")
    for module in (kernels, models, operators):
        monkeypatch.setattr(module, "HymbaConfig", SimpleNamespace(preset=lambda name: config))
    for name in ("reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    with ops.use_backend("reference"):
        yield


def test_bench_gpu_measures_every_kernel(bench_on_cpu, monkeypatch, capsys):
    limit = dict.fromkeys(("copy", "product", "peak", "exponentials"), 1e12)
    monkeypatch.setattr(kernels, "SHAPES", ((torch.bfloat16, 2, 5), (torch.float32, 1, 3)))
    monkeypatch.setattr(kernels, "LENGTH", 5)
    table = kernels.kernels(limit, math.inf)
    assert "failed" not in capsys.readouterr().out
    assert {name.split(",")[0] for name in table} == {"scan", "conv", "mean of norms", "gated SiLU", "attention"}
    assert sum("both ways" in name for name in table) == 6
    monkeypatch.setattr(models, "TRAINED", {"1.5B": 2})
    assert models.train(limit, math.inf, length=4)["1.5B"]["batch"] == 2
    monkeypatch.setattr(operators, "LENGTH", 5)
    for make in (operators._scan, operators._conv, operators._attention):
        ours, _, leaves = make(None)
        torch.autograd.grad(ours(*leaves).sum(), leaves)
    for name, (function, inputs) in check.operations(T=65).items():
        assert len(check.with_gradients(lambda *x, run=function: run(reference, *x), inputs)) > len(inputs), name
