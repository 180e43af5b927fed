"""Figures of what `run.analyze` returns, for one model or several side by side. Needs matplotlib.

Every function takes {name of a model: its numbers}, all of which have the analysis, and returns a figure. Colours are
those of Okabe and Ito, which colour-blind people can tell apart.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

Numbers = dict[str, Any]
Models = dict[str, Numbers]

BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
BLACK, GREY, PALE = "#000000", "#555555", "#CCCCCC"
CATEGORIES = {
    "meta": ("meta tokens", BLUE),
    "bos": ("BOS", ORANGE),
    "self": ("itself", GREEN),
    "cross": ("other tokens", PALE),
}
BRANCHES = {"attention": ("attention heads", BLUE), "mamba": ("Mamba heads", RED)}
KINDS = {"prose": BLUE, "numbers": ORANGE, "code": GREEN}
MODEL_COLORS = (BLUE, RED, GREEN, ORANGE, PINK, SKY, BLACK)
COLUMNS = 3  # panels side by side
TITLE_PAD = 11  # points; the marks of layers with full attention stand below a title
PLAIN = FuncFormatter(lambda x, _: f"{x:g}")  # 0.01, not a power of ten
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "figure.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "hymba",  # the same numbers give the same file
}


def attention_mass(models: Models) -> Figure:
    """The first panel is the mean over layers and heads, a bar a model; then a panel a model, a bar a layer."""
    figure, (overall, *panels) = _panels(models, extra=1)
    for i, (axes, numbers) in enumerate(zip(panels, models.values(), strict=True)):
        mass = {name: np.mean(heads, axis=1) for name, heads in numbers["attention"]["mass"].items()}
        _stack(axes, numbers["attention"]["layers"], mass)
        _stack(overall, [i], {name: [layers.mean()] for name, layers in mass.items()})
    overall.set(ylim=(0, 1), xlim=(-1, len(models)))
    overall.set_title("mean of the layers", pad=TITLE_PAD)
    figure.supylabel("attention mass")
    slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(models) > 1 else {}
    overall.set_xticks(range(len(models)), models, **slanted)
    _legend(figure, (Patch(color=color, label=label) for label, color in CATEGORIES.values()), models)
    return figure


def attention_heads(models: Models) -> Figure:
    """A row a model, a column a category; every cell is a head of a layer."""
    figure, grid = _grid(models, [1, 1, 1, 1], 2.1)
    for i, (row, (name, numbers)) in enumerate(zip(grid, models.items(), strict=True)):
        first, last = i == 0, i == len(models) - 1
        mass, layers = numbers["attention"]["mass"], numbers["attention"]["layers"]
        for axes, (category, (label, _)) in zip(row, CATEGORIES.items(), strict=True):
            # the square root shows small shares
            image = _heat(axes, mass[category], layers, PowerNorm(0.5, 0, 1))
            axes.set(title=label if first else "", xlabel="head" if last else "")
        row[0].set_ylabel(f"{name}\nlayer" if len(models) > 1 else "layer")
    figure.colorbar(image, ax=grid, label="attention mass", aspect=15 * len(models), fraction=0.04)
    return figure


def attention_entropy(models: Models) -> Figure:
    """A dot a head, a line for their mean; the dashed line is attention that is spread evenly."""
    figure, panels = _panels(models)
    for axes, numbers in zip(panels, models.values(), strict=True):
        layers, heads = numbers["attention"]["layers"], np.array(numbers["attention"]["entropy"])
        axes.plot(layers, numbers["attention"]["uniform_entropy"], "--", color=GREY, lw=1.2)
        axes.plot(layers, heads, "o", color=SKY, ms=4, alpha=0.8, mec="none")
        axes.plot(layers, heads.mean(axis=1), "-o", color=BLUE, ms=3, lw=1.6)
    figure.supylabel("entropy, nats")
    panels[0].set_ylim(bottom=0)
    handles = (
        Line2D([], [], color=BLUE, marker="o", ms=3, label="mean of the heads"),
        Line2D([], [], color=SKY, marker="o", ls="", ms=4, label="one head"),
        Line2D([], [], color=GREY, ls="--", label="even spread, log n"),
    )
    _legend(figure, handles, models)
    return figure


def meta_tokens(models: Models) -> Figure:
    """A row a model: the mean over layers for the three kinds of text, then every layer for each kind."""
    figure, grid = _grid(models, [1.5, 1, 1, 1], 2.5)
    for row, (name, numbers) in zip(grid, models.items(), strict=True):
        shares = {kind: 100 * np.array(share) for kind, share in numbers["meta"]["shares"].items()}
        top = max(share.max() for share in shares.values())
        for axes, (kind, share) in zip(row[1:], shares.items(), strict=True):
            row[0].plot(share.mean(axis=0), "-o", color=KINDS[kind], ms=120 / (40 + share.shape[1]), lw=1.2, label=kind)
            image = _heat(axes, share, numbers["meta"]["layers"], Normalize(0, top))
            axes.set(title=kind, xlabel="meta token")
        row[0].set(title=f"{name}: mean of the layers", xlabel="meta token", ylabel="attention, %")
        row[0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        row[0].set_ylim(0, 1.1 * row[0].dataLim.y1)
        row[0].legend()
        row[1].set_ylabel("layer")
        figure.colorbar(image, ax=row[1:], label="attention, %", fraction=0.05)
    return figure


def importance(models: Models) -> Figure:
    """A pair of bars a layer: how many bits per byte the text costs more without the heads of this kind."""
    figure, panels = _panels(
        models, titles=[f"{name}: {n['bits_per_byte']:.2f} bits per byte" for name, n in models.items()]
    )
    for axes, numbers in zip(panels, models.values(), strict=True):
        parts = numbers["importance"]
        both = set.intersection(*(set(part["layers"]) for part in parts.values())) if len(parts) > 1 else ()
        for branch, side in (("attention", -0.2), ("mamba", 0.2)):
            if branch in parts:
                places = [layer + side * (layer in both) for layer in parts[branch]["layers"]]
                axes.bar(places, parts[branch]["change"], width=0.4, color=BRANCHES[branch][1], zorder=2)
        axes.axhline(0, color=GREY, lw=0.8)
    changes = np.array([c for n in models.values() for part in n["importance"].values() for c in part["change"]])
    ordinary = np.median(np.abs(changes))
    if np.abs(changes).max() > 20 * ordinary > 0:  # one layer would hide all others
        panels[0].set_yscale("symlog", linthresh=10 ** np.round(np.log10(ordinary)))
        panels[0].yaxis.set_major_formatter(PLAIN)
        panels[0].set_ylim(bottom=2 * min(changes.min(), 0))
    figure.supylabel("bits per byte more without them")
    _legend(figure, _branch_handles(models, "importance"), models)
    return figure


def receptive_field(models: Models) -> Figure:
    """Left: the share of influence within a distance. Right, for several models: receptive field against cache."""
    figure = Figure(figsize=(9 if len(models) > 1 else 5.2, 3.4), layout="constrained")
    left, *right = figure.subplots(1, 2 if len(models) > 1 else 1, squeeze=False)[0]
    for i, (name, numbers) in enumerate(models.items()):
        field, color = numbers["receptive-field"], MODEL_COLORS[i % len(MODEL_COLORS)]
        within = np.cumsum(field["share"])
        left.plot(np.arange(len(within)) + 1, within, color=color, lw=1.6, label=name)
        left.plot(field["effective"] + 1, within[field["effective"]], "o", color=color)
        for axes in right:
            cache = numbers["cache_bytes"] / 1e6
            axes.plot(cache, field["effective"], "o", color=color, ms=8)
    left.axhline(0.9, color=GREY, lw=0.8, ls=":")
    left.set(xscale="log", ylim=(0, 1.03), xlabel="among the last n tokens", ylabel="share of all influence")
    left.xaxis.set_major_formatter(PLAIN)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(models), 4))
    for axes in right:
        axes.set(xlabel="cache of a row, MB", ylabel="receptive field (90%), tokens")
        axes.margins(0.2)
        axes.set_ylim(bottom=0)
    return figure


def outputs(models: Models) -> Figure:
    """How large the outputs of both branches are, before their norms."""
    figure, panels = _panels(models)
    for axes, numbers in zip(panels, models.values(), strict=True):
        for branch, part in numbers["magnitudes"].items():
            axes.plot(part["layers"], part["output"], "-o", color=BRANCHES[branch][1], ms=4)
    _log_axis(panels[0])
    figure.supylabel("output before the norm, RMS")
    _legend(figure, _branch_handles(models, "magnitudes"), models)
    return figure


def gates(models: Models) -> Figure:
    """The learned gates of both branches: mean over channels, and the range of nine tenths of them."""
    figure, panels = _panels(models)
    for axes, numbers in zip(panels, models.values(), strict=True):
        for branch, part in numbers["magnitudes"].items():
            if "gate" not in part:
                continue
            color, gate = BRANCHES[branch][1], part["gate"]
            axes.plot(gate["layers"], gate["mean"], "-o", color=color, ms=4)
            low, high = gate["quantiles"]["0.05"], gate["quantiles"]["0.95"]
            axes.fill_between(gate["layers"], low, high, color=color, alpha=0.15, lw=0)
    figure.supylabel("gate, mean and 5% to 95%")
    panels[0].set_ylim(bottom=0)
    _legend(figure, _branch_handles(models, "magnitudes"), models)
    return figure


def memory(models: Models) -> Figure:
    """A box a layer over its channels: quartiles and median, a line from 5% to 95%; log scale."""
    figure, panels = _panels(models)
    for axes, numbers in zip(panels, models.values(), strict=True):
        layers = np.array(numbers["memory"]["layers"])
        q = {name: np.array(values) for name, values in numbers["memory"]["quantiles"].items()}
        axes.vlines(layers, q["0.05"], q["0.95"], color=RED, lw=1.2)
        axes.bar(layers, q["0.75"] - q["0.25"], 0.55, q["0.25"], color="#EFA77A", zorder=2)
        axes.hlines(q["0.5"], layers - 0.275, layers + 0.275, color=BLACK, lw=1.6, zorder=3)
        axes.axhline(numbers["text"]["length"], color=GREY, lw=0.9, ls=":")
    _log_axis(panels[0])
    figure.supylabel("memory, tokens")
    handles = (
        Line2D([], [], color=BLACK, lw=1.6, label="median channel"),
        Patch(color="#EFA77A", label="middle half"),
        Line2D([], [], color=RED, lw=1.2, label="5% to 95%"),
        Line2D([], [], color=GREY, lw=0.9, ls=":", label="length of the text"),
    )
    _legend(figure, handles, models)
    return figure


def _panels(models: Models, extra: int = 0, titles: Iterable[str] | None = None) -> tuple[Figure, list[Axes]]:
    """A panel a model with a layer axis and a common y axis, `extra` panels before them."""
    count = len(models) + extra
    columns = 2 if count == 4 else min(count, COLUMNS)
    rows = -(-count // columns)
    deep = max(numbers["config"]["n_layers"] for numbers in models.values())
    width = min(2.2 + 0.12 * deep, 4.2) if count > 1 else 5.2
    figure = Figure(figsize=(columns * width, 2.5 * rows + 0.4), layout="constrained")
    narrow = [0.5] * (extra if rows == 1 else 0)
    ratios = narrow + [1] * (columns - len(narrow))
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False, width_ratios=ratios).flatten().tolist()
    for axes in panels[count:]:
        axes.remove()
    for axes, title, numbers in zip(panels[extra:], titles or models, models.values(), strict=False):
        axes.set(xlabel="layer", xlim=(-0.7, numbers["config"]["n_layers"] - 0.3))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
        axes.set_title(title, pad=TITLE_PAD)
        for layer in numbers["global_layers"]:
            axes.plot(layer, 1.03, "v", color=GREY, ms=4.5, clip_on=False, transform=axes.get_xaxis_transform())
    return figure, panels[:count]


def _grid(models: Models, widths: list[float], width: float) -> tuple[Figure, np.ndarray]:
    """A row a model."""
    heights = [1.2 + 0.11 * max(10, numbers["config"]["n_layers"]) for numbers in models.values()]
    figure = Figure(figsize=(width * sum(widths), sum(heights)), layout="constrained")
    grid = figure.subplots(len(models), len(widths), squeeze=False, width_ratios=widths, height_ratios=heights)
    return figure, grid


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(PLAIN)
    axes.yaxis.set_minor_locator(NullLocator())


def _stack(axes: Axes, places: list[int], mass: dict[str, Any]) -> None:
    bottom = np.zeros(len(places))
    for name, values in mass.items():
        axes.bar(places, values, 0.8, bottom, color=CATEGORIES[name][1], zorder=2)
        bottom = bottom + values


def _heat(axes: Axes, values: Any, layers: list[int], norm: Normalize) -> AxesImage:
    """(L, n): layers go down."""
    image = axes.imshow(values, aspect="auto", cmap="cividis", norm=norm, interpolation="nearest")
    step = -(-len(layers) // 12)
    axes.set_yticks(range(0, len(layers), step), layers[::step])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return image


def _branch_handles(models: Models, analysis: str) -> list[Patch]:
    shown = {branch for numbers in models.values() for branch in numbers[analysis]}
    return [Patch(color=color, label=label) for name, (label, color) in BRANCHES.items() if name in shown]


def _legend(figure: Figure, handles: Iterable[Artist], models: Models) -> None:
    handles = list(handles)
    if any(numbers["global_layers"] for numbers in models.values()):
        handles.append(Line2D([], [], color=GREY, marker="v", ls="", ms=4.5, label="layer with full attention"))
    fit = int(figure.get_figwidth() / 1.9)  # inches that an entry needs
    rows = -(-len(handles) // fit)
    figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(handles) // rows))
