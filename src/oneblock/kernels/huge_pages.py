"""Memory on Linux: weights in huge pages, read 10 to 25% faster than from 4 kB pages, and a heap that keeps pages."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from contextlib import suppress

import torch
from torch import nn

from oneblock.kernels.substitution import set_tensor
from oneblock.model import Decoder

ALIGNMENT = 64  # bytes, a cache line
BREAK_EVEN_TOKENS = 100  # decoded tokens that repay the copy, which takes as long as about ten decode steps
PROMPT_TOKENS = 64  # prompt tokens that gain as much as one decoded token

# mallopt parameters (glibc's malloc.h)
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
MAX_HEAP_ALLOCATION = 32 << 20  # bytes: glibc's limit of MMAP_THRESHOLD


def move_to_huge_pages(model: Decoder) -> None:
    """Move all parameters and buffers, in place: one that stayed would keep its checkpoint file mapped.

    Does nothing without transparent huge pages.
    """
    tensors = {
        name: x for name, x in (*model.named_parameters(), *model.named_buffers()) if x.is_contiguous() and len(x)
    }
    if model.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    memory = mmap.mmap(-1, sum(align(x.nbytes) for x in tensors.values()) + (2 << 20), flags=mmap.MAP_PRIVATE)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return
    offset = 0
    while tensors:  # each old tensor is freed before the next is copied
        name, x = tensors.popitem()
        new = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
        new.copy_(x.detach())
        if isinstance(x, nn.Parameter):
            x.data = new  # stays the same parameter where it is shared
        else:
            set_tensor(model, name, new)
        offset += align(x.nbytes)


def free_memory(device: torch.device) -> int:
    """Free bytes of the GPU; on a CPU the available ones of the system, within the limit of the container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = []
    with suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max") as file:
        limits.append(int(file.read()))
    with suppress(OSError, ValueError, StopIteration), open("/proc/meminfo") as file:
        limits.append(next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable")))
    return min(limits, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)


def align(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def reuse_memory(max_allocation: int = 4 << 20) -> None:
    """Let the C library keep freed memory: the next training step or layer needs the same allocations again.

    Fresh pages are zeroed by the kernel, which cost half of a training step of GPT-2 on two cores and 5% of a long
    prefill. Changes the whole process, so only commands call it. Allocations over `max_allocation` bytes (at most
    MAX_HEAP_ALLOCATION) are still returned, so that little memory lies idle. Does nothing without glibc.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch then asks for huge pages, if it has not allocated yet
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in ((MMAP_THRESHOLD, max_allocation), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 64 << 20)):
            mallopt(name, value)
