"""The report of a study: one content, written as Markdown with figures beside it, and as one HTML file."""

import base64
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hymba.errors import UserError
from hymba.files import write_files
from hymba.study.arms import ARMS, Built
from hymba.study.findings import Spread, Summary, Verdict, judge, summaries
from hymba.study.paper import TABLE_1
from hymba.study.results import Results
from hymba.study.speed import cache_bytes

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
h1, h2 {{ line-height: 1.2 }} h2 {{ margin-top: 2.5rem }}
table {{ border-collapse: collapse; font-size: 12.5px; display: block; overflow-x: auto }}
th, td {{ padding: .25rem .5rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }}
th {{ background: #f4f4f4; text-align: center }} .text {{ text-align: left }}
figure {{ margin: 1rem 0 }} figcaption {{ color: #555; font-size: 13px; max-width: 60rem }} img {{ max-width: 100% }}
</style></head><body>
{body}
</body></html>
"""


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: frozenset[int] = frozenset((0,))  # columns that hold text; the others hold numbers


@dataclass(frozen=True)
class Picture:
    name: str
    title: str
    caption: str


Block = Heading | Paragraph | Table | Picture


def describe(built: Built) -> dict[str, Any]:
    """An arm for `hymba study list`."""
    arm, context = built.arm, built.config.max_length
    where = [f"1, row {arm.row}"] if arm.row else []
    return {
        "arm": arm.name,
        "where": " and ".join([*where, *(["3"] if arm.table_3 else [])]),
        "neighbour": arm.neighbour,
        "change": arm.text,
        "parameters": built.parameters,
        "adjusted": built.adjusted,
        "context": context,
        "cache_bytes": cache_bytes(built.config, context),
    }


def write(results: Results, folder: Path) -> None:
    """Write README.md, its figures, and report.html. Raises `UserError` without matplotlib, or without results."""
    if find_spec("matplotlib") is None:
        raise UserError("the report's figures need matplotlib; install hymba[plots]")
    found = summaries(results)
    if not found:
        raise UserError("there are no finished runs yet; continue with `hymba study run`")
    import matplotlib

    from hymba.study import plots

    drawers: dict[str, Callable] = {"curves": plots.curves}
    if any(summary.speed for summary in found):
        drawers["tradeoffs"] = plots.tradeoffs
    if found[0].tasks:
        drawers["by-size"] = plots.by_size
    if "needle" in found[0].tasks:
        drawers["needles"] = plots.needles
    blocks = [b for b in content(results, found) if not isinstance(b, Picture) or b.name in drawers]
    writers: dict[Path, Callable[[Path], None]] = {}
    images = {}
    with matplotlib.rc_context(plots.STYLE):
        for name, draw in drawers.items():
            figure, svg = draw(found), io.BytesIO()
            figure.savefig(svg, format="svg", metadata={"Date": None})  # a date would make every file a new one
            images[name] = svg.getvalue()
            writers[folder / f"{name}.png"] = partial(figure.savefig, format="png", dpi=150)
        page = to_html("A controlled study of hybrid heads", blocks, images)
        writers[folder / "report.html"] = lambda path: path.write_text(page, encoding="utf-8")
        text = to_markdown("A controlled study of hybrid heads", blocks)
        writers[folder / "README.md"] = lambda path: path.write_text(text, encoding="utf-8")
        write_files(writers)


# ------------------------------------------------------------------------------------------------------------- content


def content(results: Results, found: Sequence[Summary]) -> list[Block]:
    """The report, whatever it is written as."""
    study = results.study
    shares = ", ".join(f"{name} {share:.0%}" for name, share in study["shares"].items())
    seeds = sorted({seed for summary in found for seed in summary.records})
    diverged = [f"{run.arm} at {run.lr:g}, seed {run.seed}" for run, r in results.runs.items() if "failed" in r]
    about = (
        f"{len(found)} architectures of {study['parameters'] / 1e6:.2f} M parameters (within 2%), each trained on "
        f"{study['tokens'] / 1e6:.1f} M tokens in rows of {study['length']}: text, and documents of the tasks "
        f"({shares}). Tokenizer, data, order, schedule and seeds ({', '.join(map(str, seeds))}) are the same; the "
        "learning rate is the best of a grid for each arm, by the validation loss of the mixture on the first seed. "
        "Numbers are means over seeds, with the sample standard deviation behind ±; the paper's are those of its "
        "table 1 (300 M parameters, 100 B tokens, NVIDIA A100): compare the order of rows, not the values."
    )
    blocks: list[Block] = [Paragraph(about)]
    if diverged:
        blocks.append(Paragraph(f"Training diverged, and is left out: {'; '.join(diverged)}."))
    blocks += [
        Heading("Table 1, row for row"),
        _main_table([summary for summary in found if ARMS[summary.arm].row]),
        Paragraph(
            "Recall is the mean over tasks of the share of right answers in all settings. The cache is that of one row "
            f"of {_context(results)} tokens in 16 bits (SSM states in 32), meta tokens included."
        ),
    ]
    if any(ARMS[summary.arm].table_3 for summary in found):
        blocks += [
            Heading("The architectures of table 3"),
            _main_table([summary for summary in found if ARMS[summary.arm].table_3], paper=False),
        ]
    blocks += [
        Heading("What of the paper shows at this scale"),
        Paragraph(
            "Differences are those of the first arm minus the second, paired by seed, with half the width of the 95% "
            "interval of their mean (Student's t); speed and cache are ratios. For general quality ours are in bits "
            "per byte, of which less is better. A difference whose interval includes 0 is called unclear."
        ),
        _verdicts(judge(found)),
        Picture("tradeoffs", "Quality against cost", "Better is up in the upper row and down in the lower one; left "
                "with the cache, right with the speed."),
        Heading("Recall, task by task"),
        _right("right answers, %", found, found[0].tasks),
        *_cloze(found),
        Picture("by-size", "Right answers by what there is to remember", "Dotted: someone who picks one of the values "
                "that the document shows. Lengths beyond the rows of training are extrapolation."),
        Picture("needles", "Needle in a haystack", "Length of the haystack and depth of the needle; mean over seeds."),
        Heading("Cost"),
        _costs(results, found),
        Heading("Training"),
        _training(results, found),
        Picture("curves", "Loss curves", "Mean over seeds at the chosen learning rate."),
    ]  # fmt: skip
    return blocks


def _main_table(found: Sequence[Summary], paper: bool = True) -> Table:
    titles = ["arm", "attention : Mamba", "bits per byte", "recall, %", "decode, tokens/s", "cache, kB"]
    if paper:
        titles = ["row", *titles, "paper: configuration", "general", "recall", "tokens/s", "cache, MB"]
    rows = []
    for s in found:
        recall = _spread(s.spread("recall"), 100, 1) if s.tasks else ""
        speed = f"{s.speed['decode']['median']:,.0f}" if s.speed else ""
        cache = f"{s.speed['cache_bytes'] / 1e3:,.1f}" if s.speed else ""
        cells = [
            s.arm,
            s.ratio,
            _spread(s.spread("bits_per_byte"), 1, 3),
            recall,
            speed,
            cache,
        ]
        if paper:
            row = TABLE_1[ARMS[s.arm].row]
            cells = [str(row.number), *cells, row.configuration, f"{row.general:.2f}", f"{row.recall:.2f}",
                     f"{row.tokens_per_second:,.1f}", f"{row.cache_mb:.2f}"]  # fmt: skip
        rows.append(tuple(cells))
    return Table(tuple(titles), tuple(rows), frozenset((1, 7) if paper else (0,)))


def _verdicts(verdicts: Sequence[Verdict]) -> Table:
    rows = []
    for contrast, paper, ours, half, reading in verdicts:
        ratio = contrast.measure in ("speed", "cache")
        scale, unit = (1, "x") if ratio else (100, " points") if contrast.measure == "recall" else (1, " bits/byte")
        theirs = "" if paper is None else f"{paper:.3g}x" if ratio else f"{paper:+.2f} points"
        digits = 1 if contrast.measure == "recall" else 3
        mine = f"{ours:.3g}x" if ratio else f"{scale * ours:+.{digits}f}{unit}"
        if half is not None:
            mine = f"{scale * ours:+.{digits}f} ± {scale * half:.{digits}f}{unit}"
        rows.append((contrast.text, f"{contrast.arm} : {contrast.other}", contrast.measure, theirs, mine, reading))
    titles = ("the paper's finding", "arms", "measure", "paper", "here", "reading")
    return Table(titles, tuple(rows), frozenset((0, 1, 2, 5)))


def _right(title: str, found: Sequence[Summary], measures: Sequence[str]) -> Table:
    rows = [(s.arm, *(_spread(s.spread(measure), 100, 1) for measure in measures)) for s in found]
    return Table((title, *measures), tuple(rows))


def _cloze(found: Sequence[Summary]) -> list[Block]:
    measures = found[0].cloze
    if not measures:
        return []
    about = (
        "Cloze tasks: the share of questions in which the right ending costs the model least, in all or per byte; "
        "where a question has one ending only, in which greedy decoding would write it."
    )
    return [Paragraph(about), _right("right endings, %", found, measures)]


def _costs(results: Results, found: Sequence[Summary]) -> Table | Paragraph:
    timed = [s for s in found if s.speed]
    if not timed:
        return Paragraph("Not measured yet: `hymba study run` does it at the end.")
    settings = results.speed["settings"]
    titles = (
        f"{results.speed['device']}, {settings['batch']} rows, context {settings['context']}",
        "prefill, tokens/s", "range", "decode, tokens/s", "range", "cache, kB", "peak memory, MB",
    )  # fmt: skip
    rows = []
    for s in timed:
        rates = [
            text
            for kind in ("prefill", "decode")
            for rate in (s.speed[kind],)
            for text in (f"{rate['median']:,.0f}", f"{rate['slowest']:,.0f} - {rate['fastest']:,.0f}")
        ]
        rows.append((s.arm, *rates, f"{s.speed['cache_bytes'] / 1e3:,.1f}", f"{s.speed['peak_memory'] / 1e6:,.1f}"))
    return Table(titles, tuple(rows))


def _training(results: Results, found: Sequence[Summary]) -> Table:
    rates = sorted({run.lr for run in results.runs})
    rows = []
    for s in found:
        grid = {run.lr: record for run, record in results.runs.items()
                if run.arm == s.arm and run.seed == results.study["first_seed"]}  # fmt: skip
        losses = [
            "" if lr not in grid else "diverged" if "failed" in grid[lr] else f"{grid[lr]['objective']:.4f}"
            for lr in rates
        ]
        record = next(iter(s.records.values()))
        rows.append((s.arm, f"{s.parameters:,}", record["adjusted"], *losses, f"{s.lr:g}", str(len(s.records)),
                     f"{record['training_tokens_per_second']:,.0f}", record["device"]))  # fmt: skip
    titles = (
        "arm",
        "parameters",
        "adjusted to match them",
        *(f"loss at {lr:g}" for lr in rates),
        "chosen",
        "seeds",
        "tokens/s",
        "first on",
    )
    return Table(titles, tuple(rows), frozenset((0, 2, len(titles) - 1)))


def _spread(value: Spread, scale: float, digits: int) -> str:
    mean = f"{scale * value.mean:.{digits}f}"
    return mean if value.deviation is None else f"{mean} ± {scale * value.deviation:.{digits}f}"


def _context(results: Results) -> str:
    return f"{results.speed['settings']['context']}" if results.speed else "?"


# -------------------------------------------------------------------------------------------------------------- formats


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    lines = [f"# {title}", ""]
    for block in blocks:
        match block:
            case Heading(text):
                lines += [f"## {text}", ""]
            case Paragraph(text):
                lines += [text, ""]
            case Table(titles, rows, texts):
                rule = ["---" if i in texts else "---:" for i in range(len(titles))]
                lines += [f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows)] + [""]
            case Picture(name, title, caption):
                lines += [f"![{title}]({name}.png)", "", f"*{title}.* {caption}", ""]
    return "\n".join(lines)


def to_html(title: str, blocks: Sequence[Block], images: dict[str, bytes]) -> str:
    """images: SVG files, which are put inside."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"<h2>{html.escape(text)}</h2>")
            case Paragraph(text):
                parts.append(f"<p>{html.escape(text)}</p>")
            case Table(titles, rows, texts):
                kind = ["text" if i in texts else "number" for i in range(len(titles))]
                line = lambda tag, cells, kind=kind: "".join(  # noqa: E731
                    f'<{tag} class="{k}">{html.escape(cell)}</{tag}>' for k, cell in zip(kind, cells, strict=True)
                )
                body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in rows)
                parts.append(f"<table><tr>{line('th', titles)}</tr>\n{body}</table>")
            case Picture(name, text, caption):
                source = base64.b64encode(images[name]).decode()
                parts.append(
                    f'<figure><img alt="{html.escape(text)}" src="data:image/svg+xml;base64,{source}">'
                    f"<figcaption><b>{html.escape(text)}.</b> {html.escape(caption)}</figcaption></figure>"
                )
    return PAGE.format(title=html.escape(title), body="\n".join(parts))
