"""Compile the native kernels into one shared library. `setup.py` calls it; by hand:

    python hymba/csrc/build.py                              # -> hymba/ops/libhymba.so
    python hymba/csrc/build.py --output /some/libhymba.so --flags "-g -fsanitize=address"
    CXX=aarch64-linux-gnu-g++ python hymba/csrc/build.py --output arm64/libhymba.so --objects arm64

Needs g++ or clang++ (or $CXX) and nothing else. Kernel files are compiled once for each instruction set of the
compiler's target, if it knows that one; the files in `ONCE` only once. The library chooses among them when it runs, so
it is not tied to the processor that built it.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).resolve().parent
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
DEFAULT_OUTPUT = SOURCE.parent / "ops" / f"libhymba{SUFFIX}"
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC 12 warns of its own AVX-512 header
    "-Wno-unknown-warning-option",  # clang does not know all of these
]
ONCE = ("threads.cpp",)
_AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512"
_AVX512_BF16 = f"{_AVX512} -mavx512bf16 -mavx512vnni"
# the baseline comes first: should two copies of an inline function ever meet, the linker keeps the one that always runs
ISAS = {
    "x86_64": {
        "baseline": "",
        "avx2": "-mavx2 -mfma -mf16c",
        "avx512": _AVX512,
        "avx512_bf16": _AVX512_BF16,
        "amx": f"{_AVX512_BF16} -mamx-tile -mamx-int8 -mamx-bf16",
    },
}


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, else the first of c++, g++, clang++; None if there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((name for name in names if shutil.which(shlex.split(name)[0])), None)


def build(
    output: Path = DEFAULT_OUTPUT, objects: Path | None = None, flags: str = "", compiler: str | None = None
) -> Path:
    """Compile and link -> the library's path. Objects that are newer than their sources are kept.

    Raises `RuntimeError` with the compiler's message if there is no compiler or it fails.
    """
    compiler = compiler or find_compiler()
    if sys.platform == "win32" or compiler is None:
        raise RuntimeError("no C++ compiler: install g++ or clang++, or set CXX")
    command = shlex.split(compiler)
    objects = objects or SOURCE.parent.parent / "build" / "native"
    objects.mkdir(parents=True, exist_ok=True)
    # the compiler's word, not the running machine's: it may be a cross compiler
    machine = _run([*command, "-dumpmachine"]).split("-")[0].replace("amd64", "x86_64")
    extra = shlex.split(flags)
    jobs = []
    for isa, isa_flags in ISAS.get(machine, {"baseline": ""}).items():
        if isa_flags and not _accepts([*command, *isa_flags.split()]):
            _show(f"left out: {isa} kernels, whose flags {command[0]} does not know")
            continue
        for source in sorted(SOURCE.glob("*.cpp")):
            if source.name not in ONCE:
                jobs.append((source, objects / f"{source.stem}.{isa}.o", isa_flags.split()))
    jobs += [(SOURCE / name, objects / f"{Path(name).stem}.o", []) for name in ONCE]
    newest_header = max(path.stat().st_mtime for path in (*SOURCE.glob("*.h"), Path(__file__)))

    def compile_one(job: tuple[Path, Path, list[str]]) -> None:
        source, target, isa_flags = job
        needed = max(newest_header, source.stat().st_mtime)
        if not target.exists() or target.stat().st_mtime < needed:
            _show(_run([*command, *FLAGS, *isa_flags, *extra, "-c", str(source), "-o", str(target)]))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, jobs))
    # written aside and renamed: a running process keeps the library that it has mapped
    part = output.with_name(f"{output.name}.{os.getpid()}")
    _show(_run([*command, "-shared", "-pthread", *extra, *(str(target) for _, target, _ in jobs), "-o", str(part)]))
    part.replace(output)
    return output


def _run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout[-4000:]}")
    return done.stdout


def _accepts(command: list[str]) -> bool:
    """Whether the compiler knows these flags; AMX needs GCC 11 or Clang 12."""
    try:
        _run([*command, "-fsyntax-only", "-x", "c++", os.devnull])
    except RuntimeError:
        return False
    return True


def _show(warnings: str) -> None:
    if warnings:
        print(warnings, file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compile the native kernels.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--objects", type=Path, help="folder for object files (default: build/native)")
    parser.add_argument("--flags", default="", help="more flags for compiler and linker")
    arguments = parser.parse_args()
    print(build(arguments.output, arguments.objects, arguments.flags))
