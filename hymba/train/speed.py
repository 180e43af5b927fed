"""How fast the machine could be: the peak that model FLOPs utilisation (MFU; PaLM, arXiv 2204.02311) is a share of."""

import time
from functools import lru_cache

import torch

# dense bfloat16 operations a second as the makers state them
GPU_PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
GEMM_REPEATS = 5


def peak_operations(device: torch.device, precision: str) -> float:
    """Operations a second of the device's matrix products: from the table, or else the fastest product measured now."""
    dtype = getattr(torch, precision)
    if device.type != "cuda":  # others may share it: the next measurement may find more
        return _fastest_product(device, dtype)
    name = torch.cuda.get_device_name(device)
    for known, peak in GPU_PEAKS.items():
        if dtype is torch.bfloat16 and known in name:
            return peak
    return _measured_once(device, dtype)


def _fastest_product(device: torch.device, dtype: torch.dtype) -> float:
    n = GEMM_SIZE.get(device.type, 2048)
    a = torch.ones(n, n, dtype=dtype, device=device)
    fastest = float("inf")
    for _ in range(GEMM_REPEATS + 1):  # the first one warms up
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * n**3 / fastest


_measured_once = lru_cache(_fastest_product)
