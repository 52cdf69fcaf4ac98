"""The folder: whole values or none, whatever happens to the disk or the process."""

import errno
import itertools
import os
import socket
import subprocess
import sys
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


def test_links_reach_other_disks_but_never_turn_in_circles(tmp_path):
    store, elsewhere = LocalStore(tmp_path / "root"), tmp_path / "elsewhere"
    store.put("icl/a/1", b"x")
    elsewhere.mkdir()
    (elsewhere / "2").write_bytes(b"yy")
    (store.root / "icl/b").symlink_to(elsewhere)
    (store.root / "icl/up").symlink_to("..")
    (store.root / "icl/top").symlink_to("/")
    (store.root / "icl/self").symlink_to("self")
    for name, target in {"loop": ".", "above": "..", "away": elsewhere, "gone": "nowhere", "self": "self"}.items():
        (store.root / "icl/a" / name).symlink_to(target)
    (store.root / "icl/a/linked").symlink_to(elsewhere / "2")
    assert store.sizes("icl") == {"icl/a/1": 1, "icl/a/linked": 2, "icl/b/2": 2}
    assert store.list("icl/a") == ["icl/a/1", "icl/a/linked"]


def test_a_folder_that_cannot_be_listed_hides_itself_alone(tmp_path, monkeypatch, caplog):
    store = LocalStore(tmp_path)
    for name in "abc":
        store.put(f"icl/{name}/1", b"x")
    real = os.scandir

    def scandir(folder):
        if str(folder).endswith("icl/b"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    assert store.list("icl") == ["icl/a/1", "icl/c/1"]
    assert "icl/b is passed over: permission denied" in caplog.text
    with pytest.raises(StorageError, match=r"cannot list .*icl/b: permission denied"):
        store.list("icl/b")


def odd_files(folder):
    """Names under which no file lies that could be read whole."""
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket"))
    (folder / "zero").symlink_to("/dev/zero")
    with (folder / "sparse").open("wb") as file:
        file.truncate(2**42)
    return "pipe", "socket", "zero", "sparse"


def test_what_is_no_file_of_reasonable_size_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = LocalStore(tmp_path)
    for name in odd_files(tmp_path):
        with pytest.raises(StorageError, match=f"cannot read .*{name}: it(s| is) .*; move it away"):
            store.get(name)


def test_a_file_beyond_the_memory_is_refused_too(tmp_path):
    code = (
        "import resource, sys; from icl.storage import LocalStore, StorageError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "try: LocalStore(sys.argv[1]).get('large')\n"
        "except StorageError as error: print(error)"
    )
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**31)
    told = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert told.stdout.endswith("do not fit into the memory; move it away\n")
