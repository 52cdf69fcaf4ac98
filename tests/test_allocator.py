"""Commands keep the memory they free: the next step takes it without asking the operating system."""

import os
import platform
import subprocess
import sys

import pytest

from icl.allocator import keep_freed_memory

FAULTS_PER_ROUND = """
import resource, statistics, sys, threading, torch
from icl.allocator import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()

def round_of_work():
    parts = [torch.zeros(2**20) for _ in range(8)]  # 32 MiB, freed at the end

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=round_of_work)
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# The median: the first rounds still grow the heap, and a kernel that reclaims idle pages costs one some.
print(kept, statistics.median(faults() for _ in range(21)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_taken_again_without_page_faults():
    def faults(word: str) -> tuple[str, float]:
        words = [sys.executable, "-c", FAULTS_PER_ROUND, word]
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
        kept, count = subprocess.run(words, check=True, capture_output=True, text=True, env=plain).stdout.split()
        return kept, float(count)

    before, after = faults("leave"), faults("keep")
    print(f"page faults per round: {before[1]:.0f} before, {after[1]:.0f} after")
    assert (before[0], after[0]) == ("False", "True")
    assert after[1] < 200  # 32 MiB in pages of 4 KiB are 8192


def test_a_users_own_settings_are_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_freed_memory()
