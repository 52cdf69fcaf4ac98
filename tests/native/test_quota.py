"""Containers' quotas of CPU time, in both versions of control groups, as folders that look like /proc and /sys."""

import os

import pytest
import torch

from icl.devices import available_cores
from icl.native import quota
from icl.native.quota import cpu_quota, limit_threads, usable_cores

UNIFIED = "29 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
SEPARATE = "33 31 0:30 {root} /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct"
OTHER = "36 31 0:33 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that makes a machine of 64 cores with the given groups, mounts and files, and returns its root."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)

    def build(groups: list[str], mounts: list[str], files: dict[str, str]):
        for name, text in {
            "proc/self/cgroup": "\n".join(groups),
            "proc/self/mountinfo": "\n".join(["21 1 8:1 / / rw - ext4 /dev/vda1 rw", *mounts]),
            **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
        }.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text + "\n")
        return tmp_path

    return build


def test_a_container_of_two_cpus_on_a_machine_of_64_cores(machine):
    root = machine(["0::/"], [UNIFIED.format(root="/")], {"cpu.max": "200000 100000"})
    assert (cpu_quota(root), usable_cores(root)) == (2.0, 2)


def test_the_smallest_quota_along_the_path_counts(machine):
    files = {
        **{"cpu.max": "max 100000", "slurm/cpu.max": "700000 100000", "slurm/job_3/cpu.max": "150000 50000"},
        **{"slurm/job_3/step_0/cpu.max": "500000 100000", "slurm/job_4/cpu.max": "100000 100000"},
    }
    root = machine(["0::/slurm/job_3/step_0"], [UNIFIED.format(root="/")], files)
    assert usable_cores(root) == 3


def test_version_1_and_a_mount_that_shows_the_containers_own_group(machine):
    files = {
        **{"cpu,cpuacct/cpu.cfs_quota_us": "500000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
        **{"memory/cpu.cfs_quota_us": "100000", "memory/cpu.cfs_period_us": "100000"},
    }
    groups = ["9:memory:/docker/5e1f", "4:cpu,cpuacct:/docker/5e1f", "0::/"]
    root = machine(groups, [OTHER, SEPARATE.format(root="/docker/5e1f")], files)
    assert usable_cores(root) == 5


def test_version_1_nested(machine):
    files = {
        **{"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
        **{"cpu,cpuacct/pod/cpu.cfs_quota_us": "400000", "cpu,cpuacct/pod/cpu.cfs_period_us": "100000"},
        **{"cpu,cpuacct/pod/one/cpu.cfs_quota_us": "-1", "cpu,cpuacct/pod/one/cpu.cfs_period_us": "100000"},
    }
    root = machine(["4:cpu,cpuacct:/pod/one"], [SEPARATE.format(root="/")], files)
    assert usable_cores(root) == 4


@pytest.mark.parametrize(("text", "cores"), [("50000 100000", 1), ("170000 100000", 1), ("9900000 100000", 64)])
def test_part_of_a_cpu_is_none_but_there_is_always_one(machine, text, cores):
    assert usable_cores(machine(["0::/"], [UNIFIED.format(root="/")], {"cpu.max": text})) == cores


@pytest.mark.parametrize("text", ["max 100000", "", "nonsense", "0 100000", "100000 0"])
def test_without_a_quota_all_cores_count(machine, text):
    root = machine(["0::/"], [UNIFIED.format(root="/")], {"cpu.max": text})
    assert (cpu_quota(root), usable_cores(root)) == (float("inf"), 64)
    environment: dict[str, str] = {}
    limit_threads(environment, root)
    assert environment == {}


def test_a_system_without_groups(tmp_path):
    assert cpu_quota(tmp_path) == float("inf")


def test_other_libraries_keep_to_the_quota_unless_the_user_says_otherwise(machine):
    root = machine(["0::/"], [UNIFIED.format(root="/")], {"cpu.max": "300000 100000"})
    silent, told = {}, {"OMP_NUM_THREADS": "1"}
    limit_threads(silent, root)
    limit_threads(told, root)
    assert (silent, told) == ({"OMP_NUM_THREADS": "3"}, {"OMP_NUM_THREADS": "1"})


def test_the_commands_start_as_many_runs_as_the_quota_allows(machine, monkeypatch):
    root = machine(["0::/"], [UNIFIED.format(root="/")], {"cpu.max": "200000 100000"})
    monkeypatch.setattr(quota, "_ROOT", root)
    assert available_cores(torch.device("cpu")) == 2
