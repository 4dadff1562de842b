"""What glibc's malloc does with the memory of maps that have been freed."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory(keep: bool = True, override: bool = False) -> None:
    """Keep what is freed for whoever asks next, or else give it back to the system at once.

    Left to itself, glibc gives back large blocks and the end of the heap in every step, and the system has to clear
    the pages when the next step takes them again: 2 to 10 % of a step on a CPU. A step takes what the one before took,
    so that keeping it costs no memory. Other libraries of malloc do as they do.

    Args:
        keep: False: give back whatever can be.
        override: also where the environment has settings for malloc (`MALLOC_…`, `GLIBC_TUNABLES`), which stand
            otherwise.
    """
    chosen = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt") or (chosen and not override):
        return
    if keep:  # older versions take no more than 32 MB
        _ = libc.mallopt(_M_MMAP_THRESHOLD, 2**30) or libc.mallopt(_M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    else:
        libc.mallopt(_M_MMAP_THRESHOLD, 2**16)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**16)
