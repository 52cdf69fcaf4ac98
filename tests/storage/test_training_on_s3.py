"""Training with a bucket: killed, and resumed on another machine from the bucket alone, over a wire that fails."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from s3_faults import FAULTS, FaultProxy, at_random

from icl.checkpoints import Checkpoints
from icl.config import TrainingConfig
from icl.jobs import Surroundings, run_training
from icl.runs import list_runs, verify_run
from icl.storage import LocalStore, MirroredStore, S3Store

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
from icl.training import FlatOptimizer
update = FlatOptimizer.update
FlatOptimizer.update = lambda *args: (time.sleep(0.02), update(*args))[1]  # time for uploads before the kill
store = t.MirroredStore(t.LocalStore(sys.argv[1]), t.S3Store(sys.argv[2]))
t.run_training(t.TrainingConfig.parse(t.CONFIG), t.surroundings(store, sys.argv[1]))
"""


def surroundings(store, root):
    return Surroundings(store, Path(root) / "icl", torch.device("cpu"), tracking="local")


def contents(store, prefix):
    return {key: store.get(key) for key in store.list(prefix)}


def test_a_killed_run_goes_on_from_the_bucket_alone(tmp_path, bucket, s3_server, monkeypatch):
    config = TrainingConfig.parse(CONFIG).resolved()
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_TRAINING, str(tmp_path / "lost"), bucket],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent) + os.pathsep + str(Path(__file__).parents[1])},
    ) as process:
        watch = Checkpoints(S3Store(bucket, listing_lifetime_s=0.0), config.name)
        deadline = time.monotonic() + 120
        while len(watch.steps()) < 5 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None, "the run ended before it was killed"
        process.send_signal(signal.SIGKILL)
    in_bucket = S3Store(bucket)
    assert verify_run(in_bucket, config.name) == []
    assert [run.state for run in list_runs(in_bucket)] == ["interrupted"]
    resumed_from = Checkpoints(in_bucket, config.name).newest_state().step
    assert 0 < resumed_from < config.num_steps

    with FaultProxy(s3_server, at_random(FAULTS, 0.1, seed=1), stall_s=1.0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        remote = S3Store(bucket, connect_timeout_s=1.0, read_timeout_s=0.5, attempts=6)
        other_machine = MirroredStore(LocalStore(tmp_path / "empty"), remote, first_pause_s=0.01)
        assert run_training(config, surroundings(other_machine, tmp_path / "empty")).finished
        while other_machine.flush():
            pass
        assert proxy.injected.total() > 2
        proxy.schedule = iter(())
        whole = LocalStore(tmp_path / "whole")
        run_training(config, surroundings(whole, tmp_path / "whole"))
        assert contents(S3Store(bucket), "icl") == contents(whole, "icl")


SECRETS = ("planted/SECRET+value", "PLANTEDKEYID")


def secrets_in(text):
    return [secret for secret in SECRETS if secret in (text.decode("latin-1") if isinstance(text, bytes) else text)]


def test_credentials_reach_no_file_and_no_output(tmp_path, bucket):
    """Also from a .env file, through the command line, with a run that fails to upload and one that does not."""
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
    for endpoint, steps in ((os.environ["AWS_ENDPOINT_URL"], 20), ("http://127.0.0.1:9", 21)):
        result = subprocess.run(
            [sys.executable, "-m", "icl", "train", str(sweep), "--set", f"num_steps={steps}"],
            cwd=tmp_path,
            env={**environ, "AWS_ENDPOINT_URL": endpoint, "AWS_MAX_ATTEMPTS": "1"},
            capture_output=True,
            text=True,
        )
        assert not secrets_in(result.stdout + result.stderr)
    doctor = subprocess.run(
        [sys.executable, "-m", "icl", "doctor"], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert not secrets_in(doctor.stdout + doctor.stderr)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".env"]
    assert len(written) > 20
    assert not [path for path in written if secrets_in(path.read_bytes())]
    stored = contents(S3Store(bucket), "")
    assert stored
    assert not [key for key, data in stored.items() if secrets_in(data)]
