"""The folder: whole values or none, whatever happens to the disk or the process."""

import errno
import itertools
import os
import time

import pytest

from icl.storage import LocalStore, StorageError


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_value_is_flushed_before_it_is_visible_and_its_folder_after(tmp_path, monkeypatch):
    events = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), real_replace(a, b))[1])
    LocalStore(tmp_path).put("a/b/c", b"x")
    file, rename, folder = events[-3:]
    assert file.startswith(str(tmp_path / "a/b/.c."))
    assert (rename, folder) == ("rename", str(tmp_path / "a/b"))
    assert events[:2] == [str(tmp_path), str(tmp_path / "a")]  # the names of the new folders a and a/b


@pytest.mark.parametrize("stage", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_the_old_value_and_no_litter(tmp_path, monkeypatch, stage):
    store = LocalStore(tmp_path)
    store.put("a/b", b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if stage == "write":
        real = os.fdopen

        def fdopen(*args, **kwargs):
            file = real(*args, **kwargs)

            class Full:
                def __enter__(self):
                    return self

                def __exit__(self, *_):
                    file.close()

                write = full

            return Full()

        monkeypatch.setattr(os, "fdopen", fdopen)
    else:
        monkeypatch.setattr(os, {"fsync": "fsync", "rename": "replace"}[stage], full)
    with pytest.raises(StorageError, match=r"cannot write .*: the disk is full; free some space or set LOCAL_ROOT"):
        store.put("a/b", b"new")
    monkeypatch.undo()
    assert store.get("a/b") == b"old"
    assert names(tmp_path) == ["b"]


def test_a_really_full_disk_takes_what_fits_and_keeps_it_whole(small_disk):
    disk = small_disk(256)
    store = LocalStore(disk)

    def fill():
        for index in itertools.count():
            store.put(f"icl/run/{index}", bytes([index]) * 20_000)

    with pytest.raises(StorageError, match="the disk is full"):
        fill()
    stored = len(store.list())
    assert stored >= 8
    assert names(disk) == sorted(str(index) for index in range(stored))
    for index in range(stored):
        assert store.get(f"icl/run/{index}") == bytes([index]) * 20_000
    store.delete("icl/run/0")
    store.put("icl/run/100", b"x" * 20_000)  # space that was freed is usable at once


def test_what_is_no_writable_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        LocalStore(tmp_path / "file").put("a/b", b"x")
    assert LocalStore(tmp_path / "file").list() == []
    assert not LocalStore(tmp_path / "file").exists("a/b")
    real = os.open

    # Root may write anywhere, so the refusal is the system call's, made up here.
    def refuse(path, flags, *args, **kwargs):
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match=r"permission denied; check the folder's owner and mode or set LOCAL_ROOT"):
        LocalStore(tmp_path / "locked").put("a", b"x")


def test_temporaries_of_dead_writers_are_cleared_and_nothing_else(tmp_path):
    store = LocalStore(tmp_path)
    store.put("icl/run/1", b"x")
    store.put("icl/other/1", b"x")
    for folder in ("run", "other"):
        (tmp_path / "icl" / folder / ".2.123-abcd.tmp").write_bytes(b"half")
    (tmp_path / "icl/run/.lock").write_bytes(b"")
    assert store.list() == ["icl/other/1", "icl/run/1"]
    store.recover("icl/run")
    store.recover("icl/none")
    assert names(tmp_path) == [".2.123-abcd.tmp", ".lock", "1", "1"]


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    store = LocalStore(tmp_path)
    for jump in (0.0, 4e9, -4e9):
        monkeypatch.setattr(time, "time", lambda jump=jump: 1.7e9 + jump)
        store.put("a", str(jump).encode())
        assert store.get("a") == str(jump).encode()
    assert names(tmp_path) == ["a"]
