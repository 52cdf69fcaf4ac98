"""The benchmarks of speed: what they compare computes the same, the tables are made of the results, the GPU's command runs."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import gpu
from benchmarks.speed import cases as speed_cases
from benchmarks.speed import table as speed_table
from benchmarks.speed import textbook
from benchmarks.speed.workers import Timing, Variant, take_turns
from icl.baselines import dmmse_predictor, ridge_predictor
from icl.model import initial_parameters, predict_with_activations
from icl.streams import Stream
from icl.tasks import RegressionTask

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_textbook_computes_what_it_is_compared_with():
    law = RegressionTask(4, 8, 0.125, num_tasks=37)
    xs, ys = law.sample(Stream(0, "benchmark-test"), 0, 11)
    expected, _ = predict_with_activations(speed_cases.PAPER, initial_parameters(speed_cases.PAPER, 0), xs, ys)
    torch.testing.assert_close(speed_cases.make_textbook_model(speed_cases.PAPER)(xs, ys), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(textbook.ridge(xs, ys, 0.125), ridge_predictor(xs, ys, 0.125), rtol=0, atol=1e-4)
    ours = dmmse_predictor(xs, ys, law.tasks, 0.125)
    torch.testing.assert_close(textbook.dmmse(xs, ys, law.tasks, 0.125), ours, rtol=0, atol=1e-4)


def test_ratios_are_taken_within_rounds():
    ours, theirs = Timing("ours", [1.0, 2.0, 10.0]), Timing("theirs", [3.0, 6.0, 30.0])
    assert ours.speedup(theirs) == (3.0, 3.0, 3.0)
    assert ours.median == 2.0


def test_a_failing_variant_says_so():
    with pytest.raises(RuntimeError, match=r"broken: ZeroDivisionError"):
        take_turns([Variant("broken", divmod_by_zero, [{}], 1.0)], 1)


def divmod_by_zero():
    divmod(1, 0)


def test_tables_are_made_of_the_results():
    assert (RESULTS / "README.md").read_text() == speed_table.results_page(RESULTS)
    table = speed_table.headlines(speed_table.main_results(RESULTS))
    assert table in (ROOT / "README.md").read_text(), "python -m benchmarks.speed --table"


def test_the_gpu_benchmark_writes_its_report_where_little_is_installed(tmp_path):
    """Torch, numpy, pandas and pydantic: everything else that icl can use is not there."""
    absent = [
        "wandb",
        "sweeps",
        "boto3",
        "botocore",
        "dotenv",
        "typer",
        "rich",
        "matplotlib",
        "seaborn",
        "scipy",
        "sklearn",
    ]
    absent += ["yaml", "safetensors", "xarray"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent}))
from benchmarks import gpu
gpu.main(["--short", "--device", "cpu", "--minutes", "0.01", "--output", {str(tmp_path)!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert "of float64" in done.stdout
    report = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert report["gradient_error"] < 1e-4
    assert report["profile"]["training"]["kernels"]
    table = pd.read_csv(tmp_path / "gpu-cpu.csv")
    assert list(table["what"]) == ["training", "training", "sampling", "sampling", "sampling"]
    assert (table["share_of_float32_peak"] > 0).all()


def test_the_gpu_benchmark_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "sampler", interrupted)
    with pytest.raises(SystemExit) as left:
        gpu.main(["--short", "--device", "cpu", "--output", str(tmp_path)])
    assert left.value.code == 130
    assert len(pd.read_csv(tmp_path / "gpu-cpu.csv")) == 2
    assert "what was measured is in" in capsys.readouterr().err


def test_the_gpu_benchmark_refuses_wrong_gradients(monkeypatch):
    monkeypatch.setattr(gpu, "batched_loss_and_grad", lambda shape, flats, xs, ys: (None, flats))
    with pytest.raises(RuntimeError, match="nothing was timed"):
        gpu.check_gradients(torch.device("cpu"), gpu.SHORT)
