"""Memory and time to load a checkpoint of random bfloat16 weights on the CPU, and to generate with it in a batch.

    python benchmarks/load_memory.py /some/folder            (1.5B: 3 GB of disk and of memory, about a minute)

The checkpoint is written tensor by tensor, and stays in the folder for the next run. A fresh process loads it: in its
own dtype the weights remain in the file's memory map. Peak memory is the kernel's VmHWM, which counts the pages of the
map. Prints one JSON line; exits with 1 if the peak exceeds the weights by more than 0.5 GB. Linux only.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ALLOWANCE = 500_000_000  # bytes beyond the weights: Python, PyTorch, activations, cache
PROMPTS = ["It is a truth universally acknowledged", "Emma was", "No one who had ever seen", "She", "The family of",
           "Sir Walter", "About thirty years ago", "It was"]  # fmt: skip


def build(folder: Path, preset: str) -> None:
    """Write config, random weights and a small tokenizer; no more than one tensor is held at a time."""
    import torch

    from hymba import Hymba, HymbaConfig, Tokenizer
    from hymba.convert import CONFIG_FILE, WEIGHTS_FILE, config_to_official, stored_parameters, to_official_shape
    from hymba.files import atomic_write

    config = HymbaConfig.preset(preset)
    with torch.device("meta"):
        model = Hymba(config).bfloat16()
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, official, x in stored_parameters(model):
        dtype, size = ("F32", 4) if name.endswith("A_log") else ("BF16", 2)
        start, end = end, end + x.numel() * size
        header[official] = {
            "dtype": dtype, "shape": list(to_official_shape(name, x).shape), "data_offsets": [start, end]
        }  # fmt: skip
    free = shutil.disk_usage(folder).free
    if free < 1.1 * end:
        sys.exit(f"{folder} has {free / 1e9:.1f} GB free, the checkpoint takes {end / 1e9:.1f} GB")
    generator = torch.Generator().manual_seed(0)
    with atomic_write(folder / WEIGHTS_FILE) as temporary, open(temporary, "wb") as file:
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for name, _, like in stored_parameters(model):
            if name.endswith("A_log"):
                x = torch.arange(1, config.d_state + 1).log().expand(like.shape).contiguous()
            elif "norm" in name or name.endswith(".D"):
                x = torch.ones(like.shape, dtype=like.dtype)
            else:
                x = (torch.randn(like.shape, generator=generator) * config.init_std).to(like.dtype)
            file.write(x.view(torch.uint8).numpy())
    Tokenizer.train(PROMPTS, 300).save_pretrained(folder)
    with atomic_write(folder / CONFIG_FILE) as temporary:  # last: a folder that has it is whole
        temporary.write_text(json.dumps(config_to_official(config, torch.bfloat16), indent=2))


def measure(folder: Path, new_tokens: int, max_length: int) -> dict:
    """In a fresh process: memory after the imports, after loading, after reading every weight, after generating."""
    import torch

    import hymba

    hymba.Hymba, hymba.LLM  # noqa: B018  imports them
    result = {"imports": memory()}
    start = time.perf_counter()
    model = hymba.Hymba.from_pretrained(folder, device="cpu")
    seconds = time.perf_counter() - start
    result |= {"load_seconds": seconds, "load": memory(), "weights_bytes": sum(x.nbytes for x in model.parameters())}
    total = sum(float(x.detach().sum()) for x in model.parameters())  # brings in every page, as a forward pass does
    assert total == total, "a weight is not a number"
    result["read"] = memory()
    del model  # and its map with it; the peak remains
    start = time.perf_counter()
    llm = hymba.LLM(folder, device="cpu", max_batch=len(PROMPTS), max_length=max_length)
    result["llm_seconds"] = time.perf_counter() - start
    start = time.perf_counter()
    outputs = llm.generate(PROMPTS, hymba.SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True))
    result |= {
        "generate_seconds": time.perf_counter() - start,
        "generate": memory(),
        "new_tokens": sum(len(output.token_ids) for output in outputs),
        "batch": len(outputs),
        "threads": torch.get_num_threads(),
    }
    return result


def memory() -> dict[str, int]:
    """Bytes: the peak until now, and what is resident now, of our own and of mapped files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"peak": "VmHWM", "own": "RssAnon", "mapped": "RssFile"}
    return {name: int(status[field].split()[0]) * 1024 for name, field in names.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoint is, or is to be written")
    parser.add_argument("--preset", default="1.5B", help="the model's size")
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens to generate for each of 8 prompts")
    parser.add_argument("--max-length", type=int, default=256, help="tokens that a row of the cache holds")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.folder, args.new_tokens, args.max_length)))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "config.json").exists():
        build(args.folder, args.preset)
    child = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--measure"], stdout=subprocess.PIPE, check=True)
    result = json.loads(child.stdout)
    excess = result["generate"]["peak"] - result["weights_bytes"]
    import torch

    from hymba import __version__

    machine = {"hymba": __version__, "torch": torch.__version__, "python": platform.python_version()}
    result |= {"preset": args.preset, "excess_bytes": excess, "within_allowance": excess <= ALLOWANCE, **machine}
    print(json.dumps(result))
    sys.exit(0 if excess <= ALLOWANCE else 1)


if __name__ == "__main__":
    main()
