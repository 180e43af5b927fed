"""Figures of a study: trade-offs, recall by size, needles by length and depth, loss curves. Needs matplotlib.

Every function takes the arms' summaries and returns a figure. Hue says what an arm is made of: Mamba alone red,
attention alone blue, hybrid heads with full attention green, with windows orange to violet, layers in turn black.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hymba.study.findings import Summary

GREY = "#555555"
STYLES = {
    "mamba": ("#D55E00", "o"),
    "heads-quarter": ("#88C9A1", "v"),
    "heads-half": ("#4DAF7C", "^"),
    "heads-all": ("#009E73", "D"),
    "gqa": ("#00664B", "s"),
    "attention": ("#0072B2", "o"),
    "all-local": ("#E69F00", "v"),
    "local-global": ("#C98BB9", "^"),
    "shared-kv": ("#B25A9C", "D"),
    "attention-compressed": ("#56B4E9", "v"),
    "concat": ("#8C6BB1", "s"),
    "mamba-meta": ("#F0997D", "^"),
    "hymba": ("#7A0177", "*"),
    "mamba2": ("#A63603", "s"),
    "mamba2-ffn": ("#7F2704", "D"),
    "llama": ("#08306B", "D"),
    "samba": ("#000000", "X"),
}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "hymba",  # the same numbers give the same file
}
NAMES = {"mqar": "associative recall", "phonebook": "phonebook", "needle": "needle", "copy": "copy"}
SIZES = {"mqar": "pairs", "phonebook": "entries", "needle": "tokens", "copy": "letters"}
COLUMNS = 5  # heat maps side by side
SMOOTH = 9  # points of a loss curve that are averaged


def tradeoffs(found: Sequence[Summary]) -> Figure:
    """Recall and bits per byte against cache and decoding speed; bars are a standard deviation over seeds."""
    figure = Figure(figsize=(9.5, 7.4), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    timed = [summary for summary in found if summary.speed]
    for row, (measure, label) in zip(
        grid, (("recall", "recall, % of answers"), ("bits_per_byte", "bits per byte (less is better)")), strict=True
    ):
        scale = 100 if measure == "recall" else 1
        for axes, x in zip(row, (_cache, _speed), strict=True):
            for summary in timed:
                color, marker = STYLES[summary.arm]
                mean, deviation, _ = summary.spread(measure)
                axes.errorbar(
                    x(summary), scale * mean, scale * (deviation or 0), color=color, marker=marker, ms=_size(marker),
                    lw=1.2, mec="white", mew=0.5,
                )  # fmt: skip
            axes.grid(color="#EEEEEE", zorder=0)
        row[0].set_ylabel(label)
    grid[1][0].set(xscale="log", xlabel="cache of a row, kB (16 bits)")
    grid[1][1].set(xscale="log", xlabel="decoding, tokens a second")
    _legend(figure, timed)
    return figure


def _cache(summary: Summary) -> float:
    return summary.speed["cache_bytes"] / 1e3


def _speed(summary: Summary) -> float:
    return summary.speed["decode"]["median"]


def by_size(found: Sequence[Summary]) -> Figure:
    """A panel a task: the share of right answers by what there is to remember; the dotted line is guessing."""
    tasks = found[0].tasks
    columns = min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.8 * columns, 3.1 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes in panels[len(tasks) :]:
        axes.remove()
    for axes, task in zip(panels, tasks, strict=False):
        for summary in found:
            color, marker = STYLES[summary.arm]
            sizes, means = _means(summary, task)
            axes.plot(sizes, 100 * means, color=color, marker=marker, ms=0.7 * _size(marker), lw=1.3)
        cells = found[0].cells(task)
        chance = {cell["size"]: cell["chance"] for cell in cells}
        axes.plot(chance.keys(), [100 * c for c in chance.values()], ":", color=GREY, lw=1)
        axes.set(title=NAMES[task], xlabel=SIZES[task], ylim=(-3, 103))
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(chance), list(chance))
        axes.minorticks_off()
    for axes in panels[::columns]:
        axes.set_ylabel("right answers, %")
    _legend(figure, found)
    return figure


def _means(summary: Summary, task: str) -> tuple[list[int], np.ndarray]:
    """Sizes, and accuracies, means over depths and seeds."""
    by_size: dict[int, list[float]] = {}
    for cell in summary.cells(task):
        by_size.setdefault(cell["size"], []).append(np.mean(cell["accuracy"]))
    return list(by_size), np.array([np.mean(values) for values in by_size.values()])


def needles(found: Sequence[Summary]) -> Figure:
    """A map an arm: length of the haystack to the right, depth of the needle downwards, mean over seeds."""
    columns = min(COLUMNS, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(1.9 * columns + 1, 1.75 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes in panels[len(found) :]:
        axes.remove()
    for axes, summary in zip(panels, found, strict=False):
        cells = summary.cells("needle")
        sizes = sorted({cell["size"] for cell in cells})
        depths = sorted({cell.get("depth") for cell in cells})
        values = np.zeros((len(depths), len(sizes)))
        for cell in cells:
            values[depths.index(cell["depth"]), sizes.index(cell["size"])] = 100 * np.mean(cell["accuracy"])
        image = axes.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto", interpolation="nearest")
        axes.set_title(summary.arm)
        axes.set_xticks(range(len(sizes)), sizes, rotation=45)
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    figure.supxlabel("tokens of the haystack", fontsize=9)
    figure.supylabel("depth of the needle", fontsize=9)
    figure.colorbar(image, ax=panels[: len(found)].tolist(), label="found, %", fraction=0.03, aspect=30)
    return figure


def curves(found: Sequence[Summary]) -> Figure:
    """Left: training loss on the mixture, smoothed; right: the text's validation. Mean over seeds."""
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for summary in found:
        color, marker = STYLES[summary.arm]
        tokens, losses = _curve(summary, "curve")
        width = min(SMOOTH, len(losses))
        left.plot(
            np.convolve(tokens, np.ones(width) / width, "valid") / 1e6,
            np.convolve(losses, np.ones(width) / width, "valid"), color=color, lw=1.2,
        )  # fmt: skip
        tokens, bits = _curve(summary, "validation_curve")
        right.plot(tokens / 1e6, bits, color=color, marker=marker, ms=0.6 * _size(marker), lw=1.2)
    left.set(xlabel="tokens, millions", ylabel="training loss, nats a token", title="text and tasks together")
    right.set(xlabel="tokens, millions", ylabel="bits per byte", title="held-out text")
    _legend(figure, found)
    return figure


def _curve(summary: Summary, name: str) -> tuple[np.ndarray, np.ndarray]:
    x = np.array([record[name] for record in summary.records.values()])  # (seeds, points, 2)
    return x[0, :, 0], x[:, :, 1].mean(0)


def _size(marker: str) -> float:
    return 12 if marker == "*" else 7  # a star looks small


def _legend(figure: Figure, found: Sequence[Summary]) -> None:
    handles = []
    for summary in found:
        color, marker = STYLES[summary.arm]
        handles.append(Line2D([], [], color=color, marker=marker, ms=_size(marker), lw=1.3, label=summary.arm))
    figure.legend(handles=handles, loc="outside lower center", ncols=6)
