"""Memory that was freed is kept for the next step instead of being given back to the system.

A training step allocates and frees the same few hundred buffers every time. glibc asks the system for each one above
128 KiB and gives it back, and the system fills its pages with zeros again: 20,000 page faults a step of the shapes
demo, a fifth of its time.
"""
import ctypes
import os
import platform

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # parameters of mallopt, from malloc.h
LARGEST = 2**31 - 1  # mallopt takes an int


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, up to the most it has had; whether the C library can do that. Call it before
    the first step."""
    if platform.libc_ver()[0] != "glibc":
        return False
    # read by PyTorch at its first allocation: huge pages where the system lends them on request
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(MMAP_THRESHOLD, 2**30), mallopt(TRIM_THRESHOLD, LARGEST), mallopt(TOP_PAD, 2**26)])
