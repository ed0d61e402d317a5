"""The machine a run is on: devices, precision, memory, and what it can do at most."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress

import torch

from oneblock.errors import OneblockError
from oneblock.train.options import Loop


def use_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise OneblockError(f"no device {name!r} on this machine: use --device cpu") from None
    return device


# ------------------------------------------------------------------ precision


def precision(loop: Loop) -> torch.autocast:
    """Weights stay fp32; products are bf16 where that was asked for, or where the machine has instructions for it."""
    device = torch.device(loop.device).type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=product_dtype(loop) == torch.bfloat16)


def product_dtype(loop: Loop) -> torch.dtype:
    auto = loop.dtype == "auto" and has_bf16(torch.device(loop.device).type)
    return torch.bfloat16 if auto or loop.dtype == "bfloat16" else torch.float32


def has_bf16(device: str) -> bool:
    """Whether bf16 products are fast: on CPUs with AVX512-BF16 or AMX, on GPUs since Ampere."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    found = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    return device == "cpu" and any(ask() for ask in found if ask is not None)


# ------------------------------------------------------------------ memory


def peak_memory(device: torch.device) -> int:
    """Bytes: the most this process has held so far, on the GPU or, on CPUs, resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def total_memory(device: torch.device) -> int:
    """Bytes that a process of a run can have: of its GPU, or of what the system has free now for all that run here."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # as torchrun tells it


def _free_memory() -> int:
    with suppress(OSError, ValueError, StopIteration):
        with open("/proc/meminfo") as file:
            line = next(line for line in file if line.startswith("MemAvailable"))
        return min(int(line.split()[1]) * 1024, _group_limit())
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group_limit() -> int:
    """A container's own limit, where it has one."""
    with suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max") as file:
        return int(file.read())
    return sys.maxsize


# ------------------------------------------------------------------ speed


def peak_flops(device: torch.device, dtype: torch.dtype, size: int = 0) -> float:
    """Floating-point operations per second of a large square product, measured here and now: the best of a few."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
