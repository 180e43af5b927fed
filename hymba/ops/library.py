"""Finds and loads the native kernels, a shared library with a plain C interface (`hymba/csrc`).

The library holds each kernel for several instruction sets; the best one that this processor runs is taken, or the one
that the environment variable HYMBA_ISA names (tests). HYMBA_LIBRARY names another library file.
"""

import ctypes
import os
import struct
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

import torch

from hymba.errors import UserError

# element types as the kernels number them (csrc/isa.h)
DTYPES = {torch.float32: 0, torch.bfloat16: 1}

_isa: str | None = None


def path() -> Path | None:
    """The library's file; None if the package was installed without it."""
    if os.environ.get("HYMBA_LIBRARY"):
        return Path(os.environ["HYMBA_LIBRARY"])
    here = Path(__file__).parent
    return next((file for file in (here / "libhymba.so", here / "libhymba.dylib") if file.exists()), None)


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | str:
    """The loaded library, or in one sentence why there is none."""
    file = path()
    if file is None:
        return (
            "the package was installed without its native library, because no C++ compiler was found: install g++ or "
            "clang++ and then run `python -m hymba.csrc.build`"
        )
    try:
        library = ctypes.CDLL(str(file))
        library.hymba_isas.restype = ctypes.c_char_p
        library.hymba_use_openmp.argtypes = (ctypes.c_void_p,) * 3
        library.hymba_use_openmp(*_openmp())
    except (OSError, AttributeError) as error:
        return f"the native library {file} cannot be loaded: {error}"
    return library


def _openmp() -> tuple[int | None, int | None, int | None]:
    """Entry points of the GNU OpenMP runtime that PyTorch has loaded, Nones without it; csrc/threads.h says why."""
    try:
        with open("/proc/self/maps") as maps:
            file = next((line.split()[-1] for line in maps if "libgomp" in line), None)
        if file is None:
            return None, None, None
        runtime = ctypes.CDLL(file)
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        parallel, thread, threads = (ctypes.cast(getattr(runtime, name), ctypes.c_void_p).value for name in names)
        return parallel, thread, threads
    except (OSError, AttributeError):
        return None, None, None


def available() -> bool:
    return not isinstance(load(), str)


def status() -> str:
    """One line for people: which library and instruction set are used, or why none is."""
    library = load()
    return library if isinstance(library, str) else f"{path()} ({isa()})"


def isas() -> tuple[str, ...]:
    """The instruction sets that the library and this processor have, best first."""
    library = load()
    if isinstance(library, str):
        return ()
    # a compiler that does not know an instruction set left it out
    return tuple(x for x in library.hymba_isas().decode().split() if hasattr(library, f"hymba_vector_width_{x}"))


def isa() -> str:
    """The instruction set in use. Raises `UserError` if HYMBA_ISA names one that is not there."""
    return _isa or use_isa(os.environ.get("HYMBA_ISA") or isas()[0])


def use_isa(name: str) -> str:
    """Take kernels for this instruction set from now on. Raises `UserError` for one that is not there."""
    global _isa
    if name not in isas():
        raise UserError(f"instruction set {name!r} is not available; choose from {', '.join(isas()) or 'none'}")
    kernel.cache_clear()
    _isa = name
    return name


@cache
def kernel(name: str) -> Callable[[bytes], None]:
    """The C function hymba_<name>_<isa>; it takes one packed struct, see `pack`, and releases the GIL."""
    library = load()
    if isinstance(library, str):
        raise RuntimeError(library)
    function = getattr(library, f"hymba_{name}_{isa()}")
    function.argtypes, function.restype = (ctypes.c_char_p,), None
    return function


@cache
def _packer(layout: str) -> Callable[..., bytes]:
    return struct.Struct(layout).pack


def call(name: str, *values: int | float) -> None:
    """Run a kernel. values: the fields of its argument struct, int for pointers and int64_t, float for double"""
    layout = "".join(["d" if type(value) is float else "q" for value in values])
    kernel(name)(_packer(layout)(*values))


@cache
def _vector_width(isa: str) -> int:
    width = ctypes.c_int64()
    getattr(load(), f"hymba_vector_width_{isa}")(ctypes.byref(width))
    return width.value


def vector_width() -> int:
    """Floats in a vector of the instruction set in use."""
    return _vector_width(isa())


def pointer(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def threads() -> int:
    return torch.get_num_threads()
