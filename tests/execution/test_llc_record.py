"""The record of estimates: every line stands alone, and an estimate whose lines are lost is made again, once."""

import json

import pandas as pd
import pytest
import torch

from icl.estimation import LLCConfig
from icl.estimation.tables import tabulate
from icl.estimation.traces import read_estimates, read_traces
from icl.execution.llc_run import run_llc
from icl.execution.run import is_complete
from icl.execution.surroundings import Surroundings
from icl.execution.training_runs import run_training
from icl.storage import LocalStore, StorageError
from icl.tracking import LocalTracker

CONFIG = LLCConfig.parse(
    {
        "task_config": {
            "task_size": 2, "max_examples": 3, "embed_size": 4, "mlp_size": 5, "num_heads": 1, "num_layers": 1, "model_seed": 1,
        },
        "num_steps": 12,
        "batch_size": 3,
        "eval_batch_size": 3,
        "checkpointer_config": {"checkpoint_steps": [0, 5]},
        "sampler_config": {
            "num_chains": 2, "num_draws": 5, "epsilon": 1e-5, "gamma": 1.0, "nbeta": 10.0, "init_seed": 0, "grad_batch_size": 3,
        },
    }
)  # fmt: skip

UNEVEN = b'{"step": 5, "draw": [1], "loss": [[]], "distance": [[1]]}'  # no trace, but what could be a row of metrics


@pytest.fixture
def place(tmp_path):
    place = Surroundings(LocalStore(tmp_path), tmp_path / "icl", torch.device("cpu"), tracking="local")
    run_training(CONFIG.training, place)
    assert run_llc(CONFIG, place) == 0
    return place


def table(place):
    tabulate([CONFIG], place.results, place.results.parent / "tables")
    return pd.read_csv(place.results.parent / "tables" / "llc.csv")


@pytest.mark.parametrize("line", [0, 1, 2])
@pytest.mark.parametrize("name", ["metrics.jsonl", "traces.jsonl"])
@pytest.mark.parametrize("spoilt", [bytes(40), b'{"step": 5, "ll', b"[]", UNEVEN, None])
def test_a_line_that_is_lost_is_made_again_and_costs_no_other(place, name, line, spoilt):
    before, wanted = {row["step"]: row for row in read_estimates(place.results / CONFIG.name)}, table(place)
    path = place.results / CONFIG.name / name
    lines = path.read_bytes().split(b"\n")[:-1]
    step = json.loads(lines[line])["step"]
    if name == "metrics.jsonl" and spoilt == UNEVEN:
        return
    lines[line : line + 1] = [] if spoilt is None else [spoilt]
    path.write_bytes(b"".join(each + b"\n" for each in lines))
    assert not is_complete(CONFIG, place)
    assert read_estimates(place.results / CONFIG.name) == [row for key, row in before.items() if key != step]
    assert run_llc(CONFIG, place) == 0
    assert is_complete(CONFIG, place)
    assert read_estimates(place.results / CONFIG.name) == list(before.values())
    assert [trace["step"] for trace in read_traces(place.results / CONFIG.name)] == [0, 5, 11]
    pd.testing.assert_frame_equal(table(place), wanted)


def test_estimates_without_any_traces_are_those_of_an_old_version(place):
    (place.results / CONFIG.name / "traces.jsonl").unlink()
    assert is_complete(CONFIG, place)
    assert len(table(place)) == 3


def test_a_record_that_cannot_be_read_is_named(place):
    path = place.results / CONFIG.name / "traces.jsonl"
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(StorageError, match=r"cannot read .*traces.jsonl: it is a pipe, a socket or a device"):
        run_llc(CONFIG, place)
    assert not is_complete(CONFIG, place)


def test_chains_that_diverge_are_told_at_once(place, monkeypatch):
    told = []
    monkeypatch.setattr(LocalTracker, "alert", lambda tracker, title, text: told.append((title, text)))
    wild = CONFIG.sampler_config.model_copy(update={"epsilon": 1e30})
    config = CONFIG.model_copy(update={"sampler_config": wild})
    assert run_llc(config, place) == 0
    assert run_llc(CONFIG, place) == 0
    assert told == [
        ("Chains diverged", f"{config.name}, step {step}: 2 of 2 chains diverged")
        for step in CONFIG.training.checkpoint_steps()
    ]
