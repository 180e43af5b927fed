"""All sections in turn, and what Hymba's figures are beside those of its peers."""

import subprocess
import time

import torch

from hymba.bench.gpu import check, kernels, measure, models, peers
from hymba.errors import UserError


def require_gpu() -> None:
    """Raises `UserError` if there is no GPU that our kernels run on."""
    from hymba import ops

    if not torch.cuda.is_available():
        raise UserError("hymba bench gpu needs a CUDA GPU, and PyTorch finds none; for a CPU: hymba bench")
    if "gpu" not in ops.BACKENDS:
        raise UserError("hymba bench gpu needs the package `triton`: pip install triton")


def run(sections: list[str], batches: list[int], seconds: float) -> dict:
    """Measure and print -> everything that was measured. Sections that would begin after `seconds` are left out."""
    deadline = time.perf_counter() + seconds
    report: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": _commit(),
    }  # fmt: skip
    report["limits"] = limit = measure.limits()
    measure.free()
    print(f"{report['gpu']}, PyTorch {torch.__version__}: copy {limit['copy'] / 1e12:.2f} TB/s, read "
          f"{limit['read'] / 1e12:.2f} TB/s, bfloat16 product {limit['product'] / 1e12:.0f} TFLOP/s",
          flush=True)  # fmt: skip
    works = {
        "check": check.check, "kernels": lambda: kernels.kernels(limit),
        "decode": lambda: models.decode(batches, limit), "prefill": lambda: models.prefill(limit),
        "peers": lambda: peers.peers(batches, deadline), "train": lambda: models.train(limit, deadline),
    }  # fmt: skip
    for name, work in works.items():
        if name not in sections:
            continue
        if time.perf_counter() > deadline:
            print(f"{name}: left out, the time is up")
            continue
        print(name, flush=True)
        try:
            report[name] = work()
        except UserError:
            raise
        except Exception as error:  # one section must not cost the others
            report[name] = f"{type(error).__name__}: {error}"
            print(f"  failed: {type(error).__name__} {str(error)[:1500]}", flush=True)
        measure.free()
    report["against"] = compared(report.get("decode"), report.get("peers"))
    for name, row in report["against"].items():
        print(f"against {name}: {measure.shown(row)}")
    return report


def compared(ours: object, theirs: object) -> dict[str, dict[str, float]]:
    """Best throughput and largest cache: ours over that of each peer, theirs over ours."""
    if not (isinstance(ours, list) and ours and isinstance(theirs, dict)):
        return {}
    return {
        name: {
            "throughput": max(row["tokens/s"] for row in ours) / max(row["tokens/s"] for row in rows),
            "cache": max(row["cache MB a row"] for row in rows) / max(row["cache MB a row"] for row in ours),
        }
        for name, rows in theirs.items()
        if rows and all(row["batch"] for row in rows)
    }


def _commit() -> str:
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
