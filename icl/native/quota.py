"""How many CPUs the control groups (cgroups) of Linux let this process use.

A container on a large machine usually sees all cores, and a quota limits the CPU time that it gets per period. With more
threads than the quota allows, all of them are stopped for the rest of each period. Groups are nested, and each may have
a quota; the smallest counts. Format: Documentation/admin-guide/cgroup-v2.rst and scheduler/sched-bwc.rst of the kernel.
"""

import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path, PurePosixPath

_ROOT = Path("/")

THREADS = "OMP_NUM_THREADS"
"""The environment variable that limits the threads of PyTorch and of other numerical libraries."""


def usable_cores(root: Path | None = None) -> int:
    """CPU cores that this process may keep busy: those it may run on, or fewer if a quota allows fewer; at least 1.

    Args:
        root: the folder that holds `proc` and `sys`; default: that of the file system.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, int(min(cores, cpu_quota(root))))


def cpu_quota(root: Path | None = None) -> float:
    """The smallest quota, in CPUs, of the groups of this process and of all groups above them; infinite without a quota."""
    return min((_quota_of(folder) for folder in _group_folders(root or _ROOT)), default=float("inf"))


def limit_threads(environ: MutableMapping[str, str] = os.environ, root: Path | None = None) -> None:
    """If a quota is in force, set OMP_NUM_THREADS to it, unless it is set. Libraries read it when they are imported."""
    if cpu_quota(root) < float("inf"):
        environ.setdefault(THREADS, str(usable_cores(root)))


def _group_folders(root: Path) -> Iterator[Path]:
    """The folders of this process's CPU groups, from the inner to the outermost that can be seen, in version 1 and 2."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except (OSError, UnicodeDecodeError):  # no Linux, or a closed /proc
        return
    for number, controllers, path in (group.split(":", 2) for group in groups):
        for mount in mounts:
            before, _, after = mount.partition(" - ")
            place, system = before.split(), after.split()
            if len(place) < 5 or len(system) < 3:
                continue
            second = number == "0" and system[0] == "cgroup2"
            first = "cpu" in controllers.split(",") and system[0] == "cgroup" and "cpu" in system[2].split(",")
            if not (first or second):
                continue
            top = root / place[4].lstrip("/")
            # A container sees its own group as the root of the mount, under whatever name the group has outside.
            inside = PurePosixPath(path).is_relative_to(place[3])
            folder = top / PurePosixPath(path).relative_to(place[3]) if inside else top
            yield folder
            while folder != top:
                folder = folder.parent
                yield folder


def _quota_of(folder: Path) -> float:
    """The quota of one group in CPUs: CPU time per period divided by the period."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            if int(quota) > 0 and int(period) > 0:  # -1: no quota
                return int(quota) / int(period)
        except (OSError, ValueError):  # the file is not there, or says `max`
            continue
    return float("inf")
