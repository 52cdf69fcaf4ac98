"""Both at once: the folder never waits for the bucket, and the bucket gets everything in the end."""

import errno
import logging
import os
import threading
import time

import pytest
from s3_faults import FAULTS, FaultProxy, at_random

from icl.storage import History, InvalidKeyError, LocalStore, MirroredStore, MissingKeyError, StorageError


class Remote(LocalStore):
    """A remote that fails, or waits, when told to, and remembers the order of what reached it."""

    def __init__(self, root):
        super().__init__(root)
        self.broken = False
        self.refused = set()
        self.gate = threading.Event()
        self.gate.set()
        self.events = []

    def _pass(self, event, key):
        self.gate.wait(10)
        if self.broken or key in self.refused:
            raise StorageError(f"cannot {event} {key}: the service cannot be reached; check the network")
        self.events.append((event, key))

    def put(self, key, data):
        self._pass("put", key)
        super().put(key, data)

    def delete(self, key):
        self._pass("delete", key)
        super().delete(key)

    def sizes(self, prefix=""):
        if self.broken:
            raise StorageError("cannot list: the service cannot be reached; check the network")
        return super().sizes(prefix)


@pytest.fixture
def remote(tmp_path):
    return Remote(tmp_path / "remote")


@pytest.fixture
def store(tmp_path, remote):
    return MirroredStore(LocalStore(tmp_path / "local"), remote, first_pause_s=0.01, max_block_s=0.1)


def full_disk(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("icl.storage.local.write_atomically", refuse)


def test_a_put_does_not_wait_for_a_remote_that_stalls(store, remote):
    remote.gate.clear()
    start = time.monotonic()
    for step in range(20):
        store.put(f"icl/run/{step}", b"x" * 1000)
    assert time.monotonic() - start < 2
    assert store.flush(0.05) == tuple(f"icl/run/{step}" for step in range(20))
    remote.gate.set()
    assert store.flush(10) == ()
    assert remote.list() == store.local.list()


def test_an_outage_is_told_once_and_everything_arrives_after_it(store, remote, caplog):
    remote.broken = True
    for step in range(10):
        store.put(f"icl/run/{step}", b"x")
    time.sleep(0.1)
    assert store.get("icl/run/9") == b"x"
    remote.broken = False
    assert store.flush(10) == ()
    assert remote.list() == [f"icl/run/{step}" for step in range(10)]
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2
    assert "the run goes on with folder" in messages[0]
    assert "work again" in messages[1]


def test_the_end_of_a_run_reports_what_could_not_be_sent(store, remote, caplog):
    remote.broken = True
    store.put("icl/run/1", b"x")
    start = time.monotonic()
    assert store.flush() == ("icl/run/1",)
    assert time.monotonic() - start < 5
    report = caplog.records[-1].message
    assert "1 values were not sent" in report
    assert "all are in folder" in report
    assert "Start the run again, or use `icl runs --copy`" in report


def test_one_value_that_is_refused_does_not_stop_the_others(store, remote):
    remote.refused = {"icl/run/0"}
    for step in range(5):
        store.put(f"icl/run/{step}", b"x")
    assert store.flush() == ("icl/run/0",)
    assert remote.list() == [f"icl/run/{step}" for step in range(1, 5)]


def test_old_states_leave_the_remote_only_after_new_ones_are_there(store, remote):
    store.put("icl/run/state-1", b"1")
    assert store.flush(10) == ()
    remote.broken = True
    store.put("icl/run/state-2", b"2")
    store.delete("icl/run/state-1")
    store.put("icl/run/state-3", b"3")
    store.delete("icl/run/state-2")
    assert store.local.list() == store.list() == ["icl/run/state-3"]
    assert not store.exists("icl/run/state-1")
    time.sleep(0.05)
    remote.broken = False
    assert store.flush(10) == ()
    assert remote.list() == ["icl/run/state-3"]
    assert remote.events.index(("put", "icl/run/state-3")) < remote.events.index(("delete", "icl/run/state-1"))


def test_what_a_killed_process_had_not_sent_is_sent_after_the_next_start(store, remote, tmp_path):
    LocalStore(tmp_path / "local").put("icl/run/1", b"written just before the kill")
    LocalStore(tmp_path / "local").put("icl/run/2", b"new")
    remote.put("icl/run/2", b"older")
    remote.put("icl/run/0", b"only here")
    LocalStore(tmp_path / "local").put("icl/other/1", b"not this run's")
    store.recover("icl/run")
    assert store.flush(10) == ()
    assert remote.list() == ["icl/run/0", "icl/run/1", "icl/run/2"]
    assert remote.get("icl/run/2") == b"new"


RUN = History(lambda sizes: (max((int(key[8:]) for key in sizes if key[8:].isdigit()), default=-1),), ["icl/run/log"])


def test_the_longer_of_two_copies_is_continued_with_its_records(store, remote):
    store.local.put("icl/run/3", b"x")
    store.local.put("icl/run/log", b"up to 3")
    remote.put("icl/run/5", b"x")
    remote.put("icl/run/log", b"up to 5")
    store.recover("icl/run", RUN)
    assert store.local.get("icl/run/log") == b"up to 5"
    store.local.put("icl/run/7", b"x")
    store.local.put("icl/run/log", b"up to no. 7")
    store.recover("icl/run", RUN)
    assert store.flush(10) == ()
    assert store.local.get("icl/run/log") == remote.get("icl/run/log") == b"up to no. 7"
    assert remote.list() == ["icl/run/3", "icl/run/5", "icl/run/7", "icl/run/log"]


def test_a_remote_that_was_not_seen_keeps_its_history_until_this_one_is_as_long(store, remote, caplog):
    remote.put("icl/run/5", b"theirs")
    remote.put("icl/run/log", b"up to 5")
    before = {key: remote.get(key) for key in remote.list()}
    remote.broken = True
    store.recover("icl/run", RUN)
    assert store.list("icl/run") == []
    assert not store.exists("icl/run/5")
    with pytest.raises(MissingKeyError):
        store.get("icl/run/5")
    store.put("icl/run/3", b"ours")
    store.put("icl/run/log", b"up to 3")
    store.delete("icl/run/5")
    store.put("icl/other/1", b"x")
    time.sleep(0.05)
    remote.broken = False
    assert set(store.flush(10)) == {"icl/run/3", "icl/run/log", "icl/run/5"}
    assert {key: remote.get(key) for key in remote.list("icl/run")} == before
    assert remote.get("icl/other/1") == b"x"  # another folder need not wait
    store.put("icl/run/7", b"ours")
    store.put("icl/run/log", b"up to no. 7")
    assert store.flush(10) == ()
    assert remote.list("icl/run") == ["icl/run/3", "icl/run/7", "icl/run/log"]
    assert remote.get("icl/run/log") == b"up to no. 7"
    assert sum("The run goes on with what is in" in record.message for record in caplog.records) == 1
    assert sum(record.message.startswith(f"{remote} holds a longer history") for record in caplog.records) == 1


def test_reading_prefers_the_folder_and_falls_back_to_the_remote(store, remote):
    remote.put("icl/run/1", b"remote")
    assert store.get("icl/run/1") == b"remote"
    store.put("icl/run/1", b"local")
    assert store.get("icl/run/1") == b"local"
    remote.put("icl/run/2", b"remote")
    assert store.list("icl/run") == ["icl/run/1", "icl/run/2"]


def test_an_empty_folder_beside_an_unreachable_remote_is_not_an_empty_run(store, remote, caplog):
    remote.broken = True
    with pytest.raises(StorageError, match="cannot be reached"):
        store.list("icl/run")
    store.put("icl/run/1", b"x")
    assert store.list("icl/run") == ["icl/run/1"]
    assert store.list("icl/run") == ["icl/run/1"]
    assert sum("going on with what is in" in record.message for record in caplog.records) == 1


def test_with_a_full_disk_the_values_go_to_the_remote(store, remote, monkeypatch, caplog):
    remote.put("icl/run/0", b"x")
    with monkeypatch.context() as patch:
        full_disk(patch)
        remote.gate.clear()  # held back: the values are in memory now
        store.put("icl/run/1", b"one")
        store.put("icl/run/2", b"two")
        assert store.get("icl/run/1") == b"one"
        assert store.exists("icl/run/2")
        assert store.sizes("icl/run") == {"icl/run/0": 1, "icl/run/1": 3, "icl/run/2": 3}
    assert sum("the disk is full" in record.message for record in caplog.records) == 1
    remote.gate.set()
    assert store.flush(10) == ()
    assert remote.get("icl/run/2") == b"two"


def test_with_both_gone_memory_stays_bounded_and_a_put_fails_in_bounded_time(remote, tmp_path, monkeypatch, caplog):
    store = MirroredStore(
        LocalStore(tmp_path / "local"), remote, max_held_bytes=250, max_block_s=0.1, first_pause_s=0.01
    )
    full_disk(monkeypatch)
    remote.broken = True
    for step in range(2):
        store.put(f"icl/run/{step}", b"x" * 100)
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"icl/run/2 is stored nowhere: .*the disk is full.*cannot be reached"):
        store.put("icl/run/2", b"x" * 100)
    assert 0.1 <= time.monotonic() - start < 2
    assert set(store.flush()) == {"icl/run/0", "icl/run/1"}
    assert "2 of them are in memory only and will be lost" in caplog.records[-1].message


def test_an_unsafe_key_is_refused_at_once(store):
    for act in (lambda: store.put("../x", b""), lambda: store.get("../x"), lambda: store.delete("../x")):
        with pytest.raises(InvalidKeyError):
            act()
    assert store.flush(1) == ()


@pytest.mark.parametrize("count", [20, pytest.param(400, marks=pytest.mark.slow)])
def test_a_bucket_behind_a_bad_wire_ends_equal_to_the_folder(tmp_path, s3_server, s3_through, count, caplog):
    caplog.set_level(logging.CRITICAL)
    with FaultProxy(s3_server, at_random(FAULTS, 0.3, seed=2), stall_s=0.3) as proxy:
        bucket = s3_through(proxy.url, attempts=2, read_timeout_s=0.25)
        store = MirroredStore(LocalStore(tmp_path), bucket, first_pause_s=0.01, longest_pause_s=0.05)
        for step in range(count):
            store.put(f"icl/run/{step}", bytes([step % 256]) * 1013)
            if step >= 2:
                store.delete(f"icl/run/{step - 2}") if step % 2 else None
        while store.flush():
            pass
        proxy.schedule = iter(())
        fresh = s3_through(proxy.url)
        assert fresh.sizes() == store.local.sizes()
        assert all(fresh.get(key) == store.local.get(key) for key in fresh.list())
        assert proxy.injected.total() > count / 10
        print(f"{proxy.injected.total()} faults injected and survived: {dict(proxy.injected)}")


def test_a_deletion_that_is_sent_during_a_listing_does_not_bring_the_value_back(store, remote, monkeypatch):
    store.put("a", b"1")
    assert store.flush(10.0) == ()
    remote.gate.clear()
    store.delete("a")
    listed = remote.sizes

    def slowly(prefix=""):
        found = listed(prefix)
        remote.gate.set()
        assert store.flush(10.0) == ()
        return found

    monkeypatch.setattr(remote, "sizes", slowly)
    assert store.list() == []
