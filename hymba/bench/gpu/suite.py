"""All sections in turn, and what Hymba's figures are beside those of its peers."""

import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from hymba.bench.gpu import check, kernels, measure, models, operators, peers
from hymba.errors import UserError


def require_gpu() -> None:
    """Raises `UserError` if there is no GPU that our kernels run on."""
    from hymba import ops

    if not torch.cuda.is_available():
        raise UserError("hymba bench gpu needs a CUDA GPU, and PyTorch finds none; for a CPU: hymba bench")
    if "gpu" not in ops.BACKENDS:
        raise UserError("hymba bench gpu needs the package `triton`: pip install triton")


# sections in turn, and by which share of the time each must have ended: what one leaves, the next ones have
ENDS = {"check": 0.2, "kernels": 0.36, "decode": 0.45, "prefill": 0.52, "train": 0.74, "operators": 0.75, "peers": 1.0}


def run(sections: list[str], batches: list[int], seconds: float) -> dict:
    """Measure and print -> everything that was measured. After `seconds` nothing new is begun."""
    began = time.perf_counter()
    report: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(), **_versions(), "commit": _commit(), "seconds": {},
    }  # fmt: skip
    print(", ".join(f"{name} {report[name]}" for name in ("gpu", *_versions(), "commit")), flush=True)
    # correctness comes before anything is timed, the limits too
    works: dict[str, Callable[[float], object]] = {
        "check": lambda _: check.check(),
        "kernels": lambda deadline: kernels.kernels(_limits(report), deadline),
        "decode": lambda deadline: models.decode(batches, _limits(report), deadline),
        "prefill": lambda deadline: models.prefill(_limits(report), deadline),
        "train": lambda deadline: models.train(_limits(report), deadline),
        "operators": lambda _: operators.operators(),
        "peers": lambda deadline: peers.peers(batches, deadline),
    }
    for name, work in works.items():
        if name not in sections:
            continue
        started = time.perf_counter()
        if started - began > seconds:
            print(f"{name}: left out, the time is up")
            continue
        print(f"{name} (after {started - began:.0f} s)", flush=True)
        try:
            report[name] = work(began + ENDS[name] * seconds)
        except UserError:
            raise
        except Exception as error:  # one section must not cost the others
            report[name] = f"{type(error).__name__}: {error}"
            print(f"  failed: {type(error).__name__} {str(error)[:1500]}", flush=True)
        report["seconds"][name] = time.perf_counter() - started
        measure.free()
    report["against"] = compared(report)
    for name, row in report["against"].items():
        print(f"against {name}: {measure.shown(row)}")
    print(f"all of it took {time.perf_counter() - began:.0f} s", flush=True)
    return report


def _limits(report: dict) -> dict[str, float]:
    """Of the card, measured once."""
    if "limits" not in report:
        report["limits"] = limit = measure.limits()
        measure.free()
        print(f"  limits: copy {limit['copy'] / 1e12:.2f} TB/s, bfloat16 product {limit['product'] / 1e12:.0f} TFLOP/s",
              flush=True)  # fmt: skip
    return report["limits"]


def compared(report: dict) -> dict[str, dict[str, float]]:
    """Ours beside each peer: best throughput of each, at one row, of prompts; bytes of a row's cache, and of its keys
    and values alone, theirs over ours."""
    ours, theirs = report.get("decode"), report.get("peers")
    if not (isinstance(ours, list) and ours and isinstance(theirs, dict)):
        return {}
    mine, table = {row["batch"]: row for row in ours}, {}
    prompts = report.get("prefill")
    prompt = next((row for row in prompts if row["batch"] == 1), None) if isinstance(prompts, list) else None
    for name, peer in theirs.items():
        rows = {row["batch"]: row for row in peer["decode"] if row["batch"]}
        if not rows:
            continue
        best = max(rows.values(), key=lambda row: row["tokens/s"])
        table[name] = row = {
            "throughput": max(row["tokens/s"] for row in ours) / best["tokens/s"],
            "cache": best["cache MB a row"] / ours[0]["cache MB a row"],
        }
        if best["KV MB a row"]:
            row["keys and values"] = best["KV MB a row"] / ours[0]["KV MB a row"]
        if 1 in rows and 1 in mine:
            row["throughput at batch 1"] = mine[1]["tokens/s"] / rows[1]["tokens/s"]
        if peer["prefill"] and prompt:
            row["prefill"] = prompt["tokens/s"] / peer["prefill"]["tokens/s"]
    return table


def _versions() -> dict[str, str]:
    found = {"torch": torch.__version__}
    for name in ("triton", "transformers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _commit() -> str:
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
