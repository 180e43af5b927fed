"""The folder that `hymba analyze` writes: figures, numbers, and a page that shows both."""

import json
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hymba import __version__
from hymba.errors import UserError
from hymba.files import write_files

# a date in a file would make every run's different
METADATA = {"svg": {"Date": None}, "png": {}}
# figure -> title, analysis, how to read it
FIGURES = {
    "attention-mass": (
        "What the heads look at", "attention",
        "The share of attention that goes to the meta tokens, to BOS, to the token itself, and to all other tokens, "
        "mean over heads: a tall orange bar is an attention sink, which meta tokens are meant to take over "
        "(paper, figure 7).",
    ),
    "attention-heads": (
        "The same, head by head", "attention",
        "Every cell is one head: a bright cell under 'itself' is a head that looks at its own token only, a dark row "
        "under 'other tokens' a layer that leaves retrieval to its Mamba heads.",
    ),
    "attention-entropy": (
        "How widely attention is spread", "attention",
        "Low entropy is attention on few tokens, the dashed line attention on all visible ones alike; layers with a "
        "window see fewer, so their line is lower.",
    ),
    "meta-tokens": (
        "Which meta tokens are used for what", "meta",
        "Where the coloured lines part, a meta token serves one kind of text more than another (paper, figure 5).",
    ),
    "importance": (
        "What a layer's heads are worth", "importance",
        "The taller the bar, the more bits per byte the text costs when the attention heads, or the Mamba heads, of "
        "this layer are removed; a bar below zero means that the model does better without (paper, figures 3 and 13).",
    ),
    "receptive-field": (
        "How far back the model looks", "receptive-field",
        "A curve that rises late belongs to a model that looks far back; the dot marks the distance within which 90% "
        "of the influence lies, which for several models is set against the cache that pays for it "
        "(paper, figure 11).",
    ),
    "outputs": (
        "How large the branches' outputs are", "magnitudes",
        "The wider the two lines are apart, the more the layer needs a norm behind each branch before they are "
        "averaged (paper, figure 12).",
    ),
    "gates": (
        "How much each branch is let through", "magnitudes",
        "The branch with the larger gate contributes more to the layer's output (paper, figure 12).",
    ),
    "memory": (
        "How long the Mamba heads remember", "memory",
        "The tokens until the slowest state of a channel has decayed to 1/e: channels above the dotted line keep what "
        "they read for the whole text, those near 1 see only their neighbours.",
    ),
}  # fmt: skip


def require_matplotlib() -> None:
    """Raises `UserError` where there is none, before any time is spent."""
    if find_spec("matplotlib") is None:
        raise UserError("figures need matplotlib; install hymba[plots], or print the numbers with --json")


def as_json(models: dict[str, dict[str, Any]]) -> str:
    """What `analysis.json` holds. models: name -> what `analyze` returned"""
    return json.dumps({"hymba": __version__, "models": models}, allow_nan=False)


def write(models: dict[str, dict[str, Any]], folder: Path) -> None:
    """Write README.md, analysis.json, and every figure as PNG and SVG; see `as_json`."""
    require_matplotlib()
    import matplotlib

    from hymba.analysis import plots

    page = [f"# Inside {', '.join(models)}", "", *_summary(models), ""]
    writers: dict[Path, Callable[[Path], None]] = {}
    with matplotlib.rc_context(plots.STYLE):
        for name, (title, analysis, reading) in FIGURES.items():
            shown = {model: numbers for model, numbers in models.items() if _has(numbers, name, analysis)}
            if not shown:
                continue
            figure = getattr(plots, name.replace("-", "_"))(shown)
            for kind in ("svg", "png"):
                writers[folder / f"{name}.{kind}"] = partial(
                    figure.savefig, format=kind, dpi=160, metadata=METADATA[kind]
                )
            page += [f"## {title}", "", reading, "", f"![{title}]({name}.png)", ""]
        writers[folder / "analysis.json"] = lambda path: path.write_text(as_json(models), encoding="utf-8")
        page += [
            "Figures: PNG and SVG; their numbers: analysis.json. Definitions: docs/analysis.md of the package.",
            "",
        ]
        writers[folder / "README.md"] = lambda path: path.write_text("\n".join(page), encoding="utf-8")
        write_files(writers)


def _has(numbers: dict[str, Any], figure: str, analysis: str) -> bool:
    found = numbers.get(analysis)
    return bool(found) and (figure != "gates" or any("gate" in part for part in found.values()))


def _summary(models: dict[str, dict[str, Any]]) -> list[str]:
    """A table with a row a model."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "parameters": lambda n: f"{n['parameters'] / 1e6:.1f} M",
        "text": lambda n: f"{n['text']['rows']} x {n['text']['length']} tokens, {n['text']['bytes']:,} bytes",
        "bits per byte": lambda n: f"{n['bits_per_byte']:.3f}",
        "attention to meta tokens": lambda n: f"{_mean(n['attention']['mass']['meta']):.0%}",
        "to BOS": lambda n: f"{_mean(n['attention']['mass']['bos']):.0%}",
        "90% receptive field": lambda n: f"{n['receptive-field']['effective']} tokens",
        "cache of a row": lambda n: f"{n['cache_bytes'] / 1e6:.2f} MB",
        "median SSM memory": lambda n: f"{_mean(n['memory']['quantiles']['0.5']):.3g} tokens",
    }
    table = [["", *columns], ["---"] * (len(columns) + 1)]
    for name, numbers in models.items():
        cells = []
        for column in columns.values():
            try:
                cells.append(column(numbers))
            except KeyError:  # not asked for, or nothing of the kind in this model
                cells.append("")
        table.append([name, *cells])
    return ["| " + " | ".join(row) + " |" for row in table]


def _mean(values: list) -> float:
    flat = [x for row in values for x in (row if isinstance(row, list) else [row])]
    return sum(flat) / len(flat)
