"""The examples run, are short, and agree with what is known."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LONGEST = 60  # lines


def loaded(name: str):
    if name == "gpt2":
        pytest.importorskip("transformers")
    found = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) < LONGEST
    assert path.name in (ROOT / "examples" / "README.md").read_text()


@pytest.mark.parametrize("name", ["deep_linear", "superposition", "modular_addition", "digits", "gpt2"])
def test_an_example_runs_in_seconds_where_asked(name):
    found = loaded(name).main(quick=True)
    numbers = [
        value for row in (found if isinstance(found, list) else [found]) for value in row if isinstance(value, float)
    ]
    assert all(map(math.isfinite, numbers))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["superposition", "modular_addition", "digits", "gpt2"])
def test_an_example_runs_whole(name):
    loaded(name).main()


@pytest.mark.slow
def test_the_estimate_of_the_deep_linear_network_is_near_what_is_known():
    estimate, known, _ = loaded("deep_linear").main()
    assert estimate == pytest.approx(known, rel=0.25)


def test_a_folder_of_own_checkpoints_goes_through_the_command(tmp_path):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "AWS_", "LOCAL_ROOT"))
    }
    environment |= {"DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, str(ROOT / "examples" / "own_checkpoints.py"), "--quick"],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
    )
    (metrics,) = tmp_path.glob("checkpoints/icl/*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [30, 300]
    assert rows[1]["loss/init"] < rows[0]["loss/init"]
