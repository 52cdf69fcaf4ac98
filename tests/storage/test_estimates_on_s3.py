"""Estimates with a bucket: stopped or killed, and finished on another machine from the bucket alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from icl.estimation import LLCConfig
from icl.estimation.traces import read_estimates, read_traces
from icl.execution import llc_run
from icl.execution.llc_run import run_llc
from icl.execution.surroundings import Surroundings
from icl.execution.training_runs import run_training
from icl.storage import LocalStore, MirroredStore, S3Store

CONFIG = LLCConfig.parse(
    {
        "task_config": {
            "task_size": 2, "max_examples": 3, "embed_size": 4, "mlp_size": 5, "num_heads": 1, "num_layers": 1, "model_seed": 1,
        },
        "num_steps": 12,
        "batch_size": 3,
        "eval_batch_size": 3,
        "checkpointer_config": {"checkpoint_steps": [0, 3, 5]},
        "sampler_config": {
            "num_chains": 2, "num_draws": 5, "epsilon": 1e-5, "gamma": 1.0, "nbeta": 10.0, "init_seed": 0, "grad_batch_size": 3,
            "eval_online": True,
        },
        "plotting_config": {"include_loss_trace": True},
    }
)  # fmt: skip

BEFORE_THE_KILL = 2

WAITING_ESTIMATES = """
import sys, time
import test_estimates_on_s3 as t
append, written = t.llc_run.append_trace, []

def slow(folder, step, result):
    if len(written) == t.BEFORE_THE_KILL:
        time.sleep(600)
    written.append(step)
    append(folder, step, result)

t.llc_run.append_trace = slow
t.run_llc(t.CONFIG, t.machine(t.Path(sys.argv[1]), sys.argv[2]))
"""


def place_of(store, root):
    return Surroundings(store, Path(root) / "icl", torch.device("cpu"), tracking="local")


def machine(root, bucket):
    """The surroundings of one machine, with a disk of its own."""
    return place_of(MirroredStore(LocalStore(root), S3Store(bucket, listing_lifetime_s=0.0), first_pause_s=0.05), root)


def files_of(store):
    return {key: store.get(key) for key in store.list(f"icl/{CONFIG.name}")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of the estimates that nothing happened to."""
    root = tmp_path_factory.mktemp("whole")
    place = place_of(LocalStore(root), root)
    run_training(CONFIG.training, place)
    assert run_llc(CONFIG, place) == 0
    found = files_of(place.store)
    for name in ("traces.jsonl", "tables/traces-0.csv.gz", "images/loss-trace-0.png"):
        assert f"icl/{CONFIG.name}/{name}" in found
    return found


@pytest.fixture
def trained(bucket, tmp_path):
    """A bucket that holds the training run alone."""
    place = machine(tmp_path / "training", bucket)
    assert run_training(CONFIG.training, place).finished
    return bucket


def finish(place, monkeypatch):
    """Go on to the end; returns the steps whose estimates were made."""
    made = []
    append = llc_run.append_trace
    with monkeypatch.context() as patch:
        patch.setattr(llc_run, "append_trace", lambda *args: (made.append(args[1]), append(*args))[1])
        assert run_llc(CONFIG, place) == 0
    return made


def test_estimates_that_were_stopped_here_are_finished_there_and_none_is_lost(tmp_path, trained, whole, monkeypatch):
    append = llc_run.append_trace

    def stop_after_two(folder, step, result):
        append(folder, step, result)
        if len(read_traces(folder)) > BEFORE_THE_KILL:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llc_run, "append_trace", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            run_llc(CONFIG, machine(tmp_path / "here", trained))
    there = machine(tmp_path / "there", trained)
    assert finish(there, monkeypatch) == [5, 11]
    folder = there.results / CONFIG.name
    assert [row["step"] for row in read_estimates(folder)] == [0, 3, 5, 11]
    for again in (there, machine(tmp_path / "third", trained), machine(tmp_path / "here", trained)):
        assert finish(again, monkeypatch) == []
        assert read_estimates(again.results / CONFIG.name) == read_estimates(folder)
        assert read_traces(again.results / CONFIG.name) == read_traces(folder)
    in_bucket = files_of(S3Store(trained))
    assert in_bucket.keys() == whole.keys()
    assert in_bucket[f"icl/{CONFIG.name}/metrics.jsonl"] == whole[f"icl/{CONFIG.name}/metrics.jsonl"]
    assert files_of(LocalStore(tmp_path / "third")).keys() == whole.keys()  # tables and pictures, too


def test_after_a_kill_the_bucket_has_what_was_finished(tmp_path, trained, whole, monkeypatch):
    bucket = S3Store(trained, listing_lifetime_s=0.0)
    path = os.pathsep.join(str(Path(__file__).parents[up]) for up in (0, 1))
    finished = {
        key: data
        for key, data in whole.items()
        if key.rpartition("/")[0].endswith(("tables", "images")) and key.rpartition("-")[2][0] in "03"
    }
    assert len(finished) == 2 * BEFORE_THE_KILL
    metrics = f"icl/{CONFIG.name}/metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", WAITING_ESTIMATES, str(tmp_path / "lost"), trained],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        deadline = time.monotonic() + 60
        rows = 0
        while rows < BEFORE_THE_KILL and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
            rows = bucket.get(metrics).count(b"\n") if bucket.exists(metrics) else 0
        alive = process.poll() is None
        process.send_signal(signal.SIGKILL)
        assert alive, f"the estimates ended before they were killed: {process.stdout.read()}"
    sent = files_of(bucket)
    assert rows == BEFORE_THE_KILL
    assert sent[f"icl/{CONFIG.name}/traces.jsonl"].count(b"\n") == BEFORE_THE_KILL
    assert {key: sent.get(key) for key in finished} == finished
    assert finish(machine(tmp_path / "there", trained), monkeypatch) == [5, 11]
    assert files_of(bucket) == whole
