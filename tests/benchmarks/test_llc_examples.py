"""The examples beside devinterp: what counts as a line, and that both sides run."""

import math

import pandas as pd
import pytest

from benchmarks.llc import examples_by_devinterp
from benchmarks.llc.examples import EXAMPLES, NAMES, code_lines, main


def test_every_example_is_compared():
    estimating = {path.stem for path in EXAMPLES.glob("*.py") if "llc" in path.read_text()}
    assert set(NAMES) == estimating  # the other examples make texts
    assert all(callable(getattr(examples_by_devinterp, name)) for name in NAMES)


def counted(values):
    """Not a line.

    Neither this.
    """
    import math

    # nor this

    return math.fsum(
        values,
    )


def test_a_line_of_code_is_no_docstring_no_import_and_not_blank():
    assert code_lines(counted) == 4


@pytest.mark.parametrize(
    "name",
    ["superposition", *(pytest.param(each, marks=pytest.mark.slow) for each in NAMES if each != "superposition")],
)
def test_both_sides_run_and_rows_that_are_there_are_not_made_again(name, tmp_path, capsys, monkeypatch):
    pytest.importorskip("devinterp")
    monkeypatch.setenv("DEVICE", "cpu")
    words = ["--quick", "--only", name, "--output", str(tmp_path)]
    assert main(words) == 0
    table = pd.read_csv(tmp_path / "examples.csv")
    assert set(table["example"]) == {name}
    assert table[["icl", "icl_error", "devinterp", "devinterp_spread"]].map(math.isfinite).to_numpy().all()
    assert (table["gradients_devinterp"] <= table["gradients_icl"]).all()
    assert (table["lines_icl"] > 0).all()
    before = (tmp_path / "examples.csv").read_bytes()
    capsys.readouterr()
    assert main(words) == 0
    assert not capsys.readouterr().out
    assert (tmp_path / "examples.csv").read_bytes() == before
