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
    arguments: list[Tensor | int | None],
) -> None:  # fmt: skip
    """Run a kernel on the stream and device of its tensors. Integers are 32 bits wide in the kernel's signature;
    shared: bytes of dynamic shared memory"""
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    with torch.cuda.device(device):
        function = _function(file, name, tuple(sorted(macros.items())), shared, device.index)
        values = [
            ctypes.c_uint32(x) if isinstance(x, int) else ctypes.c_void_p(0 if x is None else x.data_ptr())
            for x in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        _require(
            _libraries()[1].cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, shared, stream, pointers, None),
            f"launching {name}:",
        )


def _require(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what} a CUDA kernel failed with the driver's error {status}")
