"""A real S3 server on the loopback interface, and stores that speak to it over HTTP."""

import itertools
import logging
from collections.abc import Callable, Iterator

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
