"""A setting of glibc that lets the process keep freed memory for its next step.

Above a threshold, glibc returns freed memory to the operating system. When the memory is needed again, the system clears
it page by page. glibc also gives every thread its own arena. A training step in PyTorch frees and takes some tens of
megabytes, which costs 2000 to 3000 page faults and a fifth of its time (docs/log.md). Results do not depend on it.
"""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
_KEEP_ALL = 2**31 - 1
_LARGEST_BLOCK = 2**25  # the most that glibc accepts in 64 bits


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees; returns whether glibc accepted that.

    The commands call this, because their process ends with the work. It changes the whole process, so the library's
    functions do not call it. A script that trains or samples in PyTorch on a CPU may call it first. If the user has set
    MALLOC_... or GLIBC_TUNABLES, nothing is changed.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False  # not glibc
    settings = ((_MMAP_THRESHOLD, _LARGEST_BLOCK), (_TRIM_THRESHOLD, _KEEP_ALL), (_ARENA_MAX, 1))
    return all(mallopt(*setting) for setting in settings)
