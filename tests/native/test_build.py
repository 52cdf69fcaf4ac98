"""Compiling: into the user's cache, once, whole, and never at import."""

import os
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
LOAD = f"import pathlib; from icl.native.build import load_library; load_library(pathlib.Path({str(THREEFRY)!r}), {{'COPY': 1}})"


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
        load_library(THREEFRY, {"MARK": value})
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


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "icl").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(NativeUnavailable, match="cannot use"):
        load_library(THREEFRY, {"UNWRITABLE": 1})


def test_sources_are_part_of_the_package():
    assert (Path(paths.__file__).with_name("kernel.cpp")).is_file()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("count", [1, 2, 17, 1009])
@pytest.mark.parametrize("key", [(0, 0), (-1, 2**31 - 1), (-(2**31), 12345)])
@pytest.mark.parametrize("step", [0, 7, -1])
def test_words_are_those_of_the_reference(key, step, count, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(random, "_function", lambda: None)
    words = random.threefry_words(key, step, count)
    counter = torch.arange(count, dtype=torch.int32)
    keys = torch.tensor(key, dtype=torch.int32)
    expected = threefry2x32(keys[0], keys[1], torch.full_like(counter, step), counter)
    assert torch.equal(words, torch.stack(expected))
