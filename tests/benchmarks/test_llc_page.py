"""docs/llc.md shows what data/llc_accuracy holds."""

import subprocess
import sys

import pytest

from benchmarks.llc.page import PAGE, page
from benchmarks.pages import END, fill, mark


def test_its_tables_are_those_of_the_data():
    text = PAGE.read_text()
    assert page(text) == text, "python -m benchmarks.llc.page"


def test_a_page_without_the_marks_of_a_table_is_left_alone():
    start = mark("make it", "a table")
    assert fill(f"before\n{start}\nold\n{END}\nafter", start, "new") == f"before\n{start}\n\nnew\n\n{END}\nafter"
    for broken in ("no marks", f"{start} no end", f"{END} wrong order {start}", f"{start} {start} {END}"):
        with pytest.raises(ValueError, match="needs the lines"):
            fill(broken, start, "new")


# What all of them need is imported once; then each is imported alone, in a process of its own.
ALONE = """
import importlib, os, sys
import icl.sampling.llc, pandas, torch
for name in sys.argv[1:]:
    if os.fork() == 0:
        importlib.import_module(f"benchmarks.llc.{name}")
        os._exit(0)
    _, status = os.wait()
    assert status == 0, name
"""


def test_every_benchmark_starts_by_itself():
    names = ["accuracy", "bias", "cost", "examples", "honesty", "standard_errors"]
    subprocess.run([sys.executable, "-c", ALONE, *names], check=True, cwd=PAGE.parents[1])
