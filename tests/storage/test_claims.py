"""Two machines and one bucket: one writes, the other is told; what was left behind is taken over; nothing is lost."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import pytest
from s3_faults import FaultProxy, at_random

from icl.checkpoints import Checkpoints
from icl.checkpoints.runs import list_runs
from icl.execution.signals import stop_signal
from icl.storage import LocalStore, MirroredStore, S3Store, StorageError
from icl.storage.claims import CLAIM, Claim, Seen
from icl.storage.locks import RunInUseError

LIFETIME_S = 2.0


def machine(bucket, **options):
    """A store as another machine has one: with a client, listings and claims of its own."""
    return S3Store(bucket, **{"claim_lifetime_s": LIFETIME_S, "listing_lifetime_s": 0.0, **options})


def age(bucket, name, seconds):
    """Let the service believe that an object was written so much earlier."""
    from moto.s3.models import s3_backends

    backends = (each for account in s3_backends.values() for each in account.values() if bucket in each.buckets)
    next(backends).get_object(bucket, name).last_modified -= timedelta(seconds=seconds)


@contextmanager
def frozen(monkeypatch):
    """Claims made meanwhile are not renewed, as by a process that was stopped."""
    with monkeypatch.context() as patch:
        patch.setattr(Claim, "_renew_until", lambda *_: None)
        yield


def test_a_second_machine_is_told_who_writes_and_the_next_one_goes_on_at_once(bucket):
    first, second = machine(bucket), machine(bucket)
    start = time.monotonic()
    with first.claim("icl/run").held("the run run"):
        first.put("icl/run/1", b"x")
        message = rf"the run run is in use by process {os.getpid()} on \S+ since \S+; wait for it, stop it, or choose"
        with pytest.raises(RunInUseError, match=message), second.claim("icl/run").held("the run run", wait_s=0.1):
            pytest.fail("two writers")
        assert str(second.claim("icl/run").holder()).startswith(f"process {os.getpid()} on ")
        with second.claim("icl/run-2").held("the run run-2"):  # another folder is free
            second.put("icl/run-2/1", b"x")
        with pytest.raises(RunInUseError):
            second.put("icl/run/1", b"theirs")
        time.sleep(1.5 * LIFETIME_S)  # renewed meanwhile
        first.put("icl/run/2", b"x")
    assert second.claim("icl/run").holder() is None
    with second.claim("icl/run").held("the run run"):
        second.put("icl/run/3", b"x")
    assert time.monotonic() - start < 1.5 * LIFETIME_S + 8
    assert second.list() == ["icl/run-2/1", "icl/run/1", "icl/run/2", "icl/run/3"]  # no claim among them


def test_of_many_that_start_at_once_one_gets_the_claim(bucket):
    begin, end = threading.Barrier(8), threading.Event()
    held, told = [], []

    def start(number):
        store = machine(bucket)
        store.list()  # the client is made
        begin.wait()
        try:
            with store.claim("icl/run").held("the run", wait_s=0.1):
                held.append(number)
                end.wait(30)
        except RunInUseError:
            told.append(number)

    threads = [threading.Thread(target=start, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while len(told) < 7 and time.monotonic() < deadline:
        time.sleep(0.05)
    end.set()
    for thread in threads:
        thread.join()
    assert (len(held), len(told)) == (1, 7)


def test_a_claim_that_is_not_renewed_is_taken_over_and_its_writer_notices_before_it_writes(bucket, monkeypatch, caplog):
    first, second = machine(bucket), machine(bucket)
    with pytest.raises(RunInUseError, match="was taken over by process"):  # noqa: SIM117, PT012
        with frozen(monkeypatch), first.claim("icl/run").held("the run run"):
            monkeypatch.setattr("icl.storage.claims._is_alive", lambda record: None)  # as from another machine
            first.put("icl/run/1", b"first")
            first.put_longer("icl/run/log.jsonl", b"1\n2\n")
            start = time.monotonic()
            with second.claim("icl/run").held("the run run", wait_s=0.1):
                assert LIFETIME_S / 2 < time.monotonic() - start < 3 * LIFETIME_S
                second.put("icl/run/1", b"second")
                second.put_longer("icl/run/log.jsonl", b"1\n2\n3\n")
                for write in (
                    lambda: first.put("icl/run/1", b"late"),
                    lambda: first.put_longer("icl/run/log.jsonl", b"1\n2\n3\n4 by the wrong hand\n"),
                    lambda: first.delete("icl/run/1"),
                ):
                    with pytest.raises(RunInUseError, match="stays on this machine"):
                        write()
    assert (second.get("icl/run/1"), second.get("icl/run/log.jsonl")) == (b"second", b"1\n2\n3\n")
    assert sum("seems to have lost its writer" in record.message for record in caplog.records) <= 1


def test_even_a_write_that_was_on_its_way_replaces_no_longer_record(bucket, monkeypatch):
    """Frozen between the question whether the claim is still ours and the write: the record's own version decides."""
    first, second = machine(bucket), machine(bucket)
    first.put_longer("icl/run/log.jsonl", b"1\n")
    second.put_longer("icl/run/log.jsonl", b"1\n2\n3\n")
    first.put_longer("icl/run/log.jsonl", b"1\n2\n")
    assert first.get("icl/run/log.jsonl") == b"1\n2\n3\n"
    first.put_longer("icl/run/log.jsonl", b"1\n2\n3\n4\n")
    assert second.get("icl/run/log.jsonl") == b"1\n2\n3\n4\n"


DIES = """
import os, sys
from icl.storage import S3Store
with S3Store(sys.argv[1]).claim("icl/run").held("the run"):
    os._exit(9)
"""


def test_a_dead_process_of_this_machine_is_not_waited_for(bucket):
    assert subprocess.run([sys.executable, "-c", DIES, bucket]).returncode == 9
    store = S3Store(bucket)  # with the lifetime of a minute
    start = time.monotonic()
    with store.claim("icl/run").held("the run"):
        store.put("icl/run/1", b"x")
    assert time.monotonic() - start < 10


def test_a_claim_of_another_machine_is_judged_by_the_services_clock(bucket, monkeypatch):
    monkeypatch.setattr("icl.storage.claims._is_alive", lambda record: None)
    with frozen(monkeypatch), machine(bucket).claim("icl/run").held("the run"):
        assert machine(bucket).claim("icl/run").holder() is not None
        age(bucket, f"icl/run/{CLAIM}", LIFETIME_S + 2.1)  # nobody watched, but the service counted
        assert machine(bucket).claim("icl/run").holder() is None
        start = time.monotonic()
        with machine(bucket).claim("icl/run").held("the run"):
            assert time.monotonic() - start < LIFETIME_S


@pytest.mark.parametrize("fault", ["reset after the request", "truncated answer", "500", "reset amid the request"])
def test_answers_that_get_lost_make_no_second_writer_and_lose_no_claim(s3_server, s3_through, bucket, fault):
    direct = machine(bucket)
    direct.list()
    with FaultProxy(s3_server) as proxy:
        store = s3_through(proxy.url, claim_lifetime_s=LIFETIME_S, attempts=8)
        store.list()
        proxy.schedule = at_random([fault], 0.4, seed=1)
        with store.claim("icl/run").held("the run"):
            for step in range(3):
                time.sleep(LIFETIME_S / 2)
                store.put(f"icl/run/{step}", b"x")
                with pytest.raises(RunInUseError), direct.claim("icl/run").held("the run", wait_s=0.0):
                    pytest.fail("two writers")
        proxy.schedule = iter(())
        assert proxy.injected[fault] > 2
    with direct.claim("icl/run").held("the run"):
        assert direct.list("icl/run") == [f"icl/run/{step}" for step in range(3)]


class Unconditional(FaultProxy):
    """A service without conditional writes: it ignores them, or refuses them."""

    def __init__(self, target, refuses):
        super().__init__(target)
        handler = self._server.RequestHandlerClass
        forward, refuse = handler._forward, handler._refuse

        def answer(request, body):
            conditions = [name for name in request.headers if name.lower() in ("if-match", "if-none-match")]
            if conditions and refuses:
                error = b"<Error><Code>NotImplemented</Code><Message>A header you provided</Message></Error>"
                return 501, [("Content-Length", str(len(error)))], error
            for name in conditions:
                del request.headers[name]
            return forward(request, body)

        handler._forward = answer
        assert refuse


@pytest.mark.parametrize("refuses", [False, True])
def test_a_service_without_conditional_writes_is_told_so_once_and_still_tells_the_second(
    s3_server, s3_through, bucket, refuses, caplog
):
    with Unconditional(s3_server, refuses) as service:
        first, second = (s3_through(service.url, claim_lifetime_s=LIFETIME_S) for _ in range(2))
        for _ in range(2):
            with first.claim("icl/run").held("the run"):
                time.sleep(LIFETIME_S / 2)
                first.put_longer("icl/run/log.jsonl", b"x\n")
                with pytest.raises(RunInUseError), second.claim("icl/run").held("the run", wait_s=0.1):
                    pytest.fail("two writers")
        with second.claim("icl/run").held("the run"):
            second.put_longer("icl/run/log.jsonl", b"x\ny\n")
    told = [record.message for record in caplog.records if record.name == "icl.storage.s3"]
    assert len([message for message in told if "makes no conditional writes" in message]) <= 2  # once for each store
    assert told
    assert "\n" not in told[0]


def test_a_bucket_that_comes_back_in_other_hands_tells_the_run(tmp_path, s3_server, s3_through, bucket):
    """Nobody could be asked at the start. When the bucket answers, another machine is at work."""
    other = machine(bucket)
    other.list()
    with FaultProxy(s3_server, ["500"] * 10_000) as proxy:
        remote = s3_through(proxy.url, attempts=1, claim_lifetime_s=LIFETIME_S, listing_lifetime_s=0.0)
        store = MirroredStore(LocalStore(tmp_path), remote, first_pause_s=0.01, longest_pause_s=0.1)
        run = Checkpoints(store, "run")
        with other.claim("icl/run").held("the run run"):
            other.put("icl/run/config.json", b"theirs")
            with pytest.raises(RunInUseError, match="the run run is in use by"), run.lock():  # noqa: PT012
                run.save_config({"mine": True})
                proxy.schedule = iter(())
                deadline = time.monotonic() + 30
                while time.monotonic() < deadline:
                    run.save_config({"mine": True})
                    time.sleep(0.05)
        assert other.get("icl/run/config.json") == b"theirs"
        assert store.local.exists("icl/run/config.json")
        assert store.flush(10) == ()


def test_what_a_run_left_unsent_goes_under_a_claim_later(tmp_path, s3_server, s3_through, bucket):
    other = machine(bucket)
    other.list()
    with FaultProxy(s3_server) as proxy:
        remote = s3_through(proxy.url, attempts=1, claim_lifetime_s=LIFETIME_S)
        remote.list()
        store = MirroredStore(LocalStore(tmp_path), remote, first_pause_s=0.01, longest_pause_s=0.1)
        run = Checkpoints(store, "run")
        with run.lock():
            store.flush()
            proxy.schedule = iter(["500"] * 12)
            run.save_config({"a": 1})
            assert run.flush() != ()
        while store.flush():
            time.sleep(0.1)
        assert other.exists("icl/run/config.json")
        assert other.claim("icl/run").holder() is None


def test_states_of_others_are_not_dropped(bucket):
    import torch

    store = machine(bucket)
    run, other = Checkpoints(store, "run"), Checkpoints(machine(bucket), "run")
    with run.lock():
        run.save_state(10, {"w": torch.zeros(3)})
        other.store.put(other.state_key(50), b"written by a hand that held no claim")
        run.save_state(20, {"w": torch.zeros(3)})
        run.save_state(30, {"w": torch.zeros(3)})
        run.keep_last_state()
    assert run.states() == [30, 50]


def test_the_list_of_runs_shows_who_writes_where(tmp_path, bucket):
    import torch

    here, there = (MirroredStore(LocalStore(tmp_path / name), machine(bucket)) for name in ("here", "there"))
    run = Checkpoints(here, "run")
    with run.lock():
        run.save(0, {"w": torch.zeros(3)})
        assert run.flush() == ()
        shown = list_runs(there)
        assert [(each.name, each.state, each.writer.pid) for each in shown] == [("run", "running", os.getpid())]
    assert [(each.state, each.writer) for each in list_runs(there)] == [("interrupted", None)]


def test_a_damaged_claim_is_respected_for_its_lifetime_and_then_taken(bucket, caplog):
    import boto3

    caplog.set_level(logging.CRITICAL)
    boto3.session.Session().client("s3").put_object(Bucket=bucket, Key=f"icl/run/{CLAIM}", Body=b'{"host": []')
    start = time.monotonic()
    with machine(bucket, claim_lifetime_s=0.8).claim("icl/run").held("the run"):
        assert 0.4 < time.monotonic() - start < 8


def test_a_claim_that_was_deleted_with_its_folder_is_made_again(bucket):
    import boto3

    store = machine(bucket)
    with store.claim("icl/run").held("the run"):
        boto3.session.Session().client("s3").delete_object(Bucket=bucket, Key=f"icl/run/{CLAIM}")
        time.sleep(LIFETIME_S / 2)  # two renewals
        store.put("icl/run/1", b"x")
        assert machine(bucket).claim("icl/run").holder() is not None


def test_a_bucket_alone_that_cannot_be_reached_is_an_error_at_the_first_write(s3_through):
    store = s3_through("http://127.0.0.1:9", attempts=1)
    with store.claim("icl/run").held("the run"), pytest.raises(StorageError, match="cannot be reached"):
        store.put("icl/run/1", b"x")


class Occupied:
    """A bucket in which a process of another machine has the claim, of which nobody knows whether it lives."""

    def look(self, name):
        holder = {
            "host": "elsewhere",
            "pid": 1,
            "since": "today",
            "place": None,
            "token": "t",
            "serial": 1,
            "free": False,
        }
        return Seen(json.dumps(holder).encode(), "v1", 0.0)

    def put_if(self, name, data, version):
        return None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_waiting_for_a_claim_ends_at_the_first_signal(number):
    before = signal.signal(number, signal.default_int_handler)  # under nohup, SIGHUP is ignored

    def wait() -> None:
        with stop_signal(), Claim(Occupied(), "icl/run/.claim", lifetime_s=60.0).held("the run run"):
            pass

    start = time.monotonic()
    timer = threading.Timer(0.2, os.kill, (os.getpid(), number))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            wait()
        timer.join()
    finally:
        signal.signal(number, before)
    assert time.monotonic() - start < 20.0
