"""Memory that one step frees and the next takes again.

glibc returns freed memory to the operating system above a threshold, which clears it page by page when it is asked for
again, and gives every thread an arena of its own. A training step in PyTorch frees and takes some tens of megabytes:
2000 to 3000 page faults, a fifth of its time (docs/log.md). Results do not depend on it.
"""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
_KEEP_ALL = 2**31 - 1
_LARGEST_BLOCK = 2**25  # the most that glibc accepts in 64 bits


def keep_freed_memory() -> bool:
    """Ask that this process keep the memory that it frees, for itself; returns whether that was accepted.

    For commands, whose process ends with the work. It is a setting of the whole process, so the library's functions
    leave it alone; a script that trains or samples in PyTorch on a CPU may call it first. A user's own settings
    (MALLOC_..., GLIBC_TUNABLES) are left as they are.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False  # not glibc
    settings = ((_MMAP_THRESHOLD, _LARGEST_BLOCK), (_TRIM_THRESHOLD, _KEEP_ALL), (_ARENA_MAX, 1))
    return all(mallopt(*setting) for setting in settings)
