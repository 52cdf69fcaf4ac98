"""Runs as wholes: what `icl runs` shows, checks, thins out and copies."""

import io
import itertools
import math
import os

import pytest
import torch
from rich.console import Console

from icl.checkpoints import CheckpointError, Checkpoints
from icl.checkpoints.runs import choose, copy_run, list_runs, prune_run, verify_run
from icl.commands.runs import runs_command
from icl.config.steps import spread_in_log_time
from icl.storage import LocalStore, MirroredStore, StorageError
from icl.storage.locks import RunInUseError


def fill(store, name, steps=(0, 1, 10, 100), finished=False):
    run = Checkpoints(store, name)
    run.save_config({"name": name})
    for step in steps:
        run.save(step, {"w": torch.full((5, 3), float(step))})
    run.save_state(steps[-1] + 1, {"w": torch.zeros(7)})
    if finished:
        run.mark_finished(steps[-1])
    return run


def damage(store, key):
    path = store.root / key
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "root")


def show(store, **options):
    console = Console(width=200, record=True, file=io.StringIO())
    arguments = {"verify": False, "prune": None, "copy": None, "name": None, **options}
    status = runs_command(**arguments, environ={"LOCAL_ROOT": str(store.root)}, console=console)
    return status, console.export_text()


def test_runs_are_listed_with_steps_size_and_state(store):
    fill(store, "done", finished=True)
    fill(store, "cut", steps=(0, 5))
    busy = fill(store, "busy", steps=(0,))
    store.put("icl/llc-of-done/metrics.jsonl", b"{}")  # no checkpoints: the record of an analysis
    with busy.lock():
        runs = list_runs(store)
    assert [(run.name, run.checkpoints, run.newest_step, run.state) for run in runs] == [
        ("busy", 1, 0, "running"),
        ("cut", 2, 5, "interrupted"),
        ("done", 4, 100, "finished"),
    ]
    assert all(run.size == sum(store.sizes(f"icl/{run.name}").values()) for run in runs)
    status, text = show(store)
    assert status == 0
    assert "3 runs in folder" in text
    assert choose(runs, "cut") == [runs[1]]
    with pytest.raises(ValueError, match="there is no run 'nope'; known runs: busy, cut, done"):
        choose(runs, "nope")


def test_verify_finds_every_damaged_file_and_only_those(store):
    run = fill(store, "a")
    assert verify_run(store, "a") == []
    damage(store, run.weights_key(10))
    damage(store, run.state_key(101))
    store.put(run.weights_key(7), store.get(run.weights_key(1)))  # a checkpoint under another's name
    store.put(f"{run.prefix}/copy-of-1.safetensors", store.get(run.weights_key(1)))
    run.save(8, {"w": torch.zeros(2)})  # of another architecture
    seen = []
    problems = verify_run(store, "a", lambda done, total: seen.append((done, total)))
    assert {problem.key.rpartition("/")[2] for problem in problems} == {
        "10.safetensors", "state-101.safetensors", "7.safetensors", "copy-of-1.safetensors", "8.safetensors",
    }  # fmt: skip
    assert seen[-1] == (8, 8)
    status, text = show(store, verify=True)
    assert status == 1
    assert text.count("damaged:") == 5
    assert "6 checkpoints, 5 damaged" in text


def test_verify_reads_both_copies_of_a_mirrored_run(tmp_path, store, monkeypatch):
    remote = LocalStore(tmp_path / "remote")
    both = MirroredStore(store, remote)
    run = fill(both, "a")
    assert both.flush() == ()
    damage(remote, run.weights_key(10))
    monkeypatch.setattr("icl.commands.runs.store_from_environment", lambda _: both)
    status, text = show(store, verify=True)
    assert status == 1
    assert f"a in {store}: 4 checkpoints, all sound" in text
    assert f"a in {remote}: 4 checkpoints, 1 damaged" in text


@pytest.mark.parametrize("count", [2, 3, 7, 29, 1000])
def test_pruned_steps_are_spread_in_log_time(count):
    steps = range(0, 5000, 7)
    kept = spread_in_log_time(steps, count)
    assert len(kept) == min(count, len(steps))
    assert set(kept) <= set(steps)
    assert (kept[0], kept[-1]) == (0, 4998)
    if count == 29:
        late = [step for step in kept if step > 60]
        gaps = [math.log((b + 1) / (a + 1)) for a, b in itertools.pairwise(late)]
        assert max(gaps) < 2.1 * min(gaps)  # repeated halving, as long as the grid is fine enough to halve


def test_too_few_to_keep_is_refused():
    with pytest.raises(ValueError, match="keep 2 or more"):
        spread_in_log_time(range(9), 1)


def test_prune_keeps_the_chosen_the_states_and_a_running_run(store):
    run = fill(store, "a")
    with run.lock(), pytest.raises(RunInUseError, match="the run a is in use by process"):
        prune_run(store, "a", {0})
    status, text = show(store, prune=3)
    assert status == 0
    assert "kept 3 checkpoints, removed 1" in text
    assert run.steps() == [0, 10, 100]
    assert run.states() == [101]


def test_a_copy_is_equal_resumable_and_never_half_finished(tmp_path, store):
    run, target = fill(store, "a", finished=True), LocalStore(tmp_path / "target")
    damage(store, run.weights_key(10))
    report = copy_run(store, target, "a")
    assert (report.copied, report.present, len(report.problems)) == (5, 0, 1)
    assert "10.safetensors was altered" in report.problems[0].reason
    assert Checkpoints(target, "a").finished_step() is None
    run.save(10, {"w": torch.full((5, 3), 10.0)})
    status, text = show(store, copy=(str(store.root), str(target.root)))
    assert status == 0
    assert "4 were there, 0 failed" in text
    assert {key: target.get(key) for key in target.list()} == {key: store.get(key) for key in store.list()}
    assert Checkpoints(target, "a").finished_step() == 100
    with Checkpoints(target, "a").lock(), pytest.raises(RunInUseError):
        copy_run(store, target, "a")


def test_the_command_refuses_what_makes_no_sense(store):
    fill(store, "a")
    for options, message in (
        ({"verify": True, "prune": 3}, "choose one of"),
        ({"name": "b"}, "there is no run 'b'"),
        ({"copy": ("gs://x", "y")}, "is not a storage location"),
        ({"prune": 1}, "keep 2 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            show(store, **options)
    with pytest.raises(CheckpointError, match="must not contain a slash"):
        Checkpoints(store, "a/b")


def history(store, name, states, rows, steps=()):
    """A run that stands at `states`, with so many rows of metrics."""
    run = Checkpoints(store, name)
    for step in steps:
        run.save(step, {"w": torch.full((3,), float(step))})
    for step in states:
        run.save_state(step, {"w": torch.full((3,), float(step))})
    store.put(f"icl/{name}/metrics.jsonl", b"".join(b'{"step": %d}\n' % step for step in range(rows)))
    store.put(f"icl/{name}/summary.json", b'{"rows": %d}' % rows)
    return run


@pytest.mark.parametrize(
    ("here", "there", "longer"),
    [
        (([5], 6), ([10, 11], 11), True),
        (([5], 6, (0, 3)), ([], 20, (0, 9)), True),  # the destination's states are lost
        (([], 6), ([], 20), True),
        (([10, 11], 11), ([5], 6), False),
        (([10], 11), ([10], 6), False),
        (([], 20), ([], 6), False),
    ],
)
def test_a_copy_never_replaces_a_longer_history_by_a_shorter_one(tmp_path, here, there, longer):
    source, destination = LocalStore(tmp_path / "source"), LocalStore(tmp_path / "destination")
    history(source, "a", *here)
    history(destination, "a", *there)
    before = {key: destination.get(key) for key in destination.list()}
    report = copy_run(source, destination, "a")
    after = {key: destination.get(key) for key in destination.list()}
    assert report.longer is longer
    if longer:
        assert {key: after[key] for key in before} == before
        assert {key.rpartition("/")[2] for key in after.keys() - before.keys()} <= {"3.safetensors"}
    else:
        assert after["icl/a/metrics.jsonl"] == source.get("icl/a/metrics.jsonl")
        assert after["icl/a/summary.json"] == source.get("icl/a/summary.json")
        assert max(Checkpoints(destination, "a").states(), default=-1) == max(here[0], default=-1)


def test_one_run_that_fails_does_not_keep_the_others_from_being_copied_or_verified(tmp_path, store, monkeypatch):
    for name in "abc":
        fill(store, name)
    target = LocalStore(tmp_path / "target")
    other = fill(target, "b")
    other.save_config({"num_steps": 7})
    status, text = show(store, copy=(str(store.root), str(target.root)))
    assert status == 1
    assert "num_steps=7, not 500000" in text
    assert Checkpoints(target, "c").steps() == [0, 1, 10, 100]
    assert other.config() == {"num_steps": 7}

    def refuse(place, name, *_):
        if name == "a":
            raise StorageError("cannot list a")
        return []

    monkeypatch.setattr("icl.commands.runs.verify_run", refuse)
    status, text = show(store, verify=True)
    assert status == 1
    assert "damaged: cannot list a" in text
    assert text.count("all sound") == 2


def test_huge_and_odd_files_are_named_and_do_not_end_the_command(store):
    run = fill(store, "a")
    with (store.root / "icl/a/1000.safetensors").open("wb") as file:
        file.truncate(10 * 2**30)
    os.mkfifo(store.root / "icl/a/7.safetensors")
    (store.root / "icl/b").mkdir()
    (store.root / "icl/b/loop").symlink_to(".")
    assert [summary.name for summary in list_runs(store)] == ["a"]
    assert [problem.key for problem in verify_run(store, "a")] == ["icl/a/1000.safetensors"]
    with pytest.raises(StorageError, match="a pipe, a socket or a device"):
        run.load(7)


def test_verify_names_metrics_that_lack_rows(store):
    run = history(store, "a", [], 5)
    run.save_state(5, {"w": torch.zeros(3)}, {"rows": 5})
    assert verify_run(store, "a") == []
    run.save_state(7, {"w": torch.zeros(3)}, {"rows": 7})
    assert [problem.reason for problem in verify_run(store, "a")] == ["icl/a/metrics.jsonl lacks rows"]


def test_a_root_that_is_not_there_is_no_empty_list(tmp_path):
    for action in ((False, None, None, None), (True, None, None, None), (False, 3, None, None)):
        with pytest.raises(ValueError, match="set LOCAL_ROOT"):
            runs_command(*action, {"LOCAL_ROOT": str(tmp_path / "nowhere")})
    assert not (tmp_path / "nowhere").exists()
