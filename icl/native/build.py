"""Compiling a C++ source into the user's cache, and loading it.

The library's file name contains a hash of source, macros, flags, compiler and CPU. So a changed source, or another
machine with the same home directory, never loads a wrong file. A lock keeps two processes from compiling the same file,
and the file is written atomically.

The compiled code is optional: every caller has a PyTorch equivalent. So no failure here may end a run or delay it for
long. Code that another user could have put into the cache is not loaded: the folder and its files must belong to this
user or to root, nobody else may have write permission, and the library must match its checksum.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from icl.storage.files import replacing

VERSION_S = 10.0
COMPILE_S = 60.0
"""The most that a compiler may take; the kernel takes some five seconds."""

_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-pthread")
# The first that the compiler accepts; the last is slow but valid everywhere.
_CPU_FLAGS = (("-march=native",), ("-mcpu=native",), ())


_OWN_FILE = re.compile(r"\w+-[0-9a-f]{20}\.so(\.sha256)?")

_given_up: dict[str, str] = {}  # compilers that timed out once -> the reason; they are not tried again

_log = logging.getLogger(__name__)


class NativeUnavailable(RuntimeError):
    """There is no native kernel here; the message says why in one line."""


def functions_of(source: Path, arguments: Mapping[str, Sequence[Any]]) -> ctypes.CDLL | None:
    """The library of a source file whose functions return nothing, with their argument types set; None if it cannot be used.

    Args:
        source: the C++ file.
        arguments: name of a function -> ctypes of its arguments.
    """
    try:
        library = load_library(source, {})
    except NativeUnavailable:
        return None
    for name, kinds in arguments.items():
        function = getattr(library, name)
        function.argtypes, function.restype = list(kinds), None
    return library


def load_library(source: Path, macros: Mapping[str, int]) -> ctypes.CDLL:
    """The compiled library of a source file, from the cache or compiled now (a few seconds).

    Args:
        source: the C++ file.
        macros: -D definitions.

    Raises:
        NativeUnavailable: ICL_NATIVE=0 is set, there is no compiler, it failed, or the cache folder is not safe.
    """
    if os.environ.get("ICL_NATIVE") == "0":
        raise NativeUnavailable("turned off by ICL_NATIVE=0")
    found = _load(source, tuple(sorted(macros.items())))
    if isinstance(found, str):
        _tell(found)
        raise NativeUnavailable(found)
    return found


@cache
def _tell(reason: str) -> None:
    _log.warning(
        "the compiled code cannot be used, and PyTorch does its work more slowly: %s (ICL_NATIVE=0 turns this message off)",
        reason,
    )


@cache
def _load(path: Path, macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL | str:
    """The library, or the reason why there is none. Both are remembered."""
    try:
        compiler = _compiler(os.environ.get("CXX"), os.environ.get("PATH"))
        if isinstance(compiler, str):
            return compiler
        definitions = [f"-D{name}={value}" for name, value in macros]
        key = "\n".join((path.read_text(), *definitions, *_FLAGS, compiler.path, compiler.version, _cpu()))
        library = _private_folder() / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    except NativeUnavailable as error:
        return str(error)
    except OSError as error:
        return f"cannot use {cache_folder()}: {error}; set XDG_CACHE_HOME to a folder of your own"
    try:
        if not _is_sound(library):
            if compiler.path in _given_up:
                return _given_up[compiler.path]
            with _one_at_a_time(library):
                if not _is_sound(library):
                    _compile(compiler.path, path, definitions, library)
        return ctypes.CDLL(str(library))
    except NativeUnavailable as error:
        return str(error)
    except OSError as error:
        return f"cannot use {library}: {error}"


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/icl, or the platform's usual place.

    Raises:
        NativeUnavailable: this user has no home folder.
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "icl"
    try:
        home = Path.home()
    except (RuntimeError, KeyError):
        raise NativeUnavailable("there is no home folder; set XDG_CACHE_HOME to a folder of your own") from None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "icl"


class Compiler(NamedTuple):
    """A compiler that answered `--version`."""

    path: str
    version: str


@cache
def _compiler(chosen: str | None, path: str | None) -> Compiler | str:
    """The first of $CXX, c++, g++ and clang++ on PATH that can be started, or why there is none."""
    reasons = []
    for name in (chosen, *_COMPILERS):
        if name and (found := shutil.which(name, path=path)):
            try:
                return Compiler(found, _run([found, "--version"], VERSION_S).stdout)
            except NativeUnavailable as error:
                reasons.append(str(error))
    missing = f"no C++ compiler: none of {', '.join(_COMPILERS)} is on PATH (install g++, or set CXX)"
    return reasons[0] if reasons else missing


def find_compiler() -> str:
    """Path of $CXX, c++, g++ or clang++, whichever is found first and can be started.

    Raises:
        NativeUnavailable: there is none.
    """
    compiler = _compiler(os.environ.get("CXX"), os.environ.get("PATH"))
    if isinstance(compiler, str):
        raise NativeUnavailable(compiler)
    return compiler.path


def _private_folder() -> Path:
    """The cache folder, made so that nobody else can write to it.

    Raises:
        NativeUnavailable: the folder belongs to another user.
        OSError: it cannot be made.
    """
    folder = cache_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.stat()
    if not _is_ours(about):
        raise NativeUnavailable(f"{folder} belongs to another user; set XDG_CACHE_HOME to a folder of your own")
    if _others_write(about):
        # Another user could write here until now, so the files cannot be trusted.
        folder.chmod(stat.S_IMODE(about.st_mode) & ~0o022)
        for path in folder.iterdir():
            if _OWN_FILE.fullmatch(path.name):
                path.unlink()
    return folder


def _is_sound(library: Path) -> bool:
    """Whether the library exists, matches its checksum, and could not have been written by another user."""
    try:
        for path in (library, _checksum_file(library)):
            about = path.lstat()
            if not stat.S_ISREG(about.st_mode) or not _is_ours(about) or _others_write(about):
                return False
        return _checksum_file(library).read_text() == _checksum(library)
    except (OSError, UnicodeDecodeError):
        return False


def _is_ours(about: os.stat_result) -> bool:
    return os.name != "posix" or about.st_uid in (os.geteuid(), 0)


def _others_write(about: os.stat_result) -> bool:
    return os.name == "posix" and bool(about.st_mode & 0o022)


def _checksum_file(library: Path) -> Path:
    return library.with_suffix(".so.sha256")


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def _one_at_a_time(library: Path) -> Iterator[None]:
    """Wait for another process that compiles the same file. Go on if it hangs, or if the file system has no locks."""
    lock = FileLock(f"{library}.lock", timeout=COMPILE_S, fallback_to_soft=False)
    with contextlib.suppress(Timeout, OSError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release(force=True)


def _compile(compiler: str, source: Path, definitions: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / library.name
        message = ""
        for cpu_flags in _CPU_FLAGS:
            command = [compiler, *_FLAGS, *cpu_flags, *definitions, str(source), "-o", str(output)]
            done = _run(command, COMPILE_S)
            if done.returncode == 0:
                _keep(output.read_bytes(), library)
                return
            errors = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit {done.returncode}"]
            message = message or errors[0]
    raise NativeUnavailable(f"{compiler} failed on {source.name}: {message}")


def _keep(compiled: bytes, library: Path) -> None:
    """Put a compiled library and its checksum into the cache, for this user alone."""
    _checksum_file(library).unlink(missing_ok=True)  # the old checksum must not stand beside the new library
    for path, data, mode in (
        (library, compiled, 0o700),
        (_checksum_file(library), hashlib.sha256(compiled).hexdigest().encode(), 0o600),
    ):
        with replacing(path, mode) as file:
            file.write(data)


def _run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a program, and stop it and everything that it started after `seconds`.

    Raises:
        NativeUnavailable: the program cannot be started, does not end in time, or was killed.
    """
    try:
        # In its own process group, because a compiler is several programs, and any that survives holds the pipes open.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise NativeUnavailable(f"the compiler {command[0]} cannot be started: {error}") from None
    try:
        output, errors = process.communicate(timeout=seconds)
    except BaseException as error:
        with contextlib.suppress(OSError, AttributeError):  # no groups on Windows
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        reason = _given_up[command[0]] = f"the compiler {command[0]} did not end within {seconds:.0f} seconds"
        raise NativeUnavailable(reason) from None
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise NativeUnavailable(f"the compiler {command[0]} was ended by {name}")
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


@cache
def _cpu() -> str:
    try:
        # Only the instruction sets, on which -march=native depends. Frequencies in the same file change all the time.
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
        return "\n".join(sorted(kept))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
