"""The results file, what is computed from it, and the report."""

import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hymba.errors import UserError
from hymba.study import findings, report, results
from hymba.study.arms import ARMS
from hymba.study.paper import TABLE_1
from hymba.study.results import Results, Run

STUDY = {
    "kind": "study", "fingerprint": "x", "first_seed": 0, "tokens": 2_000_000, "length": 256, "parameters": 1_000_000,
    "shares": {"mqar": 0.2, "needle": 0.1},
}  # fmt: skip


def run_record(arm: str, lr: float, seed: int, bits: float, accuracy: float) -> dict:
    cell = lambda size, **depth: {"size": size, **depth, "accuracy": accuracy, "answers": 64, "chance": 1 / size}  # noqa: E731
    tasks = {
        "mqar": [cell(8), cell(16), cell(32)],
        "needle": [cell(size, depth=depth) for size in (128, 256) for depth in (0.0, 0.5, 1.0)],
    }
    return {
        "kind": "run", "arm": arm, "lr": lr, "seed": seed, "parameters": 1_000_000, "adjusted": "d_ff 8 -> 16",
        "ratio": "1:2.00", "bits_per_byte": bits, "objective": bits, "tasks": tasks,
        "cloze": {"piqa": {"accuracy": accuracy, "accuracy_per_byte": accuracy / 2, "chance": 0.5, "questions": 9}},
        "curve": [[i * 1000, 6 - i / 20] for i in range(40)], "validation_curve": [[20_000, bits + 1], [40_000, bits]],
        "training_tokens_per_second": 10_000.0, "device": "CPU, 2 threads",
    }  # fmt: skip


def speed_record(arms: list[str]) -> dict:
    rate = lambda x: {"median": x, "slowest": 0.9 * x, "fastest": 1.1 * x}  # noqa: E731
    part = {"weight_bytes": 4_000_000, "peak_memory": 2_000_000}
    numbers = {
        arm: {"prefill": rate(9000.0), "decode": rate(100.0 * (i + 1)), "cache_bytes": 1000 * (i + 1), **part}
        for i, arm in enumerate(arms)
    }
    return {"kind": "speed", "settings": {"batch": 1, "context": 256}, "device": "CPU", "arms": numbers}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """All arms, two rates, three seeds; as in the paper, but smaller, with some noise."""
    path, draw = tmp_path_factory.mktemp("study") / "results.jsonl", random.Random(0)
    results.append(path, STUDY)
    for i, arm in enumerate(ARMS):
        row = TABLE_1.get(ARMS[arm].row)
        recall, general = (row.recall, row.general) if row else (30.0 + i, 44.0)
        for lr, seed in ((1e-3, 0), (2e-3, 0), (2e-3, 1), (2e-3, 2)):
            bits = 3 - general / 50 + 1e-3 * draw.random() + (lr == 1e-3)
            results.append(path, run_record(arm, lr, seed, bits, recall / 100 + 1e-3 * draw.random()))
    results.append(path, speed_record(list(ARMS)))
    return path


def test_lines_survive_a_crash_in_the_middle_of_one(tmp_path):
    path = tmp_path / "results.jsonl"
    results.append(path, STUDY)
    results.append(path, run_record("mamba", 1e-3, 0, 2.0, 0.5))
    whole = path.read_bytes()
    results.append(path, run_record("mamba", 1e-3, 1, 2.0, 0.5))
    for cut in (len(whole) + 1, len(whole) + 40, len(path.read_bytes()) - 1):
        path.write_bytes(path.read_bytes()[:cut])
        assert set(results.read(path).runs) >= {Run("mamba", 1e-3, 0)}
        results.append(path, run_record("mamba", 1e-3, 2, 2.0, 0.5))
        assert Run("mamba", 1e-3, 2) in results.read(path).runs
        path.write_bytes(whole)
        results.append(path, run_record("mamba", 1e-3, 1, 2.0, 0.5))


def test_what_is_no_results_file_is_said_in_a_line(tmp_path):
    with pytest.raises(UserError, match="make it with `hymba study run`"):
        results.read(tmp_path / "none.jsonl")
    (tmp_path / "other.jsonl").write_text('{"a": 1}\nnonsense\n[1]\n')
    with pytest.raises(UserError, match="is no results file"):
        results.read(tmp_path / "other.jsonl")


def test_the_rate_with_the_lowest_loss_is_chosen_once_all_are_known():
    a, b = Run("mamba", 1.0, 0), Run("mamba", 2.0, 0)
    choose = lambda objectives: results.chosen_rates(["mamba"], [1.0, 2.0], 0, objectives)  # noqa: E731
    assert choose({a: 1.0}) == {}
    assert choose({a: 1.0, b: 0.5}) == {"mamba": 2.0}
    assert choose({a: 1.0, b: float("inf")}) == {"mamba": 1.0}
    assert choose({a: float("inf"), b: float("inf")}) == {}


def test_summaries_are_of_the_chosen_rate_and_leave_out_what_diverged(path):
    read = results.read(path)
    by_name = {summary.arm: summary for summary in findings.summaries(read)}
    assert list(by_name) == list(ARMS)
    assert {summary.lr for summary in by_name.values()} == {2e-3}
    assert by_name["hymba"].spread("recall").seeds == 3
    assert by_name["hymba"].spread("recall").mean == pytest.approx(0.5179, abs=1e-3)
    failed = {run: record | ({"failed": "loss"} if run.lr == 2e-3 else {}) for run, record in read.runs.items()}
    assert {s.lr for s in findings.summaries(Results(read.study, failed, read.speed))} == {1e-3}


def test_contrasts_are_read_as_in_the_paper_where_the_numbers_are(path):
    verdicts = findings.judge(findings.summaries(results.read(path)))
    assert len(verdicts) == len(findings.CONTRASTS)
    for v in verdicts:
        if v.contrast.measure == "recall" and v.paper is not None and abs(v.paper) > 1:
            assert v.reading == "as in the paper", v
            assert 100 * v.ours == pytest.approx(v.paper, abs=0.2)
        if v.contrast.measure == "general" and v.paper is not None:
            assert v.ours == pytest.approx(-v.paper / 50, abs=2e-3)  # less is better


def verdict(first: list[float], second: list[float]) -> findings.Verdict:
    summaries = [
        findings.Summary(arm, 1.0, {i: run_record(arm, 1.0, i, x, 0.5) for i, x in enumerate(values)}, None)
        for arm, values in (("hymba", first), ("shared-kv", second))
    ]
    return next(v for v in findings.judge(summaries) if v.contrast.measure == "general")


def test_a_difference_is_clear_only_beyond_its_spread():
    assert verdict([2.0, 2.1, 2.2], [2.1, 2.21, 2.31]).reading == "as in the paper"  # paired: the seeds' spread is gone
    assert verdict([2.1, 2.21, 2.31], [2.0, 2.1, 2.2]).reading == "the other way round"
    assert verdict([2.0, 2.3, 2.1], [2.1, 2.1, 2.2]).reading == "no clear difference"
    assert verdict([2.0], [2.1]).reading == "one seed: no spread, no verdict"
    wide = verdict([0.0, 2.0, 4.0], [0.0, 1.0, 2.0])
    assert wide.half_width == pytest.approx(4.303 * 1.0 / 3**0.5, rel=1e-3)


class Checker(HTMLParser):
    """Tags that are open, and what is loaded from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.loaded = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_has_every_row_beside_the_papers_and_needs_no_other_file(path, tmp_path):
    pytest.importorskip("matplotlib")
    report.write(results.read(path), tmp_path)
    text = (tmp_path / "README.md").read_text()
    for arm in ARMS.values():
        if arm.row:
            paper = TABLE_1[arm.row]
            row = next(line for line in text.splitlines() if line.startswith(f"| {arm.row} | {arm.name} |"))
            assert f"| {paper.general:.2f} | {paper.recall:.2f} |" in row
            assert "±" in row
    assert "cloze piqa | cloze piqa, per byte |" in text
    figures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(figures) == ["by-size.png", "curves.png", "needles.png", "tradeoffs.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in figures)
    page, checker = (tmp_path / "report.html").read_text(), Checker()
    checker.feed(page)
    assert not checker.open
    assert len(checker.loaded) == 4 and all(x.startswith("data:image/svg+xml;base64,") for x in checker.loaded)
    again = tmp_path / "again"
    report.write(results.read(path), again)
    assert (again / "report.html").read_text() == page


def test_a_study_that_has_just_begun_says_so(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="there are no finished runs yet"):
        report.write(Results(STUDY, {}, None), tmp_path)
    runs = {Run("mamba", 1.0, 0): run_record("mamba", 1.0, 0, 2.0, 0.1)}
    report.write(Results(STUDY, runs, None), tmp_path)  # one arm, one seed, no speed
    assert "Not measured yet" in (tmp_path / "README.md").read_text()


def test_without_matplotlib_the_report_says_what_to_install(path, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"install hymba\[plots\]"):
        report.write(results.read(path), tmp_path)
