"""Compiling a C++ source into the user's cache, and loading it.

The library's file name is a hash of source, macros, flags, compiler and CPU, so that a changed source, or another
machine on a shared home directory, never meets a wrong file; a lock keeps two processes from compiling the same
file, and a rename makes it appear whole.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from filelock import FileLock

_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-pthread")
# The first that the compiler accepts; the last is slow but valid everywhere.
_CPU_FLAGS = (("-march=native",), ("-mcpu=native",), ())


class NativeUnavailable(RuntimeError):
    """There is no native kernel here; the message says why in one line."""


def load_library(source: Path, macros: Mapping[str, int]) -> ctypes.CDLL:
    """The compiled library of a source file, from the cache or compiled now (a few seconds).

    Args:
        source: the C++ file.
        macros: -D definitions.

    Raises:
        NativeUnavailable: ICL_NATIVE=0 is set, there is no compiler, or it failed.
    """
    if os.environ.get("ICL_NATIVE") == "0":
        raise NativeUnavailable("turned off by ICL_NATIVE=0")
    return _load(source, tuple(sorted(macros.items())))


@cache
def _load(path: Path, macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    compiler = find_compiler()
    definitions = [f"-D{name}={value}" for name, value in macros]
    key = "\n".join((path.read_text(), *definitions, *_FLAGS, compiler, _version(compiler), _cpu()))
    library = cache_folder() / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    try:
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{library}.lock"):
                if not library.exists():
                    _compile(compiler, path, definitions, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NativeUnavailable(f"cannot use {library}: {error}") from error


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/icl, or the platform's usual place."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "icl"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "icl"


def find_compiler() -> str:
    """Path of $CXX, c++, g++ or clang++, whichever is found first.

    Raises:
        NativeUnavailable: there is none.
    """
    for name in (os.environ.get("CXX"), *_COMPILERS):
        if name and (found := shutil.which(name)):
            return found
    raise NativeUnavailable(f"no C++ compiler: none of {', '.join(_COMPILERS)} is on PATH (install g++, or set CXX)")


def _compile(compiler: str, source: Path, definitions: list[str], library: Path) -> None:
    handle, temporary = tempfile.mkstemp(dir=library.parent, suffix=".so")
    os.close(handle)
    try:
        message = ""
        for cpu_flags in _CPU_FLAGS:
            command = [compiler, *_FLAGS, *cpu_flags, *definitions, str(source), "-o", temporary]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            except subprocess.TimeoutExpired as error:
                raise NativeUnavailable(f"{compiler} did not finish {source.name} in 10 minutes") from error
            if done.returncode == 0:
                os.replace(temporary, library)
                return
            errors = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit {done.returncode}"]
            message = message or errors[0]
        raise NativeUnavailable(f"{compiler} failed on {source.name}: {message}")
    finally:
        Path(temporary).unlink(missing_ok=True)


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


@cache
def _cpu() -> str:
    try:
        # Instruction sets, which are what -march=native depends on; frequencies in the same file change.
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
        return "\n".join(sorted(kept))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
