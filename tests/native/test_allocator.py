"""Commands keep the memory they free: the next step takes it without asking the operating system."""

import itertools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from icl.native.allocator import keep_freed_memory

ROUNDS = """
import json, resource, sys, threading, torch
from icl.native.allocator import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()

def round_of_work():
    parts = [torch.zeros(2**20) for _ in range(8)]  # 32 MiB, freed at the end

def held():  # MiB; smaps walks the page tables, while the counters of statm lag behind on many cores
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024

memory, before = [held()], resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(21):
    thread = threading.Thread(target=round_of_work)
    thread.start()
    thread.join()
    memory.append(held())
print(json.dumps([kept, memory, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory in use is read from Linux's /proc")
def test_freed_memory_stays_with_the_process():
    def rounds(word: str) -> tuple[bool, list[float], int]:
        words = [sys.executable, "-c", ROUNDS, word]
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
        return json.loads(subprocess.run(words, check=True, capture_output=True, text=True, env=plain).stdout)

    # How often the plain process gives memory back depends on where small blocks happen to lie: shown, not asserted.
    (left, _, plain_faults), (kept, memory, faults) = rounds("leave"), rounds("keep")
    print(f"page faults in 21 rounds of 32 MiB: {plain_faults} before, {faults} after")
    assert (left, kept) == (False, True)
    assert memory[1] - memory[0] > 31
    assert min(later - earlier for earlier, later in itertools.pairwise(memory)) > -1  # nothing is given back


def test_a_users_own_settings_are_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_freed_memory()
