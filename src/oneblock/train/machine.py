"""Devices, autocast dtype, memory and peak FLOP/s of the machine."""

from __future__ import annotations

import os
import sys
import time

import torch

from oneblock.errors import OneblockError
from oneblock.kernels.huge_pages import free_memory
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
    """The autocast context of a step: weights are fp32, matmuls bf16 if requested or fast on this hardware."""
    device = torch.device(loop.device).type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=product_dtype(loop) == torch.bfloat16)


def product_dtype(loop: Loop) -> torch.dtype:
    """The dtype of matmuls."""
    auto = loop.dtype == "auto" and has_bf16(torch.device(loop.device).type)
    return torch.bfloat16 if auto or loop.dtype == "bfloat16" else torch.float32


def has_bf16(device: str) -> bool:
    """Whether bf16 matmuls are fast: on CPUs with AVX512-BF16 or AMX, on GPUs since Ampere."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    checks = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    return device == "cpu" and any(check() for check in checks if check is not None)


# ------------------------------------------------------------------ memory


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: allocated on the GPU, or resident in CPU memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def total_memory(device: torch.device) -> int:
    """Bytes that this process can allocate: of its GPU, or its share of what the system has free."""
    ranks_here = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
    return free_memory(device) // ranks_here


# ------------------------------------------------------------------ speed


def peak_flops(device: torch.device, dtype: torch.dtype, size: int = 0) -> float:
    """FLOP/s of a large square matmul, the best of five measurements."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
