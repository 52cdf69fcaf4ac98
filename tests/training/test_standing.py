"""From where a run goes on: a state is taken whole or not at all, and vouches for the rows before it."""

import itertools
import json

import pytest
import torch

from icl.checkpoints import CheckpointError, Checkpoints
from icl.checkpoints.format import encode
from icl.config import TrainingConfig
from icl.storage import LocalStore
from icl.tracking import LocalTracker, NullTracker, read_metrics
from icl.training import first_missing_step, train

P = 138
SETTINGS = {
    "task_config": {
        "task_size": 2, "max_examples": 3, "embed_size": 4, "mlp_size": 5, "num_heads": 1, "num_layers": 1, "model_seed": 1, "num_tasks": 7,
    },
    "num_steps": 20,
    "batch_size": 3,
    "eval_batch_size": 3,
    "checkpointer_config": {"checkpoint_steps": {"linear_space": 5}, "state_every": 5},
    "logger_config": {"logging_steps": {"linear_space": 3}, "loss_every": 1},
    "run_name": "run",
}  # fmt: skip
OPTIMIZERS = {
    "Adam": {"optimizer_type": "Adam"},
    "AdamW": {"optimizer_type": "AdamW"},
    "SGD": {"optimizer_type": "SGD"},
    "momentum": {"optimizer_type": "SGD", "momentum": 0.9},
}


def config_of(optimizer="Adam", **changes) -> TrainingConfig:
    return TrainingConfig.parse({**SETTINGS, "optimizer_config": OPTIMIZERS[optimizer], **changes}).resolved()


def run(root, config=None, stop_after=None, record=True):
    """Train, or go on; returns (where it stood, whether it is finished)."""
    config = config or config_of()
    checkpoints = Checkpoints(LocalStore(root), "run")
    counter = itertools.count()
    with checkpoints.lock():
        start = first_missing_step(config, checkpoints)
        checkpoints.save_config(config.model_dump(mode="json"))
        tracker = LocalTracker(root / "icl/run", start) if record else NullTracker()
        outcome = train(
            config, checkpoints, tracker, should_stop=lambda: stop_after is not None and next(counter) >= stop_after
        )
        tracker.finish()
        if outcome.finished:
            checkpoints.mark_finished(config.num_steps - 1)
    return start, outcome.finished


def contents(root):
    folder = root / "icl/run"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    assert run(root) == (0, True)
    return contents(root)


# What the optimiser takes for its memory

FORGERIES = {
    "short moments": lambda t: {k: v[:5] if v.dim() and k != "flat" else v for k, v in t.items()},
    "long moments": lambda t: {k: torch.cat([v, v]) if v.dim() and k != "flat" else v for k, v in t.items()},
    "one moment short": lambda t: {k: v[:-1] if k != "flat" and v.dim() else v for k, v in list(t.items())},
    "no moments": lambda t: {k: t[k] for k in ("flat",)},
    "no flat": lambda t: {k: v for k, v in t.items() if k != "flat"} | ({} if len(t) > 1 else {"flats": t["flat"]}),
    "short": lambda t: {k: v[:5] if v.dim() else v for k, v in t.items()},
    "a matrix": lambda t: {k: v[None] for k, v in t.items()},
    "half": lambda t: {k: v.half() for k, v in t.items()},
    "double": lambda t: {k: v.double() for k, v in t.items()},
    "whole numbers": lambda t: {k: v.long() for k, v in t.items()},
    "other names": lambda t: {k.upper(): v for k, v in t.items()},
    "one more": lambda t: {**t, "exp_avg_sqq": torch.zeros(3)},
    "nothing": lambda t: {},
    "empty": lambda t: {k: torch.zeros(0) for k in t},
    "another count": lambda t: {**t, "step": torch.tensor(3.0)},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_state_of_another_form_never_reaches_the_optimiser(tmp_path, optimizer, forgery):
    config = config_of(optimizer)
    run(tmp_path, config, stop_after=11)
    checkpoints = Checkpoints(LocalStore(tmp_path), "run")
    state = checkpoints.newest_state()
    forged = FORGERIES[forgery](dict(state.tensors))
    if forged.keys() == state.tensors.keys() and all(torch.equal(forged[k], v) for k, v in state.tensors.items()):
        return  # plain SGD has nothing but its weights
    for step in checkpoints.states():
        checkpoints.store.delete(checkpoints.state_key(step))
    checkpoints.store.put(checkpoints.state_key(state.step), encode(state.step, forged, state.metadata, "state"))
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=f"icl/run/state-{state.step}.safetensors ") as caught:
        run(tmp_path, config)
    assert "\n" not in str(caught.value)
    assert {**contents(tmp_path), ".lock-holder.json": b""} == {**before, ".lock-holder.json": b""}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_its_own_state_of_every_optimiser_is_taken(tmp_path, optimizer):
    config = config_of(optimizer)
    run(tmp_path, config, stop_after=11)
    assert run(tmp_path, config) == (11, True)


# Rows that a state vouches for


def rewrite(root, change):
    path = root / "icl/run/metrics.jsonl"
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


SPOILT = {
    "nulls": lambda lines: [lines[0], bytes(len(lines[1]) - 1) + b"\n", *lines[2:]],
    "torn in the middle": lambda lines: [lines[0], lines[1][:20] + b"\n", *lines[2:]],
    "glued": lambda lines: [lines[0], lines[1][:-1], *lines[2:]],
    "another step": lambda lines: [lines[0], b'{"step": 900, "x": 1}\n', *lines[2:]],
    "no step": lambda lines: [lines[0], b'{"x": 1}\n', *lines[2:]],
    "a step that is none": lambda lines: [lines[0], b'{"step": true}\n', b'{"step": "3"}\n', *lines[3:]],
    "missing": lambda lines: [lines[0], *lines[2:]],
    "the first": lambda lines: lines[1:],
    "the second half": lambda lines: lines[: len(lines) // 2],
    "the last": lambda lines: lines[:-1],
    "all": lambda lines: [],
}


@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("stop_after", [11, None])
def test_rows_that_are_lost_are_written_again(tmp_path, whole, caplog, spoilt, stop_after):
    run(tmp_path, stop_after=stop_after)
    rewrite(tmp_path, SPOILT[spoilt])
    start, finished = run(tmp_path)
    assert (start, finished) == (10 if stop_after == 11 and spoilt == "the last" else 0, True)
    assert [row["step"] for row in read_metrics(tmp_path / "icl/run")] == list(range(20))
    assert "to write them again" in caplog.text
    after = contents(tmp_path)
    aside = after.pop("metrics.jsonl.damaged", b"")
    assert after == whole
    assert bool(aside) == (spoilt in ("nulls", "torn in the middle", "glued", "no step", "a step that is none"))


def test_a_record_that_is_gone_is_written_again(tmp_path, whole):
    run(tmp_path)
    (tmp_path / "icl/run/metrics.jsonl").unlink()
    assert run(tmp_path) == (0, True)
    assert contents(tmp_path) == whole


def test_a_torn_last_line_costs_nothing(tmp_path, whole):
    run(tmp_path, stop_after=11)
    with (tmp_path / "icl/run/metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 11, "batch/lo')
    assert run(tmp_path) == (11, True)
    assert contents(tmp_path) == whole


def test_a_run_without_a_record_vouches_for_none(tmp_path):
    assert run(tmp_path, stop_after=11, record=False) == (0, False)
    assert run(tmp_path) == (11, True)
    assert [row["step"] for row in read_metrics(tmp_path / "icl/run")] == list(range(11, 20))
    assert run(tmp_path) == (20, True)


def test_another_grid_of_logs_does_not_make_rows_missing(tmp_path):
    coarse = config_of(logger_config={"logging_steps": {"linear_space": 2}, "loss_every": 10})
    run(tmp_path, coarse, stop_after=2)
    assert run(tmp_path)[0] > 0
    assert run(tmp_path, coarse) == (20, True)


@pytest.mark.parametrize("name", ["summary.json", "finished.json", "config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"null", bytes(50), b"\xff\xfe", b"[" * 100_000, b'{"step": "x"}']
)
@pytest.mark.parametrize("stop_after", [11, None])
def test_a_damaged_record_of_one_object_is_written_anew(tmp_path, whole, name, content, stop_after):
    run(tmp_path, stop_after=stop_after)
    if name != "finished.json" and content.startswith(b'{"'):
        content = b""  # an object: the configuration of another run, or numbers of a summary
    (tmp_path / "icl/run" / name).write_bytes(content)
    assert run(tmp_path) == (stop_after or 20, True)
    after = contents(tmp_path)
    if stop_after is None:  # a finished run has no last evaluation to sum up again
        after["summary.json"] = whole["summary.json"]
    assert after == whole


def test_the_number_of_rows_is_stored_with_the_state_and_not_with_the_weights(whole):
    def metadata(name):
        length = int.from_bytes(whole[name][:8], "little")
        return json.loads(json.loads(whole[name][8 : 8 + length])["__metadata__"]["icl"])["metadata"]

    assert metadata("state-20.safetensors")["rows"] == 20
    assert set(metadata("19.safetensors")) == {"config"}
