"""What `hymba bench peers` runs: Hymba and one peer in turn, then the next peer; and the tables made of it."""

import gc
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from hymba.bench import suite, workloads
from hymba.bench.peers.shapes import SHAPES, Shape
from hymba.bench.workloads import Workload
from hymba.config import HymbaConfig
from hymba.cost import LLAMA_3B
from hymba.errors import UserError
from hymba.model.hymba import Hymba

PRECISIONS = ("bfloat16", "int8", "int4")
# batch and tokens in the cache, or in the prompt
TASKS = {
    "decode": ((1, 16), (1, 2048), (1, 8192)),
    "aggregate": ((1, 8192), (2, 8192), (4, 8192), (8, 8192)),
    "prefill": ((1, 512),),
}
CACHE_CONTEXT = 8192


@dataclass(frozen=True)
class Engine:
    """A peer's engine and how to get it."""

    module: str
    needs: tuple[str, ...]
    install: str
    shapes: tuple[str, ...]
    precisions: tuple[str, ...]

    def absent(self) -> str | None:
        """What is missing, if anything."""
        missing = [name for name in self.needs if find_spec(name) is None]
        return f"{' and '.join(missing)} not installed; {self.install}" if missing else None


ENGINES = {
    "transformers": Engine(
        "hymba.bench.peers.hf", ("transformers",), "pip install 'hymba[peers]'", tuple(SHAPES), ("bfloat16",)
    ),
    "llama.cpp": Engine(
        "hymba.bench.peers.llama_cpp", ("llama_cpp", "gguf"),
        "CMAKE_ARGS=-DGGML_NATIVE=ON pip install 'hymba[peers]' (compiles llama.cpp, some minutes)",
        ("llama-1b", "llama-3b", "falcon-h1"), PRECISIONS,
    ),
}  # fmt: skip
PEERS = tuple(f"{engine}:{shape}" for engine, e in ENGINES.items() for shape in e.shapes)


@dataclass(frozen=True)
class Record(suite.Row):
    """One side of a comparison: medians, and what they are of."""

    against: str  # the peer that this ran in turn with, as in PEERS
    task: str
    engine: str  # hymba, or the peer's
    precision: str
    batch: int
    context: int
    setting: str  # the peer's, if it has a choice


@dataclass(frozen=True)
class Comparison:
    """Workloads that are timed in turn: Hymba in one or more precisions, and a peer."""

    task: str
    batch: int
    context: int
    setting: str  # the peer's
    precision: str  # the peer's
    ours: tuple[str, ...]  # our precisions


def plan(
    name: str, tasks: Iterable[str], precisions: tuple[str, ...], batches: tuple[int, ...] = ()
) -> list[Comparison]:
    """What is timed with one peer, models in turn.

    batches: of the task aggregate; empty: all of TASKS

    An engine that knows one precision is compared with Hymba in all `precisions`, another with Hymba in its own. The
    paper's aggregate throughput is a comparison with a transformer.
    """
    engine, shape = _resolve(name)
    settings = import_module(engine.module).settings(shape)
    alone = len(engine.precisions) == 1
    return [
        Comparison(task, batch, context, setting, precision, precisions if alone else (precision,))
        for precision in engine.precisions
        if alone or precision in precisions
        for task in tasks
        if task != "aggregate" or shape.kind == "llama"
        for batch, context in TASKS[task]
        if task != "aggregate" or not batches or batch in batches
        for setting in (settings if task != "prefill" else ("",))
    ]


def _resolve(name: str) -> tuple[Engine, Shape]:
    engine, shape = name.split(":")
    return ENGINES[engine], SHAPES[shape]


class Ours:
    """Hymba of random weights, one model for each precision, made when it is needed first."""

    def __init__(self, config: HymbaConfig):
        self.config = config
        self._models: dict[str, Hymba] = {}

    def model(self, precision: str) -> Hymba:
        if precision not in self._models:
            self._models[precision] = workloads.random_model(self.config, precision)
        return self._models[precision]

    def workload(self, precision: str, task: str, batch: int, context: int) -> Workload:
        model = self.model(precision)
        if task == "prefill":
            return workloads.prefill(model, precision, min(context, self.config.max_length), suite.CHUNK)
        return workloads.decoding(model, precision, batch, context, suite.STEPS)


def run(name: str, ours: Ours, comparisons: list[Comparison], repeats: int, done: Callable[[], object]) -> list[Record]:
    """Compare with one peer. Its models are loaded one after the other and freed before the next.

    done: called after each workload's run
    """
    engine, shape = _resolve(name)
    records = []
    for precision, group in groupby(comparisons, key=lambda c: c.precision):
        peer = import_module(engine.module).Peer(shape, precision)
        for c in group:
            works = {("hymba", p): ours.workload(p, c.task, c.batch, c.context) for p in c.ours}
            works[name.split(":")[0], precision] = (
                peer.prefill(c.context)
                if c.task == "prefill"
                else peer.decoding(c.batch, c.context, suite.STEPS, c.setting)
            )
            rows = suite.measure({" ".join(side): work for side, work in works.items()}, repeats, done)
            records += [
                Record(
                    **asdict(row), against=name, task=c.task, engine=side[0], precision=side[1], batch=c.batch,
                    context=c.context, setting=c.setting,
                )
                for side, row in zip(works, rows, strict=True)
            ]  # fmt: skip
            works.clear()  # the caches go before the next are made
        del peer
        gc.collect()  # models may hold themselves in a cycle
    return records


def versions() -> dict[str, str]:
    """Of the engines that are here."""
    return {name: import_module(e.module).VERSION for name, e in ENGINES.items() if not e.absent()}


def cache_bytes(ours: Ours) -> dict[str, object]:
    """Bytes of one sequence's cache as allocated: ours, and Llama-3.2-3B's by transformers or else by its formula."""
    context = min(CACHE_CONTEXT, ours.config.max_length)
    parts = ours.model("bfloat16").new_cache(1, context).bytes()
    if ENGINES["transformers"].absent():
        theirs = LLAMA_3B.kv_bytes(1, context, 2)
    else:
        theirs = import_module(ENGINES["transformers"].module).kv_bytes(SHAPES["llama-3b"], context)
    return {"context": context, "hymba": parts, LLAMA_3B.name: theirs}


def load(paths: Iterable[Path]) -> tuple[list[Record], dict[str, object] | None]:
    """Records and cache bytes from the JSON lines of several runs; where two measured the same, the later file counts.

    Raises `UserError` for files that hold no such line.
    """
    records: dict[tuple, Record] = {}
    cache = None
    for path in paths:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
        if not lines:
            raise UserError(f"{path}: no JSON line of `hymba bench peers` in it")
        for line in lines:
            try:
                found = json.loads(line)
                cache = found["cache"] or cache
                for row in found["rows"]:
                    record = Record(**row)
                    records[_place(record), record.setting, record.engine, record.precision] = record
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{path}: this JSON line is not one of `hymba bench peers`") from None
    return list(records.values()), cache


def _place(record: Record) -> tuple:
    return record.against, record.task, record.batch, record.context


def pairs(records: Iterable[Record]) -> Iterator[tuple[Record, list[Record]]]:
    """Each peer's record in its best setting, and Hymba's that were timed in turn with it."""
    best: dict[tuple, Record] = {}
    hymba: dict[tuple, list[Record]] = {}
    for record in records:
        if record.engine == "hymba":
            hymba.setdefault((_place(record), record.setting), []).append(record)
            continue
        place = _place(record), record.precision
        if place not in best or record.tokens_per_second > best[place].tokens_per_second:
            best[place] = record
    for peer in best.values():
        beside = hymba.get((_place(peer), peer.setting), [])
        if len(ENGINES[peer.engine].precisions) > 1:
            beside = [record for record in beside if record.precision == peer.precision]
        yield peer, beside


def tables(records: list[Record], cache: dict[str, object] | None, model: str) -> str:
    """Markdown: a table for each peer and task, the best aggregate throughputs, the caches."""
    lines: list[str] = []
    heading = None
    for peer, beside in pairs(records):
        _, shape = _resolve(peer.against)
        if heading != (peer.against, peer.task):
            heading = peer.against, peer.task
            lines += [
                "", f"**{model} and {shape.name} in {peer.engine}, {peer.task}**", "",
                "| | batch | context | tokens/s | ms/token (spread) | of the limit | GB/s probed | × peer |",
                "|---|---|---|---|---|---|---|---|",
            ]  # fmt: skip
        for record in (*beside, peer):
            name = model if record is not peer else f"{shape.name}{', ' * bool(peer.setting)}{peer.setting}"
            ratio = record.tokens_per_second / peer.tokens_per_second
            lines.append(
                f"| {name}, {record.precision} | {record.batch} | {record.context} | {record.tokens_per_second:.2f} "
                f"| {record.ms_per_token:.3g} ({record.fastest_ms:.3g}-{record.slowest_ms:.3g}) "
                f"| {record.share_of_limit:.0%} | {record.read_gb_per_second:.0f} | {ratio:.2f} |"
            )
    lines += _aggregates(records, model)
    if cache:
        lines += _caches(cache, model)
    return "\n".join(lines).strip()


def _aggregates(records: list[Record], model: str) -> Iterator[str]:
    """Throughput of all rows together at the batch that is best for each side."""
    found: dict[tuple, tuple[list[Record], list[Record]]] = {}
    for peer, beside in pairs([r for r in records if r.task == "aggregate"]):
        ours = [r for r in beside if r.precision == peer.precision]
        theirs, all_ours = found.setdefault((peer.against, peer.precision), ([], []))
        theirs.append(peer)
        all_ours.extend(ours)
    for (against, precision), (theirs, ours) in found.items():
        if not ours:
            continue
        a = max(ours, key=lambda r: r.tokens_per_second)
        b = max(theirs, key=lambda r: r.tokens_per_second)
        yield ""
        yield (
            f"Best aggregate in {precision}: {model} {a.tokens_per_second:.1f} tokens/s at batch {a.batch}, {against} "
            f"{b.tokens_per_second:.1f} at batch {b.batch}: {a.tokens_per_second / b.tokens_per_second:.2f} times."
        )


def _caches(cache: dict, model: str) -> Iterator[str]:
    parts, theirs = cache["hymba"], cache[LLAMA_3B.name]
    kv, states = parts["kv"], parts["kv"] + parts["conv"] + parts["ssm"]
    yield from (
        "", f"**Cache of one sequence of {cache['context']} tokens, bfloat16, as allocated**", "",
        "| | MB | times smaller |", "|---|---|---|",
        f"| {LLAMA_3B.name}, keys and values | {theirs / 1e6:.1f} | 1 |",
        f"| {model}, keys and values | {kv / 1e6:.1f} | {theirs / kv:.2f} |",
        f"| {model}, with conv and SSM states | {states / 1e6:.1f} | {theirs / states:.2f} |",
        f"| {model}, with the meta tokens' share, which all sequences use | {sum(parts.values()) / 1e6:.1f} "
        f"| {theirs / sum(parts.values()):.2f} |",
    )  # fmt: skip
