"""Keep freed memory for the next step, in huge pages: training frees and takes the same tensors again and again.

glibc hands large blocks back to the kernel when they are freed. The next step then faults them in anew, 4 KiB at a
time, and the kernel zeroes each page: 12 to 29 thousand faults in a step of a small GPT, and 5 to 13 % of its processor
time. So, for glibc on Linux (elsewhere nothing happens; GPU memory is torch's own affair):

    mallopt       large blocks come from the heap, and the heap does not shrink
    madvise       the first part of the heap to come may be huge pages; it takes no memory until it is used

The price is that memory which one phase of a script has used stays with the process (the kernel counts it as used).
See mallopt(3), madvise(2).
"""

from __future__ import annotations

import ctypes
import mmap
import sys

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _MMAP_MAX = -3, -1, -4  # malloc.h
_HUGE = 14  # MADV_HUGEPAGE
_NEVER = 2**31 - 1
_RESERVED_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Set this process's allocator up as above; returns whether it could be. Harmless to call again.

    Example:
        >>> keep_freed_memory() in (True, False)
        True
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        return False
    if not libc.mallopt(_MMAP_THRESHOLD, _RESERVED_BYTES):  # older versions have a ceiling of 32 MiB
        libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(_RESERVED_BYTES - mmap.PAGESIZE)
    if not block:
        return False  # a limit on address space: the heap grows as it can
    start = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
    libc.madvise(start, _RESERVED_BYTES - 3 * mmap.PAGESIZE, _HUGE)
    libc.free(block)
    return True
