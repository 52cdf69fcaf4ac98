"""Two machines, one run, one bucket: whatever happens to them, no state and no row is lost, and one of them is told."""

import os
import random
import signal
import time

import pytest
import torch
from bucket_writers import CONFIG, DONE, TOLD, Machine

from icl.checkpoints import Checkpoints
from icl.checkpoints.runs import verify_run
from icl.config import TrainingConfig
from icl.execution.surroundings import Surroundings
from icl.execution.training_runs import run_training
from icl.storage import LocalStore, S3Store

LIFETIME_S = 3.0
ROWS = "metrics.jsonl"


class Watch:
    """What has been in the bucket, looked at again and again: nothing may go that is not replaced by more."""

    def __init__(self, bucket, name):
        self.run = Checkpoints(S3Store(bucket, listing_lifetime_s=0.0), name)
        self.newest, self.rows, self.steps = -1, 0, set()

    def look(self):
        sizes = self.run.store.sizes(self.run.prefix)
        names = {key.removeprefix(f"{self.run.prefix}/"): size for key, size in sizes.items()}
        states = [int(name[6:-12]) for name in names if name.startswith("state-")]
        steps, rows = set(self.run.steps_among(names)), names.get(ROWS, 0)
        assert max(states, default=-1) >= self.newest
        assert rows >= self.rows
        assert steps >= self.steps
        self.newest, self.rows, self.steps = max(states, default=-1), rows, steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of the run that nothing happened to."""
    root = tmp_path_factory.mktemp("whole")
    store = LocalStore(root)
    run_training(TrainingConfig.parse(CONFIG), Surroundings(store, root / "icl", torch.device("cpu"), tracking="local"))
    return {key: store.get(key) for key in store.list("icl")}


def settle(machine, watch, whole):
    """The bucket holds the whole run. Beside it there may be a state that was on its way when its writer was frozen: a
    service cannot tell a request that was long under way from one that comes late. The next start drops it."""
    files = {key: watch.run.store.get(key) for key in watch.run.store.list("icl")}
    assert {key: data for key, data in files.items() if key in whole} == whole
    assert all("/state-" in key for key in files.keys() - whole.keys())
    machine.start()
    assert machine.wait(60) == DONE
    assert {key: watch.run.store.get(key) for key in watch.run.store.list("icl")} == whole


def interleaving(seed, bucket, folder, whole):
    """Start, kill, freeze and stop two machines at random until the run is done; returns what happened."""
    draw = random.Random(seed)
    name = TrainingConfig.parse(CONFIG).resolved().name
    watch, happened = Watch(bucket, name), []
    machines = [Machine(bucket, folder / each, LIFETIME_S, 0.02) for each in ("a", "b")]
    deadline, frozen = time.monotonic() + 1200, []  # a busy machine
    machines[0].start()
    while watch.newest < 0:
        assert machines[0].running()
        watch.look()
        time.sleep(0.1)
    machines[1].start()  # beside a living writer: this one must be told
    while True:
        running = [machine for machine in machines if machine.running()]
        endings = [ending for machine in machines for ending in machine.endings]
        assert time.monotonic() < deadline, (happened, endings, frozen)
        if DONE in endings and not running:
            break
        watch.look()
        time.sleep(draw.uniform(0.0, 0.4))
        machine = draw.choice(machines)
        if machine in frozen:
            if draw.random() < 0.2:
                machine.send(signal.SIGCONT)
                frozen.remove(machine)
        elif machine not in running:
            if DONE not in endings:
                machine.start()
                happened.append("start")
        elif len(happened) < 12 and TOLD in endings:
            act = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, None, None])
            if act is not None:
                machine.send(act)
                happened.append(act.name)
            if act is signal.SIGSTOP:
                frozen.append(machine)
    watch.look()
    settle(machines[0], watch, whole)
    assert verify_run(watch.run.store, name) == []
    told = sum(machine.endings.count(TOLD) for machine in machines)
    assert told > 0
    for machine in machines:
        assert set(machine.endings) <= {0, 1, TOLD, -signal.SIGKILL}, (folder / "a.log").read_text()
    return {"told": told, **{each: happened.count(each) for each in sorted(set(happened))}}


@pytest.fixture
def buckets(s3_environment):
    """Makes empty buckets."""
    import boto3

    client = boto3.session.Session().client("s3")

    def make(label):
        name = f"two-writers-{label}-{os.getpid()}"
        client.create_bucket(Bucket=name)
        return name

    return make


def test_the_second_is_told_and_one_that_was_frozen_finds_out(buckets, tmp_path, whole):
    bucket, name = buckets("short"), TrainingConfig.parse(CONFIG).resolved().name
    first, second = (Machine(bucket, tmp_path / each, LIFETIME_S, step_s) for each, step_s in (("a", 0.05), ("b", 0.0)))
    watch = Watch(bucket, name)
    first.start()
    while watch.newest < 0:
        assert first.running()
        watch.look()
        time.sleep(0.05)
    second.start()
    assert second.wait(60) == TOLD
    first.send(signal.SIGSTOP)
    second.start()
    assert second.wait(60) == DONE
    first.send(signal.SIGCONT)
    assert first.wait(60) == TOLD
    settle(second, watch, whole)
    told = [(tmp_path / f"{each}.log").read_text().splitlines()[0] for each in ("a", "b")]
    assert "was taken over by process" in told[0]
    assert "is in use by process" in told[1]


@pytest.mark.slow
def test_whatever_happens_to_two_machines_nothing_is_lost(buckets, tmp_path, whole):
    for seed in range(20):
        start = time.monotonic()
        happened = interleaving(seed, buckets(seed), tmp_path / str(seed), whole)
        print(f"interleaving {seed}: {happened}, {time.monotonic() - start:.0f} s")
