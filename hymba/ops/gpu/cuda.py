"""Kernels in CUDA C++: compiled for the card at hand when they are first called, by NVRTC, the compiler that PyTorch's
builds for CUDA bring along, and launched through the driver. No toolkit, nothing to install.
"""

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

# CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, and .._PREFERRED_SHARED_MEMORY_CARVEOUT in percent
_MAX_DYNAMIC_SHARED, _CARVEOUT = 8, 9
_OVERLAP = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, for those with an integer in the union of 64 bytes"""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _Launch(ctypes.Structure):
    """CUlaunchConfig"""

    _fields_ = (
        ("blocks", ctypes.c_uint * 3), ("threads", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("attribute_count", ctypes.c_uint),
    )  # fmt: skip


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether this machine's PyTorch can compile kernels for its card."""
    major, minor = torch.cuda.get_device_capability()
    try:
        compiled('extern "C" __global__ void nothing() {}', [f"-arch=sm_{major}{minor}"])
    except (OSError, AttributeError, RuntimeError):
        return False
    return True


@lru_cache(maxsize=1)
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """NVRTC and the driver."""
    name = f"libnvrtc.so.{torch.version.cuda.partition('.')[0]}"
    try:  # PyTorch has loaded it, or the system finds it
        nvrtc = ctypes.CDLL(name)
    except OSError:
        wheels = sorted(Path(torch.__file__).parents[1].glob(f"nvidia/*/lib/{name}"))
        nvrtc = ctypes.CDLL(str(wheels[0]) if wheels else name)
    return nvrtc, ctypes.CDLL("libcuda.so.1")


def compiled(source: str, options: list[str]) -> bytes:
    """Machine code of CUDA C++."""
    nvrtc, _ = _libraries()
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"hymba.cu", 0, None, None)
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), given):
            size = ctypes.c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"a CUDA kernel does not compile: {log.value.decode()}")
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@lru_cache
def _function(file: Path, name: str, macros: tuple[tuple[str, int], ...], shared: int, device: int) -> ctypes.c_void_p:
    """A kernel of a source file, on the current device, which must be `device`."""
    major, minor = torch.cuda.get_device_capability(device)
    options = [f"-arch=sm_{major}{minor}", "-std=c++17", *(f"-D{key}={value}" for key, value in macros)]
    driver, module, function = _libraries()[1], ctypes.c_void_p(), ctypes.c_void_p()
    code = compiled(file.read_text(), options)
    _require(driver.cuModuleLoadData(ctypes.byref(module), code), "loading")
    _require(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), "finding")
    for attribute, wanted in ((_MAX_DYNAMIC_SHARED, shared), (_CARVEOUT, 100)):
        _require(driver.cuFuncSetAttribute(function, attribute, wanted), "giving shared memory to")
    return function


def launch(
    file: Path, name: str, macros: dict[str, int], blocks: int, threads: int, shared: int,
    arguments: list[Tensor | int | float | None], overlap: bool = False,
) -> None:  # fmt: skip
    """Run a kernel on the stream and device of its tensors. Numbers are 32 bits wide in the kernel's signature;
    shared: bytes of dynamic shared memory; overlap: with the kernel before it, as `common.overlap`"""
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    with torch.cuda.device(device):
        function = _function(file, name, tuple(sorted(macros.items())), shared, device.index)
        values = [as_argument(x) for x in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        how = _Launch(
            (blocks, 1, 1), (threads, 1, 1), shared, torch.cuda.current_stream(device).cuda_stream,
            ctypes.pointer(_Attribute(id=_OVERLAP, value=1)), int(overlap),
        )  # fmt: skip
        _require(_libraries()[1].cuLaunchKernelEx(ctypes.byref(how), function, pointers, None), f"launching {name}:")


def as_argument(x: Tensor | int | float | None) -> ctypes.c_uint32 | ctypes.c_float | ctypes.c_void_p:
    """As a kernel takes it: a tensor by its address, a number with 32 bits"""
    if isinstance(x, int):
        return ctypes.c_uint32(x)
    return ctypes.c_float(x) if isinstance(x, float) else ctypes.c_void_p(0 if x is None else x.data_ptr())


def _require(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what} a CUDA kernel failed with the driver's error {status}")
