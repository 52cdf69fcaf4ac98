"""The lock of a run, where others meddle with its files or the file system has none."""

import errno
import json
import os
import threading

import pytest

from icl.storage import S3Store, StorageError
from icl.storage.locks import Holder, RunInUseError, exclusive, holder_of

fcntl = pytest.importorskip("fcntl")


def note_of(path):
    return path.with_name(f"{path.name}-holder.json")


def test_a_note_is_not_written_through_a_link(tmp_path):
    path, victim = tmp_path / "run" / ".lock", tmp_path / "victim"
    victim.write_text("precious")
    path.parent.mkdir()
    note_of(path).symlink_to(victim)
    with exclusive(path, "it"):
        assert json.loads(note_of(path).read_text())["pid"] == os.getpid()
    assert victim.read_text() == "precious"


def test_a_lock_is_not_opened_through_a_link(tmp_path):
    path, victim = tmp_path / ".lock", tmp_path / "victim"
    victim.write_text("precious")
    path.symlink_to(victim)
    with pytest.raises(RuntimeError, match=r"cannot lock .*\.lock"), exclusive(path, "it"):
        pass
    assert victim.read_text() == "precious"


def held_elsewhere(path):
    """Another process's hold, as a second open file has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


@pytest.mark.parametrize("planted", ["pipe", "link", "list", "deep", "binary"])
def test_a_note_that_is_none_is_not_read(tmp_path, planted):
    path = tmp_path / ".lock"
    descriptor = held_elsewhere(path)
    if planted == "pipe":
        os.mkfifo(note_of(path))
    elif planted == "link":
        note_of(path).symlink_to("/dev/zero")
    else:
        content = {"list": b"[1]", "deep": b"[" * 10**6, "binary": bytes(range(256))}
        note_of(path).write_bytes(content[planted])
    try:
        assert holder_of(path) == Holder("unknown host", 0, "unknown time")
        with pytest.raises(RunInUseError, match="in use by another process"), exclusive(path, "it", 0.05):
            pass
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
@pytest.mark.parametrize("left_behind", [False, True])
def test_a_file_system_without_locks_is_told_and_stops_nothing(tmp_path, monkeypatch, caplog, number, left_behind):
    path = tmp_path / ".lock"
    if left_behind:
        path.touch()

    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        with exclusive(path, "the run a") as held:
            path.unlink(missing_ok=True)
            held.check()  # there is nothing to lose
    assert holder_of(path) is None
    assert [record.getMessage().count("has no locks") for record in caplog.records] == [1, 1]
    assert all("the run a" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lock_whose_file_is_taken_away_is_missed(tmp_path, replaced):
    path = tmp_path / ".lock"
    with exclusive(path, "the run a") as held:
        held.check()
        path.unlink()
        if replaced:
            path.touch()
        with pytest.raises(RunInUseError, match="was removed while this process wrote the run a"):
            held.check()
    with exclusive(path, "the run a") as held:
        held.check()


def test_a_lock_is_free_again_after_its_file_was_taken_away(tmp_path):
    path, entered = tmp_path / ".lock", []
    with exclusive(path, "it"):
        path.unlink()

    def enter():
        with exclusive(path, "it"):
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered


def test_a_folder_of_locks_that_another_user_made_is_refused_and_an_open_one_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = S3Store("bucket")
    folder = store.lock_path("icl/run").parent
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="set TMPDIR"):
        store.lock_path("icl/run")
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o777)
    with exclusive(store.lock_path("icl/run"), "the run"):
        assert folder.stat().st_mode & 0o077 == 0
    stranger = os.getuid() + 1
    monkeypatch.setattr("os.getuid", lambda: stranger)
    other = S3Store("bucket").lock_path("icl/run").parent
    other.mkdir()  # ours, that is: somebody else's to the stranger
    with pytest.raises(StorageError, match="belongs to another user"):
        store.lock_path("icl/run")
