"""Training with a bucket: killed, and resumed on another machine from the bucket alone, over a wire that fails."""

import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from endpoints import Endpoint, error
from rich.console import Console
from s3_faults import FAULTS, FaultProxy, at_random

from icl import training
from icl.checkpoints import Checkpoints
from icl.checkpoints.runs import list_runs, verify_run
from icl.commands.runs import runs_command
from icl.config import TrainingConfig
from icl.execution.surroundings import Surroundings
from icl.execution.training_runs import run_training
from icl.storage import LocalStore, MirroredStore, S3Store
from icl.training import first_missing_step

CONFIG = {
    "task_config": {
        "task_size": 3, "max_examples": 5, "num_tasks": "inf", "embed_size": 14, "mlp_size": 11, "num_heads": 2, "num_layers": 2,
        "model_seed": 1,
    },
    "num_steps": 200,
    "batch_size": 13,
    "eval_batch_size": 17,
    "checkpointer_config": {"checkpoint_steps": {"linear_space": 20}, "state_every": 10},
    "logger_config": {"logging_steps": {"linear_space": 4}, "loss_every": 50},
}  # fmt: skip

SLOW_TRAINING = """
import sys, time, torch
import test_training_on_s3 as t
from icl.training.optimizers import FlatOptimizer
update = FlatOptimizer.update
FlatOptimizer.update = lambda *args: (time.sleep(0.02), update(*args))[1]  # time for uploads before the kill
store = t.MirroredStore(t.LocalStore(sys.argv[1]), t.S3Store(sys.argv[2]))
t.run_training(t.TrainingConfig.parse(t.CONFIG), t.surroundings(store, sys.argv[1]))
"""


def surroundings(store, root):
    return Surroundings(store, Path(root) / "icl", torch.device("cpu"), tracking="local")


def contents(store, prefix):
    return {key: store.get(key) for key in store.list(prefix)}


def train(config, store, root):
    assert run_training(config, surroundings(store, root)).finished


def train_until_killed(root, run, more_steps):
    """Train in another process on the folder `root`, and SIGKILL it once the bucket has so many checkpoints more."""
    before = len(run.steps())
    path = os.pathsep.join(str(Path(__file__).parents[up]) for up in (0, 1))
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_TRAINING, str(root), run.store.bucket],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        deadline = time.monotonic() + 240
        while len(run.steps()) < before + more_steps and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        alive = process.poll() is None
        process.send_signal(signal.SIGKILL)
        assert alive, f"the run ended before it was killed: {process.stdout.read()}"


@pytest.mark.parametrize(
    ("kills", "rate", "stall_s"), [(1, 0.1, 1.0), pytest.param(5, 0.25, 10.0, marks=pytest.mark.slow)]
)
def test_a_killed_run_goes_on_from_the_bucket_alone(
    tmp_path, bucket, s3_server, monkeypatch, whole, kills, rate, stall_s
):
    """Every start is on an empty disk, and every byte but those of the test's own checks passes a wire that fails."""
    config = TrainingConfig.parse(CONFIG).resolved()
    in_bucket = S3Store(bucket, listing_lifetime_s=0.0)
    run = Checkpoints(in_bucket, config.name)
    in_bucket.list()  # with the client made, the address of the server itself is remembered
    start = time.monotonic()
    with FaultProxy(s3_server, at_random(FAULTS, rate, seed=1), stall_s) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for kill in range(kills):
            before = run.states()
            train_until_killed(tmp_path / f"lost-{kill}", run, more_steps=2)
            assert verify_run(in_bucket, config.name) == []
            assert [each.state for each in list_runs(in_bucket)] == ["interrupted"]
            assert run.newest_state() is not None
            assert max(run.states()) >= max(before, default=0)
        remote = S3Store(bucket, read_timeout_s=min(0.5, stall_s / 2) if stall_s < 2 else 20.0, attempts=6)
        other_machine = MirroredStore(LocalStore(tmp_path / "empty"), remote, first_pause_s=0.01)
        train(config, other_machine, tmp_path / "empty")
        while other_machine.flush():
            pass
        assert verify_run(S3Store(bucket, attempts=12), config.name) == []
    print(
        f"{kills} kills, {proxy.injected.total()} faults in {proxy.requests.total()} requests injected and survived in "
        f"{time.monotonic() - start:.0f} s: {dict(proxy.injected)}"
    )
    assert proxy.injected.total() > 2
    assert contents(in_bucket, "icl") == whole


def interrupted_at(config, store, root, step):
    """Train `config` up to a step, as a person does who stops it."""
    place = surroundings(store, root)
    checkpoints = place.checkpoints(config)
    with checkpoints.lock():
        checkpoints.save_config(config.model_dump(mode="json"))
        tracker = place.open_tracker(config.name, config, config.logger_config, first_missing_step(config, checkpoints))
        done = 0

        def count(steps, loss):
            nonlocal done
            done = steps

        training.train(config, checkpoints, tracker, on_step=count, should_stop=lambda: done >= step)
        tracker.finish("interrupted")
        return checkpoints.flush()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of the run that nothing happened to."""
    root = tmp_path_factory.mktemp("whole")
    store = LocalStore(root)
    train(TrainingConfig.parse(CONFIG).resolved(), store, root)
    return contents(store, "icl")


def test_a_machine_that_is_behind_continues_the_longer_history(tmp_path, bucket, whole):
    """First here, then there, then here again: the old files of this machine replace nothing newer."""
    config = TrainingConfig.parse(CONFIG).resolved()
    for machine, step in (("here", 60), ("there", 130)):
        store = MirroredStore(LocalStore(tmp_path / machine), S3Store(bucket))
        assert interrupted_at(config, store, tmp_path / machine, step) == ()
    store = MirroredStore(LocalStore(tmp_path / "here"), S3Store(bucket))
    run = surroundings(store, tmp_path / "here").checkpoints(config)
    with run.lock():  # under which the longer history is fetched, its rows with its states
        assert first_missing_step(config, run) == 130
    train(config, store, tmp_path / "here")
    assert contents(S3Store(bucket), "icl") == whole
    assert (tmp_path / "here/icl" / config.name / "metrics.jsonl").read_bytes() == whole[
        f"icl/{config.name}/metrics.jsonl"
    ]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_bucket_that_cannot_be_reached_at_the_start_stops_no_run_and_loses_nothing(
    tmp_path, bucket, s3_server, s3_through, whole, caplog
):
    """The bucket holds 130 steps, this machine nothing: it trains anew, and sends nothing before it has got as far."""
    config = TrainingConfig.parse(CONFIG).resolved()
    there = MirroredStore(LocalStore(tmp_path / "there"), S3Store(bucket))
    assert interrupted_at(config, there, tmp_path / "there", 130) == ()
    before = contents(S3Store(bucket), "icl")
    port, root = free_port(), tmp_path / "here"
    remote = s3_through(f"http://127.0.0.1:{port}", attempts=1, listing_lifetime_s=0.0)
    store = MirroredStore(LocalStore(root), remote, first_pause_s=0.01, longest_pause_s=0.05)
    caplog.clear()
    assert interrupted_at(config, store, root, 60) != ()  # no service at all
    with FaultProxy(s3_server, port=port):
        unsent = store.flush()
        assert f"icl/{config.name}/state-60.safetensors" in unsent
        assert contents(S3Store(bucket), "icl") == before
        assert store.flush() == unsent
    messages = [record.message for record in caplog.records]
    assert sum("The run goes on with what is in folder" in message for message in messages) == 1
    assert sum("holds a longer history" in message and "stop and start again" in message for message in messages) >= 1
    assert not any("is repeated" in message for message in messages)

    again = MirroredStore(LocalStore(root), s3_through(f"http://127.0.0.1:{free_port()}", attempts=1))
    train(config, again, root)  # still no service, up to the end
    assert contents(again.local, "icl") == whole
    sent = MirroredStore(LocalStore(root), s3_through(f"http://{s3_server[0]}:{s3_server[1]}"))
    train(config, sent, root)
    assert contents(S3Store(bucket), "icl") == whole


def test_a_copy_from_the_bucket_is_a_run_that_goes_on(tmp_path, bucket, whole):
    config = TrainingConfig.parse(CONFIG).resolved()
    there = MirroredStore(LocalStore(tmp_path / "there"), S3Store(bucket))
    interrupted_at(config, there, tmp_path / "there", 70)
    console = Console(file=io.StringIO(), width=200)
    copy = (f"s3://{bucket}", str(tmp_path / "copy"))
    assert runs_command(verify=False, prune=None, copy=copy, name=None, console=console) == 0
    assert "files (" in console.file.getvalue()
    assert ", 0 failed" in console.file.getvalue()
    train(config, LocalStore(tmp_path / "copy"), tmp_path / "copy")
    assert contents(LocalStore(tmp_path / "copy"), "icl") == whole


SECRETS = ("planted/SECRET+value", "PLANTEDKEYID")


def secrets_in(text):
    return [secret for secret in SECRETS if secret in (text.decode("latin-1") if isinstance(text, bytes) else text)]


def test_credentials_reach_no_file_and_no_output(tmp_path, bucket):
    """Also from a .env file, through the command line, with a run that fails to upload and one that does not; nor where
    the service quotes them, as S3 does."""
    sweep = tmp_path / "sweep.yaml"
    parameters = "\n".join(f"  {key}: {{value: {value!r}}}" for key, value in CONFIG.items())
    sweep.write_text(f"program: icl train\nmethod: grid\nparameters:\n{parameters}\n".replace("'inf'", "inf"))
    (tmp_path / ".env").write_text(
        f"AWS_ACCESS_KEY_ID=PLANTEDKEYID\nAWS_SECRET_ACCESS_KEY=planted/SECRET+value\nAWS_BUCKET_NAME={bucket}\nWANDB_API_KEY=PLANTEDKEYID\n"
    )
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(("AWS_ACCESS", "AWS_SECRET", "WANDB"))
    }
    environ |= {"WANDB_MODE": "disabled"}
    outputs = []
    quoted = f"<AWSAccessKeyId>{SECRETS[1]}</AWSAccessKeyId><StringToSign>{SECRETS[0]}</StringToSign>"
    with Endpoint(error(403, "SignatureDoesNotMatch", SECRETS[0], quoted)) as refusing:
        for endpoint, steps in ((os.environ["AWS_ENDPOINT_URL"], 20), (refusing.url, 21)):
            result = subprocess.run(
                [sys.executable, "-m", "icl", "train", str(sweep), "--set", f"num_steps={steps}"],
                cwd=tmp_path,
                env={**environ, "AWS_ENDPOINT_URL": endpoint},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            outputs.append(result.stdout + result.stderr)
            # Where the bucket does not take it, the run is made on this machine all the same.
            assert result.returncode == 0, outputs[-1]
    assert "not sent" not in outputs[0]
    assert "the service refuses these credentials" in outputs[1]
    assert "all are in folder" in outputs[1]
    doctor = subprocess.run(
        [sys.executable, "-m", "icl", "doctor"],
        cwd=tmp_path, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert not [text for text in (*outputs, doctor.stdout, doctor.stderr) if secrets_in(text)]
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".env"]
    assert len(written) > 40, [str(path.relative_to(tmp_path)) for path in written]
    assert not [path for path in written if secrets_in(path.read_bytes())]
    stored = contents(S3Store(bucket), "")
    assert len(stored) > 20, list(stored)
    assert not [key for key, data in stored.items() if secrets_in(data)]
