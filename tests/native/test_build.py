"""Compiling: into the user's cache, once, whole, and never at import."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from icl.engine import paths
from icl.native import build, random
from icl.native.build import NativeUnavailable, cache_folder, find_compiler, load_library
from icl.streams import threefry2x32

try:
    find_compiler()
except NativeUnavailable as error:
    pytest.skip(str(error), allow_module_level=True)

THREEFRY = Path(build.__file__).with_name("threefry.cpp")
SMALL = Path(__file__).with_name("small.cpp")
"""Compiled in a tenth of the time of the package's own sources: what is kept, and for whom, does not depend on the source."""
LOAD = f"import pathlib; from icl.native.build import load_library; load_library(pathlib.Path({str(SMALL)!r}), {{'COPY': 1}})"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )


def test_import_compiles_nothing(tmp_path):
    python("import icl.engine.paths, icl.streams, icl.training.loop", XDG_CACHE_HOME=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_two_processes_compile_one_library(tmp_path):
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: python(LOAD, XDG_CACHE_HOME=str(tmp_path)), range(2)))
    libraries = list((tmp_path / "icl").glob("*.so"))
    assert len(libraries) == 1
    before = libraries[0].stat().st_mtime_ns
    python(LOAD, XDG_CACHE_HOME=str(tmp_path))
    assert libraries[0].stat().st_mtime_ns == before


def test_macros_give_libraries_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for value in (1, 2):
        load_library(SMALL, {"MARK": value})
    assert len(list(cache_folder().glob("*.so"))) == 2


def test_a_failing_compiler_is_one_line(tmp_path, monkeypatch):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'fatal error: out of luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(NativeUnavailable, match=r"failed on threefry\.cpp: fatal error: out of luck") as caught:
        load_library(THREEFRY, {"BROKEN": 1})
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "icl").glob("*.so"))


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


BROKEN = {
    "no program": ("\0\1junk", "cannot be started"),
    "of another processor": ("\x7fELF\2\1\1\0not for this machine", "cannot be started"),
    "hangs": ("#!/bin/sh\nsleep 1000", "did not end within 0 seconds"),
    "hangs in a child that holds its output": ("#!/bin/sh\nsleep 1000 & sleep 1000", "did not end within"),
    "hangs when it compiles": ("#!/bin/sh\n[ $1 = --version ] || sleep 1000", "did not end within"),
    "killed": ("#!/bin/sh\n[ $1 = --version ] || kill -9 $$", "was ended by SIGKILL"),
    "killed at once": ("#!/bin/sh\nkill -15 $$", "was ended by SIGTERM"),
    "speaks no UTF-8": ("#!/bin/sh\nprintf '\\377 error \\377' >&2; exit 3", "failed on threefry.cpp"),
    "makes nothing": ("#!/bin/sh\nexit 0", "cannot use"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_compiler_that_does_not_work_or_end_costs_a_line(tmp_path, monkeypatch, caplog, name):
    text, reason = BROKEN[name]
    compiler = tmp_path / "broken"
    compiler.write_text(text, encoding="latin-1")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "_COMPILERS", ())
    monkeypatch.setattr(build, "VERSION_S", 0.4)
    monkeypatch.setattr(build, "COMPILE_S", 0.4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build._tell.cache_clear()
    for repetition in range(3):
        with pytest.raises(NativeUnavailable, match=reason) as caught:
            load_library(THREEFRY, {f"BROKEN{list(BROKEN).index(name)}": repetition})
        assert "\n" not in str(caught.value)
    assert len({record.getMessage() for record in caplog.records}) == len(caplog.records) > 0
    if reason != "cannot use":
        assert not list((tmp_path / "icl").glob("*.so"))


def test_a_compiler_that_cannot_be_started_leaves_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", script(tmp_path / "killed", "kill -9 $$"))
    assert find_compiler() != str(tmp_path / "killed")


PLANTED = """
#include <stdio.h>
__attribute__((constructor)) void planted(void) { fclose(fopen("PLANTED", "w")); }
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    """A folder with a cache that holds a library, and beside it one of a stranger, `planted.so`."""
    folder = tmp_path_factory.mktemp("compiled")
    python(LOAD, XDG_CACHE_HOME=str(folder))
    source, planted = folder / "planted.c", folder / "planted.so"
    source.write_text(PLANTED)
    subprocess.run([find_compiler(), "-x", "c", "-shared", "-fPIC", str(source), "-o", str(planted)], check=True)
    return folder


@pytest.fixture
def cached(compiled, tmp_path) -> Path:
    """The library of a copy, in tmp_path, of that folder."""
    shutil.copytree(compiled, tmp_path, dirs_exist_ok=True)
    (library,) = (tmp_path / "icl").glob("*.so")
    return library


def swapped(cached: Path, data: bytes) -> None:
    cached.unlink()
    cached.write_bytes(data)


def as_link(cached: Path, planted: Path) -> None:
    cached.unlink()
    cached.symlink_to(planted)


DAMAGE = {
    "empty": lambda cached, planted: swapped(cached, b""),
    "cut short": lambda cached, planted: os.truncate(cached, cached.stat().st_size // 2),
    "no library": lambda cached, planted: swapped(cached, b"text"),
    "foreign": lambda cached, planted: swapped(cached, planted.read_bytes()),
    "a link": as_link,
    "writable": lambda cached, planted: (swapped(cached, planted.read_bytes()), cached.chmod(0o777)),
    "without its checksum": lambda cached, planted: cached.with_suffix(".so.sha256").unlink(),
    "in a folder for all": lambda cached, planted: (
        swapped(cached, planted.read_bytes()),
        cached.with_suffix(".so.sha256").write_text(hashlib.sha256(planted.read_bytes()).hexdigest()),
        cached.parent.chmod(0o777),
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_or_planted_library_is_not_loaded_but_made_anew(cached, tmp_path, monkeypatch, name):
    whole = cached.read_bytes()
    DAMAGE[name](cached, tmp_path / "planted.so")
    monkeypatch.chdir(tmp_path)
    python(LOAD, XDG_CACHE_HOME=str(tmp_path))
    assert not (tmp_path / "PLANTED").exists()
    assert len(cached.read_bytes()) == len(whole)
    assert not cached.is_symlink()
    assert not (cached.parent.stat().st_mode | cached.stat().st_mode) & 0o022


def test_the_cache_of_another_user_is_not_used(cached, tmp_path, monkeypatch):
    before = {path: path.read_bytes() for path in cached.parent.iterdir()}
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    about = cached.stat()
    monkeypatch.setattr(build, "_is_ours", lambda about: about.st_uid == os.geteuid())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(NativeUnavailable, match=r"belongs to another user; set XDG_CACHE_HOME"):
        load_library(SMALL, {"COPY": 2})
    assert {path: path.read_bytes() for path in cached.parent.iterdir()} == before
    assert about.st_uid != 12345


def test_files_that_are_not_ours_stay_in_a_folder_that_is_made_private(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "icl").mkdir()
    (tmp_path / "icl" / "mine.so").touch()
    (tmp_path / "icl").chmod(0o770)
    load_library(SMALL, {"COPY": 3})
    assert (tmp_path / "icl" / "mine.so").exists()
    assert not (tmp_path / "icl").stat().st_mode & 0o022


def test_without_a_home_folder_there_is_no_cache(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}["uid"])
    with pytest.raises(NativeUnavailable, match="no home folder; set XDG_CACHE_HOME"):
        load_library(SMALL, {"HOMELESS": 1})


def test_where_nothing_locks_it_compiles_all_the_same(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_library(SMALL, {"LOCKLESS": 1})


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "icl").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(NativeUnavailable, match="cannot use"):
        load_library(SMALL, {"UNWRITABLE": 1})


def test_sources_are_part_of_the_package():
    assert (Path(paths.__file__).with_name("kernel.cpp")).is_file()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("count", [1, 2, 17, 1009])
@pytest.mark.parametrize("key", [(0, 0), (-1, 2**31 - 1), (-(2**31), 12345)])
@pytest.mark.parametrize("step", [0, 7, -1])
def test_words_are_those_of_the_reference(key, step, count, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(random, "_library", lambda: None)
    words = random.threefry_words(key, step, count)
    counter = torch.arange(count, dtype=torch.int32)
    keys = torch.tensor(key, dtype=torch.int32)
    expected = threefry2x32(keys[0], keys[1], torch.full_like(counter, step), counter)
    assert torch.equal(words, torch.stack(expected))
