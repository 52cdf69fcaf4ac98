"""Lines that a crash or a disk spoils cost themselves alone."""

import errno
import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icl.storage.files import UnfitFileError
from icl.storage.jsonl import JsonLines, has_step, read_json_lines

ROWS = [{"step": step, "loss": math.sin(step) / 3, "name": "λ\n"} for step in range(5)]


def file_of(folder, rows=ROWS):
    path = folder / "rows.jsonl"
    lines = JsonLines(path, ())
    for row in rows:
        lines.append(row)
    return path


def test_rows_come_back_in_order_and_where_there_is_no_file_there_are_none(tmp_path):
    assert read_json_lines(file_of(tmp_path)) == ROWS
    assert read_json_lines(tmp_path / "absent.jsonl") == []


def test_a_last_line_cut_anywhere_is_passed_over_and_gives_way_to_the_next_row(tmp_path):
    path = file_of(tmp_path)
    whole = path.read_bytes()
    begin = whole[:-1].rindex(b"\n") + 1
    for cut in range(begin, len(whole)):
        path.write_bytes(whole[:cut])
        assert read_json_lines(path) == ROWS[:4]
        JsonLines(path).append(ROWS[4])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("spoilt", [b"", b'{"step": 2, "lo', b"\0\0\0\0", b"\xff\xfe", b"3", b"null", b"[" * 100_000])
def test_a_line_torn_in_the_middle_costs_neither_those_before_it_nor_those_after(tmp_path, spoilt):
    path = file_of(tmp_path)
    lines = path.read_bytes().split(b"\n")
    lines[2] = spoilt
    path.write_bytes(b"\n".join(lines))
    rest = [*ROWS[:2], *ROWS[3:]]
    assert read_json_lines(path) == rest
    JsonLines(path).append(ROWS[2])
    assert read_json_lines(path) == [*rest, ROWS[2]]
    JsonLines(path, read_json_lines(path))
    assert len(path.read_bytes().splitlines()) == 5  # the torn one is gone


@pytest.mark.parametrize("stage", ["open", "write", "fsync"])
def test_a_row_that_the_disk_refuses_waits_and_is_written_once(tmp_path, monkeypatch, stage):
    path = file_of(tmp_path, ROWS[:2])
    lines = JsonLines(path)

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if stage == "fsync":
            patch.setattr(os, "fsync", refuse)
        else:
            real = os.fdopen

            def part(descriptor, mode):
                if mode == "rb":
                    return real(descriptor, mode)
                with real(descriptor, mode) as file:
                    if stage == "write":  # a part of the row gets there
                        file.seek(0, os.SEEK_END)
                        file.write(b'{"step": 2, "lo')
                refuse()

            patch.setattr(os, "fdopen", part)
        for index in (2, 3):
            with pytest.raises(OSError, match="No space"):
                lines.append(ROWS[index])
            assert read_json_lines(path)[:2] == ROWS[:2]
        assert lines.waiting == 2
    lines.append(ROWS[4])
    assert lines.waiting == 0
    assert read_json_lines(path) == ROWS


def test_a_row_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    path, synced = file_of(tmp_path, ROWS[:1]), []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1])
    lines = JsonLines(path)
    assert synced == []  # what is there already is not written again
    lines.append(ROWS[1])
    assert synced == [str(path)]


numbers = st.floats() | st.integers() | st.booleans() | st.none() | st.text()


@settings(deadline=None)  # a busy machine
@given(rows=st.lists(st.dictionaries(st.text(), numbers | st.lists(numbers), max_size=3), max_size=4))
def test_a_row_that_was_read_is_written_as_it_was(tmp_path_factory, rows):
    path = file_of(tmp_path_factory.mktemp("rows"), rows)
    before = path.read_bytes()
    assert len(read_json_lines(path)) == len(rows)
    assert b"".join(json.dumps(row).encode() + b"\n" for row in read_json_lines(path)) == before
    JsonLines(path, read_json_lines(path))
    assert path.read_bytes() == before


def test_damaged_lines_are_set_aside_once_and_told(tmp_path, caplog):
    path = file_of(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    spoilt = [b'{"torn\n', b"\0\0\0\n", b'{"no": "step"}\n', b'{"step": true}\n', b'{"step": -1}\n']
    path.write_bytes(b"".join([lines[0], *spoilt[:2], *lines[1:4], *spoilt[2:], lines[4], b'{"step": 9, "cut']))
    assert read_json_lines(path, has_step) == ROWS
    assert read_json_lines(path, has_step) == ROWS
    assert [record.message for record in caplog.records] == [
        f"{path}: line 2 and 4 more is damaged and left out; all others count"
    ]
    for _ in range(2):
        JsonLines(path, sound=has_step).append(ROWS[0])
    assert path.read_bytes() == b"".join([*lines, lines[0], lines[0]])
    assert (tmp_path / "rows.jsonl.damaged").read_bytes() == b"".join(spoilt)
    path.write_bytes(b"".join([lines[0], b"later\n", lines[1]]))
    JsonLines(path, read_json_lines(path), has_step)
    assert (tmp_path / "rows.jsonl.damaged").read_bytes() == b"".join([*spoilt, b"later\n"])


def test_empty_lines_are_no_damage(tmp_path):
    path = file_of(tmp_path)
    path.write_bytes(b"\n\n" + path.read_bytes().replace(b"\n", b"\r\n\n"))
    assert read_json_lines(path) == ROWS
    JsonLines(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_pipe_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    os.mkfifo(path)
    for call in (read_json_lines, JsonLines):
        with pytest.raises(UnfitFileError, match="a pipe, a socket or a device"):
            call(path)


@pytest.mark.parametrize("kind", ["link", "hard link", "link to nothing"])
def test_what_is_written_goes_to_no_file_of_another_name(tmp_path, kind):
    path, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    if kind != "link to nothing":
        other.write_bytes(b'{"step": 1}\n')
    path.hardlink_to(other) if kind == "hard link" else path.symlink_to(other)
    lines = JsonLines(path)
    lines.append({"step": 2})
    assert path.read_bytes().endswith(b'{"step": 2}\n')
    assert not other.exists() or other.read_bytes() == b'{"step": 1}\n'
    path.unlink()
    path.symlink_to(other)  # while it is written
    with pytest.raises(OSError, match="symbolic links"):
        lines.append({"step": 3})
    assert not other.exists() or other.read_bytes() == b'{"step": 1}\n'
