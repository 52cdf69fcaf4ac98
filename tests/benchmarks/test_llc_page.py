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


@pytest.mark.parametrize("name", ["accuracy", "bias", "cost", "honesty", "standard_errors"])
def test_every_benchmark_starts_by_itself(name):
    subprocess.run([sys.executable, "-c", f"import benchmarks.llc.{name}"], check=True, cwd=PAGE.parents[1])
