"""`hymba doctor`"""

import json
import os
import platform
from importlib import metadata

import click

PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "huggingface_hub", "jinja2", "click", "rich", "triton")
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "bf16", "i8mm")


@click.command(epilog="\b\nExample:\n  hymba doctor --json")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Show what this machine offers, which backend computes what, and why a fast path is off."""
    facts = examine()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in facts.items():
        text = value if isinstance(value, str) else "\n".join(f"{key}: {entry}" for key, entry in value.items())
        table.add_row(name, text)
    Console().print(table)


def examine() -> dict[str, str | dict[str, str]]:
    """What `hymba doctor` shows."""
    import torch

    from hymba import __version__, ops

    return {
        "hymba": __version__,
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "processor": _processor(),
        "memory": _memory(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "GPU": _gpus(torch),
        "dtypes": _dtypes(torch),
        "backends": ops.describe(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _processor() -> str:
    name, features = platform.processor() or platform.machine(), []
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = dict(line.rstrip("\n").split("\t: ", 1) for line in file if "\t: " in line)
        name = lines.get("model name", name)
        present = lines.get("flags\t", lines.get("flags", lines.get("Features", ""))).split()
        features = [feature for feature in CPU_FEATURES if feature in present]
    except OSError:
        pass  # not Linux: the name is all there is
    return f"{name} ({', '.join(features) if features else 'features unknown'})"


def _memory() -> str:
    try:
        pages = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_AVPHYS_PAGES")
        total, free = (n * os.sysconf("SC_PAGE_SIZE") / 2**30 for n in pages)
    except (AttributeError, ValueError, OSError):
        return "unknown"
    return f"{total:.1f} GiB, {free:.1f} GiB free"


def _gpus(torch) -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"none: this PyTorch ({torch.__version__}) is built for the CPU; setup.sh picks a CUDA build"
    if not torch.cuda.is_available():
        return f"none: PyTorch {torch.__version__} finds no device or driver"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _dtypes(torch) -> dict[str, str]:
    """A product of each type is tried, not looked up."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        works = []
        for device in devices:
            try:
                x = torch.ones(2, 2, dtype=dtype, device=device)
                works += [device] if bool((x @ x == 2).all()) else []
            except RuntimeError:
                pass
        found[str(dtype).removeprefix("torch.")] = ", ".join(works) or "not here"
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
