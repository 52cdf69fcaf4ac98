import errno
import json
import math
import os

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icl.tracking import LocalTracker, NullTracker, TeeTracker, Tracker, read_metrics, read_summary
from icl.tracking.opening import open_tracker


def values_at(step):
    return {"loss": math.sin(step) / 3, "pretrain/mse/token/0": 1 / (step + 1)}


def record(folder, first, last, every=1):
    tracker = LocalTracker(folder, first)
    for step in range(first, last, every):
        tracker.log(step, values_at(step))
    return tracker


def test_rows_come_back_exactly(tmp_path):
    record(tmp_path, 0, 7).finish()
    assert read_metrics(tmp_path) == [{"step": step, **values_at(step)} for step in range(7)]
    table = pd.read_json(tmp_path / "metrics.jsonl", lines=True, precise_float=True)
    assert table["loss"].tolist() == [values_at(step)["loss"] for step in range(7)]


def test_scalars_of_numpy_and_torch_are_numbers(tmp_path):
    tracker = LocalTracker(tmp_path)
    tracker.log(3, {"a": np.float32(0.5), "b": torch.tensor(0.25), "c": np.int64(2), "d": float("nan")})
    tracker.summary({"best": torch.tensor(1.5, dtype=torch.float64)})
    tracker.finish()
    (row,) = read_metrics(tmp_path)
    assert (row["a"], row["b"], row["c"]) == (0.5, 0.25, 2)
    assert math.isnan(row["d"])
    assert json.loads((tmp_path / "summary.json").read_text()) == {"status": "finished", "best": 1.5}


@settings(deadline=None, max_examples=25)
@given(killed_at=st.integers(0, 11), resumed_at=st.integers(0, 11), torn=st.integers(0, 40))
def test_killed_and_continued_equals_uninterrupted_byte_for_byte(tmp_path_factory, killed_at, resumed_at, torn):
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    record(whole, 0, 11).finish()
    record(broken, 0, killed_at)
    with (broken / "metrics.jsonl").open("ab") as file:  # the last line that the crash cut short
        file.write(b'{"step": 11, "loss": 0.25, "pretrain/mse/token/0": 1.0}\n'[:torn])
    record(broken, min(resumed_at, killed_at), 11).finish()
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (broken / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()


def test_a_new_run_starts_an_empty_file(tmp_path):
    record(tmp_path, 0, 5).finish()
    record(tmp_path, 0, 2).finish()
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]


def test_reading_leaves_out_a_torn_line(tmp_path):
    record(tmp_path, 0, 3).finish()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]
    assert read_metrics(tmp_path / "absent") == []


def test_a_line_torn_in_the_middle_costs_its_own_row_alone(tmp_path):
    record(tmp_path, 0, 5).finish()
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:9] + b"\n"
    path.write_bytes(b"".join([*lines, b'{"no": "step"}\n']))
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 3, 4]
    record(tmp_path, 4, 6).finish()
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 3, 4, 5]
    assert len(path.read_bytes().splitlines()) == 5


def test_several_rows_of_one_step_are_kept_together(tmp_path):
    tracker = LocalTracker(tmp_path)
    for step, name in [(1, "a"), (2, "a"), (2, "b"), (3, "a")]:
        tracker.log(step, {name: 0.5})
    LocalTracker(tmp_path, 3).finish()
    assert read_metrics(tmp_path) == [{"step": 1, "a": 0.5}, {"step": 2, "a": 0.5}, {"step": 2, "b": 0.5}]


def test_images_are_kept_and_equal_figures_are_equal_files(tmp_path):
    from matplotlib.figure import Figure

    def figure():
        drawn = Figure(figsize=(1, 1))
        drawn.subplots().plot([1, 2])
        return drawn

    tracker = LocalTracker(tmp_path)
    tracker.log(5, {}, {"llc/trace": figure()})
    tracker.log(7, {}, {"copy": tmp_path / "images" / "llc-trace-5.png"})
    tracker.log(11, {}, {"again": figure()})
    first, copy, again = (tmp_path / "images" / f"{name}.png" for name in ("llc-trace-5", "copy-7", "again-11"))
    assert first.read_bytes() == copy.read_bytes() == again.read_bytes()


def test_tee_sends_everything_to_all_and_null_takes_anything(tmp_path):
    trackers: list[Tracker] = [LocalTracker(tmp_path / "a"), NullTracker(), LocalTracker(tmp_path / "b")]
    tee = TeeTracker(*trackers)
    tee.log(2, {"loss": 0.5})
    tee.summary({"loss": 0.5})
    tee.finish("failed", "no memory")
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b") == [{"step": 2, "loss": 0.5}]
    assert read_summary(tmp_path / "b") == {"loss": 0.5, "status": "failed", "error": "no memory"}


def test_a_run_that_goes_on_forgets_how_its_last_attempt_ended(tmp_path):
    tracker = record(tmp_path, 0, 3)
    tracker.summary({"best": 0.5, "remark": "it did not learn"})
    tracker.finish("failed", "no memory")
    record(tmp_path, 3, 5).finish()
    assert read_summary(tmp_path) == {"best": 0.5, "status": "finished"}


def test_no_file_is_left_half_written(tmp_path):
    tracker = LocalTracker(tmp_path)
    tracker.summary({"a": 1})
    tracker.finish()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "summary.json"}


def test_an_unwritable_place_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        LocalTracker(tmp_path / "file")


def test_on_a_full_disk_rows_wait_in_memory_and_follow_when_there_is_room(tmp_path, monkeypatch, caplog):
    tracker = record(tmp_path, 0, 3)
    with monkeypatch.context() as patch:

        def refuse(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "fsync", refuse)
        for step in range(3, 6):
            tracker.log(step, values_at(step))
        tracker.summary({"best": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path)][:3] == [0, 1, 2]
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2  # of the rows, and of the summary
    assert all("the disk is full; free some space" in message for message in messages)
    tracker.log(6, values_at(6))
    tracker.finish()
    assert read_metrics(tmp_path) == [{"step": step, **values_at(step)} for step in range(7)]
    assert not list(tmp_path.glob(".*"))


def test_one_id_of_wandb_serves_one_run_alone(tmp_path, monkeypatch):
    ids, told = [], []

    class Recording(NullTracker):
        def __init__(self, *names, run_id, **rest):
            self.run_id = run_id
            ids.append(run_id)

    monkeypatch.setattr("icl.tracking.opening.WandbTracker", Recording)
    environ = {"WANDB_RUN_ID": "x", "WANDB_API_KEY": "k" * 40}
    for name in ("train", "llc", "train", "llc"):
        open_tracker(tmp_path / name, name, {}, environ=environ, notify=told.append).finish()
    assert ids[0] == ids[2] == "x"
    assert ids[1] == ids[3] != "x"
    assert told == ["WANDB_RUN_ID=x belongs to the run train: this run gets another id"] * 2
