"""The memory allocator of the process, told what the work is like."""
import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
LARGEST = 64 * 2**20  # bytes; larger blocks go back to the system when they are freed, as before
KEEP = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks of up to 64 MiB, for the next step asks for the same ones; True where it does.

    By itself it hands the memory of large tensors back and gets it again, cleared page by page, at every operator: for
    a UNet at batch 32 on a CPU that is 40,000 page faults a forward pass and 5 to 8 % of its time. For commands to
    call: it changes the whole process. No result changes.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, LARGEST) and libc.mallopt(M_TRIM_THRESHOLD, KEEP))
