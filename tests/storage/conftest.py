"""A real S3 server on the loopback interface, stores that speak to it over HTTP, and disks with little room or none."""

import contextlib
import errno
import itertools
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from icl.storage import S3Store

_buckets = itertools.count()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[str, int]]:
    """Address of a moto server, with buckets that no other session sees."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def s3_environment(s3_server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """boto3's own chain leads to the server, and to no credential of this machine."""
    host, port = s3_server
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test-key-id",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_BUCKET_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def bucket(s3_environment: None) -> str:
    """A new empty bucket."""
    import boto3

    name = f"bucket-{next(_buckets)}"
    boto3.session.Session().client("s3").create_bucket(Bucket=name)
    return name


@pytest.fixture
def s3_through(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., S3Store]:
    """(endpoint URL, bucket) -> a store with short timeouts that reaches the bucket through that address."""

    def build(url: str, **options: object) -> S3Store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        settings: dict = {"connect_timeout_s": 1.0, "read_timeout_s": 0.5, "attempts": 4, **options}
        return S3Store(bucket, **settings)

    return build


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Path]]:
    """KiB -> a folder with so much room: a file system of that size, or, for who may not mount one, a refusing fsync."""
    with contextlib.ExitStack() as cleanup:

        def make(kib: int) -> Path:
            folder = tmp_path / "disk"
            folder.mkdir()
            if _mount(cleanup, folder, "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs"):
                return folder
            real = os.fsync

            def fsync(descriptor: int) -> None:
                if sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) > kib * 1024:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                real(descriptor)

            monkeypatch.setattr(os, "fsync", fsync)
            return folder

        yield make


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Makes a folder read-only for everybody, root included; without a right to mount, by refusing to create files."""
    with contextlib.ExitStack() as cleanup:

        def make(folder: Path) -> None:
            if _mount(cleanup, folder, "--bind", "-o", "ro", str(folder)):
                return
            for name in ("open", "mkdir", "unlink"):
                monkeypatch.setattr(os, name, _refusing(getattr(os, name), folder))

        yield make


def _mount(cleanup: contextlib.ExitStack, folder: Path, *arguments: str) -> bool:
    program = shutil.which("mount")
    if program is None or subprocess.run([program, *arguments, folder], capture_output=True).returncode:
        return False
    cleanup.callback(subprocess.run, ["umount", folder], check=True)
    return True


def _refusing(call: Callable[..., int], folder: Path) -> Callable[..., int]:
    def refuse(path: str | os.PathLike[str], flags: int = os.O_CREAT, *rest: object, **options: object) -> int:
        if Path(path).is_relative_to(folder) and flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return call(path, *(() if call is os.unlink else (flags,)), *rest, **options)

    return refuse
