"""The one writer: old or new, whatever call of the operating system is the last."""

import gzip
import os
import threading
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest

from icl.storage import LocalStore
from icl.storage.files import replacing, write_atomically, write_table

CALLS = ("open", "fdopen", "fsync", "replace", "close")
OLD, NEW = b"old" * 1000, b"new" * 3000


class Killed(BaseException):
    """The process is gone: nothing that it would have done comes to pass."""


@contextmanager
def failing_at(monkeypatch, moment, error):
    """The call number `moment` of those to the operating system fails, and where the process is dead all that follow."""
    made = 0

    def failing(real):
        def call(*args, **kwargs):
            nonlocal made
            made += 1
            if made == moment + 1 or (made > moment and error is Killed):
                raise error
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in (*CALLS, "unlink") if error is Killed else CALLS:
            patch.setattr(os, name, failing(getattr(os, name)))
        yield


def moments(write, monkeypatch, error):
    """Fails ever later until the write gets through; yields after every failure."""
    for moment in range(20):
        try:
            with failing_at(monkeypatch, moment, error):
                write()
        except error:
            yield moment
        else:
            assert moment >= 5, "too few calls were seen"
            return
    raise AssertionError("the write never got through")


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_writer_killed_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, OLD)
    seen = []
    for _ in moments(lambda: write_atomically(path, NEW), monkeypatch, Killed):
        seen.append(path.read_bytes())
        assert [entry.name for entry in tmp_path.iterdir() if entry.name not in hidden(tmp_path)] == ["file"]
    assert set(seen) == {OLD, NEW}
    assert seen == sorted(seen, key=(OLD, NEW).index)  # no way back
    assert path.read_bytes() == NEW
    assert hidden(tmp_path)  # of the dead
    LocalStore(tmp_path).recover("")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_call_that_fails_leaves_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, OLD)
    for _ in moments(lambda: write_atomically(path, NEW), monkeypatch, OSError):
        assert path.read_bytes() in (OLD, NEW)
        assert hidden(tmp_path) == []
    assert path.read_bytes() == NEW


def test_a_block_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, OLD)

    def fail():
        with replacing(path) as file:
            file.write(NEW)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == OLD
    assert hidden(tmp_path) == []


def test_two_writers_at_once_never_share_a_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)  # as on two machines with one shared folder
    path = tmp_path / "file"
    with replacing(path) as first, replacing(path) as second:
        first.write(OLD)
        second.write(NEW)
        assert len(hidden(tmp_path)) == 2
    assert path.read_bytes() == OLD  # whose block ended last

    values = [bytes([number]) * 100_000 for number in range(4)]

    def write(value):
        for _ in range(20):
            write_atomically(path, value)

    writers = [threading.Thread(target=write, args=(value,)) for value in values]
    write_atomically(path, values[0])
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_bytes() in values
    assert path.read_bytes() in values
    assert hidden(tmp_path) == []


def test_equal_tables_are_equal_files_whatever_their_names(tmp_path):
    table = pd.DataFrame({"step": [3, 5], "x": [1 / 3, np.nan], "what": ["a", ""]})
    write_table(table, tmp_path / "deep" / "one.csv.gz")
    write_table(table, tmp_path / "another.csv.gz")
    write_table(table, tmp_path / "plain.csv")
    first, second = (tmp_path / name for name in ("deep/one.csv.gz", "another.csv.gz"))
    assert first.read_bytes() == second.read_bytes()
    assert gzip.decompress(first.read_bytes()) == (tmp_path / "plain.csv").read_bytes()
    assert (tmp_path / "plain.csv").read_text() == "step,x,what\n3,0.3333333,a\n5,,\n"


def test_digits_and_missing_values_are_written_as_asked(tmp_path):
    table = pd.DataFrame({"x": [1 / 3, np.nan]})
    write_table(table, tmp_path / "few.csv", digits=3, missing="nan")
    write_table(table, tmp_path / "all.csv", digits=None)
    assert (tmp_path / "few.csv").read_text() == "x\n0.333\nnan\n"
    assert pd.read_csv(tmp_path / "all.csv", float_precision="round_trip")["x"][0] == 1 / 3
