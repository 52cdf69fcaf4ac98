"""The bucket, over HTTP to a real server, with faults on the wire."""

import os
import socket
import subprocess
import sys
import time

import pytest
from s3_faults import FAULTS, FaultProxy, at_random

from icl.storage import S3Store, StorageError

PAYLOAD = bytes(range(251)) * 97


def direct_url(server):
    return f"http://{server[0]}:{server[1]}"


def fill(bucket, count):
    """Checkpoints' keys, written by the server's own hand: what is tested is the listing."""
    from moto.s3.models import s3_backends

    backend = next(
        backend for account in s3_backends.values() for backend in account.values() if bucket in backend.buckets
    )
    for step in range(count):
        backend.put_object(bucket, f"icl/run/{step}.safetensors", b"")


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_of_each_kind_is_survived_by_every_operation(fault, s3_server, s3_through):
    with FaultProxy(s3_server) as proxy:
        store = s3_through(proxy.url)
        for act, expected in (
            (lambda: store.put("icl/run/1", PAYLOAD), None),
            (lambda: store.get("icl/run/1"), PAYLOAD),
            (lambda: store.sizes("icl/run"), {"icl/run/1": len(PAYLOAD)}),
            (lambda: store.exists("icl/run/1"), True),
            (lambda: store.delete("icl/run/1"), None),
        ):
            # A listing has no checksum; its XML, with one bit flipped, no longer parses, and that is an error too.
            proxy.schedule = iter([fault])
            assert act() == expected
        assert not store.exists("icl/run/1")
        assert proxy.injected[fault] >= (3 if fault == "wrong checksum" else 5)  # finding and deleting carry no data


IMPORT_AT_ONCE = """
import importlib.machinery, sys, threading, time
from icl.storage import S3Store, StorageError

class SlowFinder:
    def find_spec(self, name, path=None, target=None):
        if name == "boto3":
            spec = importlib.machinery.PathFinder.find_spec(name)
            spec.loader.create_module = lambda spec: time.sleep(0.5)
            return spec

sys.meta_path.insert(0, SlowFinder())
store = S3Store("bucket", connect_timeout_s=0.2, attempts=1)
failures = []

def act(method, delay):
    time.sleep(delay)
    try:
        method("icl")
    except StorageError:
        pass
    except BaseException as error:
        failures.append(error)

threads = [threading.Thread(target=act, args=pair) for pair in ((store.list, 0.0), (store.recover, 0.2))]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
sys.exit(str(failures) if failures else 0)
"""


def test_two_threads_may_be_the_first_to_need_boto3(s3_environment):
    """Importing a package and one of its modules at the same time ends, without care, in a deadlock error in one."""
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_AT_ONCE],
        env={**os.environ, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("count", [25, pytest.param(600, marks=pytest.mark.slow)])
def test_random_faults_lose_nothing(s3_server, s3_through, count):
    faults = [fault for fault in FAULTS if fault != "stall"]  # each costs its timeout; tested above
    with FaultProxy(s3_server, at_random(faults, 0.3, seed=1)) as proxy:
        store = s3_through(proxy.url, attempts=12)
        values = {f"icl/run/{index:03}": bytes([index % 256]) * 1009 for index in range(count)}
        for key, value in values.items():
            store.put(key, value)
            assert store.get(key) == value
        assert store.list("icl/run") == list(values)
        assert proxy.injected.total() > count / 2
        print(f"{proxy.injected.total()} faults injected and survived: {dict(proxy.injected)}")


def test_a_value_is_visible_whole_or_not_at_all(s3_server, s3_through, bucket):
    half_written = ["reset amid the request"] * 50
    with FaultProxy(s3_server, half_written) as proxy:
        store = s3_through(proxy.url, attempts=2)
        for key, size in (("small", 1000), ("large", 17 * 2**20)):
            with pytest.raises(
                StorageError, match=f"cannot write {key} in s3://{bucket}: the service cannot be reached"
            ):
                store.put(key, b"x" * size)
    assert s3_through(direct_url(s3_server)).list() == []


def test_large_values_go_in_parts_and_survive_faults(s3_server, s3_through):
    data = PAYLOAD * 900
    assert len(data) > 20 * 2**20
    schedule = [None, "500", None, "reset amid the request", "503", None]
    with FaultProxy(s3_server, schedule) as proxy:
        store = s3_through(proxy.url, read_timeout_s=20.0)
        store.put("large", data)
        assert proxy.requests["POST"] >= 2
        assert proxy.injected.total() == 3
        assert store.get("large") == data


def test_parts_that_a_killed_writer_left_are_removed(s3_server, s3_through, bucket):
    import boto3

    store = s3_through(direct_url(s3_server))
    client = boto3.session.Session().client("s3")
    for key in ("icl/run-1/5", "icl/run-10/5"):
        client.create_multipart_upload(Bucket=bucket, Key=key)
    store.recover("icl/run-1")
    left = client.list_multipart_uploads(Bucket=bucket)["Uploads"]
    assert [upload["Key"] for upload in left] == ["icl/run-10/5"]


def test_12_000_keys_are_listed_in_a_dozen_requests_and_then_in_none(s3_server, s3_through):
    direct = s3_through(direct_url(s3_server))
    direct.put("icl/run/first", b"x")
    fill(direct.bucket, 12_000)
    with FaultProxy(s3_server) as proxy:
        store = s3_through(proxy.url, read_timeout_s=20.0)
        assert len(store.list("icl/run")) == 12_001
        assert proxy.requests.total() == 13
        store.put("icl/run/last", b"x")
        store.delete("icl/run/first")
        before = proxy.requests.total()
        keys = store.list("icl/run")
        assert proxy.requests.total() == before
        assert len(keys) == 12_001
        assert "icl/run/last" in keys
        assert "icl/run/first" not in keys


def test_12_000_keys_are_listed_through_faults(s3_server, s3_through):
    faults = [kind for kind in FAULTS if kind != "wrong checksum"]  # which only data carry
    # One page of a thousand keys fails, the next comes at once.
    schedule = [met for fault in faults for met in (fault, None)]
    with FaultProxy(s3_server, schedule, stall_s=0.1) as proxy:
        store = s3_through(proxy.url, read_timeout_s=20.0)
        fill(store.bucket, 12_000)
        assert len(store.list("icl/run")) == 12_000
        assert proxy.injected.total() == len(faults)
        assert proxy.requests.total() == 12 + len(faults)


def test_listings_see_the_writes_of_others_after_their_lifetime(s3_server, s3_through):
    url = direct_url(s3_server)
    mine, other = s3_through(url, listing_lifetime_s=0.05), s3_through(url)
    assert mine.list("icl") == []
    other.put("icl/x", b"x")
    time.sleep(0.06)
    assert mine.list("icl") == ["icl/x"]


def test_a_service_that_is_gone_takes_bounded_time_and_names_the_remedy(s3_through, bucket):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    store = s3_through(f"http://127.0.0.1:{port}", attempts=3)
    for act in (lambda: store.put("a", b"x"), lambda: store.get("a"), lambda: store.list(), lambda: store.exists("a")):
        start = time.monotonic()
        with pytest.raises(StorageError, match=r"cannot be reached .*; check the network and AWS_ENDPOINT_URL"):
            act()
        assert time.monotonic() - start < 3 * (1.0 + 0.5) + 1 + 2


def test_a_service_that_never_answers_takes_bounded_time(s3_server, s3_through):
    with FaultProxy(s3_server, ["stall"] * 100) as proxy:
        store = s3_through(proxy.url, attempts=2)
        start = time.monotonic()
        with pytest.raises(StorageError, match="did not answer in time"):
            store.put("a", b"x")
        assert time.monotonic() - start < 2 * (1.0 + 0.5) + 1 + 1


@pytest.mark.parametrize(
    ("code", "status", "remedy"),
    [
        ("ExpiredToken", 400, "the credentials have expired; renew them"),
        ("InvalidAccessKeyId", 403, "the service refuses these credentials"),
        ("AccessDenied", 403, "the service refuses these credentials"),
        ("RequestTimeTooSkewed", 403, "this machine's clock is wrong; set it"),
        ("NoSuchBucket", 404, "there is no such bucket; create it or correct AWS_BUCKET_NAME"),
        ("Strange", 400, "the request failed (Strange, HTTP 400); check the network, AWS_ENDPOINT_URL"),
    ],
)
def test_refusals_are_explained(s3_server, s3_through, monkeypatch, code, status, remedy):
    import s3_faults

    monkeypatch.setitem(s3_faults._ERRORS, "refusal", (code, status))
    with FaultProxy(s3_server, ["refusal"] * 9) as proxy:
        with pytest.raises(StorageError) as caught:
            s3_through(proxy.url).put("a", b"x")
        assert remedy in str(caught.value)
        assert "test-secret" not in str(caught.value)
        assert "test-key-id" not in str(caught.value)


def test_renewed_credentials_are_found_without_a_restart(s3_server, s3_through, monkeypatch):
    import s3_faults

    monkeypatch.setitem(s3_faults._ERRORS, "expired", ("ExpiredToken", 400))
    with FaultProxy(s3_server, ["expired"]) as proxy:
        store = s3_through(proxy.url)
        with pytest.raises(StorageError, match="expired"):
            store.put("a", b"x")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "renewed")
        store.put("a", b"x")
        assert store._client()._request_signer._credentials.access_key == "renewed"


def test_without_credentials_the_message_says_what_to_set(s3_environment, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(StorageError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        S3Store("some-bucket").put("a", b"x")
    with pytest.raises(StorageError, match="not a valid bucket name; correct AWS_BUCKET_NAME"):
        S3Store("not a bucket!").put("a", b"x")
