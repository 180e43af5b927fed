"""All analyses of a model, as one dict of plain numbers: what `analysis.json` holds and the figures are made of."""

from collections.abc import Callable, Collection
from dataclasses import asdict
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from hymba import cost
from hymba.analysis import ANALYSES, texts
from hymba.analysis.attention import CATEGORIES, AttentionMeter
from hymba.analysis.branches import BRANCHES, OutputMeter, bits, gates, has_branch, without
from hymba.analysis.memory import MemoryMeter, influence, reach, receptive_field
from hymba.analysis.observe import LayerListener, observe
from hymba.errors import UserError
from hymba.model.hymba import Hymba
from hymba.tokenizer import Tokenizer

PROBES = 2  # random directions for the receptive field, a row
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
RECEPTIVE_SHARE = 0.9  # of the influence lies within the effective receptive field
CACHE_BYTES_PER_NUMBER = 2  # as in the paper, whatever the dtype here


def analyze(
    model: Hymba,
    tokenizer: Tokenizer,
    text: str | None = None,
    *,
    only: Collection[str] = ANALYSES,
    rows: int = 4,
    length: int = 1024,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run the analyses `only` on the beginning of `text`, cut into `rows` rows of `length` tokens.

    text: None is Austen's prose; `meta` reads prose, numbers and code whatever it is. advance: called after each of
    `passes(...)` passes over a row. What is returned is described in docs/analysis.md. An analysis that the model has
    nothing for (attention in a pure Mamba, meta tokens where there are none) is left out.
    Raises `UserError` for an unknown analysis or a text that is too short.
    """
    for name in only:
        if name not in ANALYSES:
            raise UserError(f"unknown analysis {name!r}; choose from {', '.join(ANALYSES)}")
    ids = _encode(model, tokenizer, texts.prose() if text is None else text, rows, length)
    c = model.config
    found: dict[str, Any] = {
        "config": asdict(c),
        "parameters": sum(cost.parameters(c).values()),
        "global_layers": _global_layers(model),
        "cache_bytes": _cache_bytes(model, ids.shape[1]),
        "text": {"rows": ids.shape[0], "length": ids.shape[1], "bytes": texts.text_bytes(tokenizer, ids)},
    }
    training = model.training
    model.eval()
    try:
        found |= _read(model, ids, only, found["text"]["bytes"], advance)
        if "meta" in only and _attends_to_meta_tokens(model):
            kinds = {kind: _encode(model, tokenizer, make(), 1, length) for kind, make in texts.KINDS.items()}
            found["meta"] = _meta_tokens(model, kinds, advance)
        if "importance" in only:
            found["importance"] = _importance(model, ids, found["bits_per_byte"], found["text"]["bytes"], advance)
        if "receptive-field" in only:
            found["receptive-field"] = _receptive_field(model, ids, advance)
    finally:
        model.train(training)
    return found


def passes(model: Hymba, only: Collection[str], rows: int) -> int:
    """How often `analyze` calls `advance`, if the text fills `rows` rows."""
    count = rows * bool({"attention", "magnitudes", "memory", "importance"} & set(only))
    count += len(texts.KINDS) * ("meta" in only and _attends_to_meta_tokens(model))
    count += rows * len(_removals(model)) * ("importance" in only)
    return count + rows * PROBES * ("receptive-field" in only)


def _attends_to_meta_tokens(model: Hymba) -> bool:
    return model.config.n_meta > 0 and any(plan.attends for plan in model.config.layers)


def _encode(model: Hymba, tokenizer: Tokenizer, text: str, rows: int, length: int) -> Tensor:
    ids = texts.encode(tokenizer, text, rows, min(length, model.config.max_length))
    return ids.to(model.meta_tokens.device)


def _global_layers(model: Hymba) -> list[int]:
    """Layers with full attention, in a model that has a window elsewhere."""
    plans = [plan for plan in model.config.layers if plan.attends]
    full = [plan.index for plan in plans if plan.window is None]
    return full if len(full) < len(plans) else []


def _cache_bytes(model: Hymba, length: int) -> int:
    parts = cost.cache_bytes(model.config, 1, length, CACHE_BYTES_PER_NUMBER)
    return parts["kv"] + parts["conv"] + parts["ssm"]


def _read(model: Hymba, ids: Tensor, only: Collection[str], size: int, advance: Callable[[], None]) -> dict[str, Any]:
    """What one pass over the text shows: the loss, and whatever the meters hear."""
    attention, outputs, memory = AttentionMeter(), OutputMeter(), MemoryMeter()
    meters: dict[str, LayerListener] = {"attention": attention, "magnitudes": outputs, "memory": memory}
    listeners = [meter for name, meter in meters.items() if name in only]
    if not listeners and "importance" not in only:
        return {}
    with observe(model, *listeners):
        found: dict[str, Any] = {"bits_per_byte": bits(model, ids, advance) / size}
    if attention.layers:
        mass = attention.mass()
        found["attention"] = {
            "layers": attention.layers,
            "mass": {category: _plain(mass[:, :, i]) for i, category in enumerate(CATEGORIES)},
            "entropy": _plain(attention.entropy()),
            "uniform_entropy": _plain(attention.uniform_entropy()),
        }
    if "magnitudes" in only:
        found["magnitudes"] = {name: _magnitudes(model, outputs, name) for name in BRANCHES if outputs.outputs(name)}
    if lengths := memory.lengths():
        channels = [length.max(dim=1).values for length in lengths.values()]  # the slowest state; (E,) or (S,) a layer
        found["memory"] = {
            "layers": list(lengths),
            "channels": [_plain(channel, digits=4) for channel in channels],
            "quantiles": {str(q): [_number(float(channel.quantile(q))) for channel in channels] for q in QUANTILES},
        }
    return found


def _magnitudes(model: Hymba, outputs: OutputMeter, name: str) -> dict[str, Any]:
    sizes, weights = outputs.outputs(name), gates(model, name)
    found: dict[str, Any] = {"layers": list(sizes), "output": _plain(torch.tensor(list(sizes.values())))}
    if weights:
        gate = torch.stack(list(weights.values())).double()  # (L, E)
        found["gate"] = {
            "layers": list(weights),
            "mean": _plain(gate.mean(1)),
            "quantiles": {str(q): _plain(gate.quantile(q, dim=1)) for q in QUANTILES},
        }
    return found


@torch.no_grad()
def _meta_tokens(model: Hymba, kinds: dict[str, Tensor], advance: Callable[[], None]) -> dict[str, Any]:
    shares: dict[str, Tensor] = {}
    for kind, ids in kinds.items():
        meter = AttentionMeter()
        with observe(model, meter):
            model.hidden(ids)
        advance()
        shares[kind] = meter.meta_tokens().mean(1)  # (L, M)
    profiles = {kind: share.mean(0) / share.sum(-1).mean() for kind, share in shares.items()}
    return {
        "layers": meter.layers,
        "shares": {kind: _plain(share) for kind, share in shares.items()},
        "overlap": {
            f"{a} and {b}": float(torch.minimum(profiles[a], profiles[b]).sum()) for a, b in combinations(kinds, 2)
        },
    }


def _removals(model: Hymba) -> list[tuple[int, str]]:
    """Every branch of every layer that can be removed."""
    layers = range(model.config.n_layers)
    return [(layer, name) for name in BRANCHES for layer in layers if has_branch(model, layer, name)]


def _importance(model: Hymba, ids: Tensor, base: float, size: int, advance: Callable[[], None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for layer, name in _removals(model):
        with without(model, layer, name):
            change = bits(model, ids, advance) / size - base
        part = found.setdefault(name, {"layers": [], "change": []})
        part["layers"].append(layer)
        part["change"].append(_number(change))
    return found


def _receptive_field(model: Hymba, ids: Tensor, advance: Callable[[], None]) -> dict[str, Any]:
    sizes = influence(model, ids, PROBES, advance=advance)
    share = sizes / sizes.sum()
    return {
        "share": _plain(share),
        "effective": receptive_field(share, RECEPTIVE_SHARE),
        "mean_distance": float((share * torch.arange(len(share))).sum()),
        "reach": reach(share),
    }


def _plain(x: Tensor, digits: int = 6) -> list:
    """Nested lists of numbers, rounded, for JSON."""
    return [_plain(item, digits) if item.dim() else _number(float(item), digits) for item in x]


def _number(x: float, digits: int = 6) -> float:
    return float(f"{x:.{digits}g}")
