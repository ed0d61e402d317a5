"""What the C library does with memory that is no longer needed."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

# glibc's mallopt (malloc.h)
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
MOST = 32 << 20  # bytes of a piece that the heap may hold: glibc's own limit


def reuse_memory(largest: int = 4 << 20) -> None:
    """Let the C library keep freed memory instead of giving it back: the next step, or layer, needs the same again.

    Memory that comes fresh from the system is cleared page by page, which cost half of a training step of GPT-2 on two
    cores, and a twentieth of a long prompt's time. For commands, whose process is theirs. Pieces over `largest` bytes
    (MOST at most) still come and go, on huge pages, so that little lies idle. With glibc; elsewhere nothing changes.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for huge pages, if it has not allocated yet
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in ((MMAP_THRESHOLD, largest), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 64 << 20)):
            mallopt(name, value)
