"""An answer of success is not success: services that store nothing, list nothing, go on for ever or lead elsewhere."""

import contextlib
import io
import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from endpoints import Endpoint, error, page, trickle
from rich.console import Console
from s3_faults import FaultProxy

from icl.checkpoints import Checkpoints
from icl.checkpoints.runs import copy_run
from icl.commands import doctor
from icl.storage import LocalStore, MirroredStore, S3Store, StorageError

PASSWORD = "plantedPW"


@pytest.fixture
def store_at(s3_environment, monkeypatch):
    def build(url, **options):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        return S3Store("bucket", **{"connect_timeout_s": 2.0, "read_timeout_s": 3.0, "attempts": 2, **options})

    return build


def hasty(store, seconds=0.4):
    """The same store with so much time for one operation, in all; making its client, the machine's own time, is over."""
    store._client()
    store._deadline_s = seconds
    return store


OPERATIONS = {
    "put": lambda store: store.put("icl/run/1", b"value"),
    "put in parts": lambda store: store.put("icl/run/1", b"value" * 10**3),
    "put_longer": lambda store: store.put_longer("icl/run/log.jsonl", b"{}\n"),
    "get": lambda store: store.get("icl/run/1"),
    "list": lambda store: store.list("icl"),
    "exists": lambda store: store.exists("icl/run/1"),
    "delete": lambda store: store.delete("icl/run/1"),
}


def refused(store, operation):
    """The message of the error that ends an operation in time."""
    bound_s = 3 * store._deadline_s + 4  # of a listing, which has three times as long; a busy machine
    start = time.monotonic()
    with pytest.raises(StorageError) as caught:
        OPERATIONS[operation](store)
    assert time.monotonic() - start < bound_s
    message = str(caught.value)
    assert "\n" not in message
    assert PASSWORD not in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


PAGES = {
    "HTML": page(),
    "broken HTML": page(body=b"<html><body>Please log in<br></html>"),
    "nothing": page(body=b""),
    "JSON": page(body=b'{"ok": true}'),
    "another XML": page(body=b"<?xml version='1.0'?><feed><entry>IsTruncated</entry></feed>"),
    "404 HTML": page(404),
}
NO_BODY = ("404 HTML", "exists")


@pytest.mark.parametrize("answer", PAGES)
def test_a_page_is_no_answer(store_at, answer):
    with Endpoint(PAGES[answer]) as service:
        store = store_at(service.url, multipart_bytes=10**3)
        # A head has no body; without one nobody can tell a page's 404 from the true one.
        told = {operation: refused(store, operation) for operation in OPERATIONS if (answer, operation) != NO_BODY}
        assert not [message for message in told.values() if "check AWS_ENDPOINT_URL" not in message]


def test_a_value_that_was_not_stored_as_sent_is_no_success(store_at):
    values = {}

    def forgets(request):
        if request.command == "PUT":
            values[request.path] = request.body[:-1]
            request.reply(ETag='"0123456789abcdef0123456789abcdef"')
        else:
            request.reply(values.get(request.path, b""), ETag='"0123456789abcdef0123456789abcdef"')

    with Endpoint(forgets) as service:
        assert "does not have what was sent" in refused(store_at(service.url), "put")


def test_tags_that_are_no_checksum_are_believed_after_a_look(store_at):
    """Some kinds of encryption give every object a tag that has nothing to do with its bytes."""
    values = {}

    def encrypts(request):
        if request.command == "PUT":
            values[request.path] = request.body
        request.reply(values[request.path] if request.command == "GET" else b"", ETag='"x"')

    with Endpoint(encrypts) as service:
        store_at(service.url).put("icl/run/1", b"value")
        assert service.served == {"PUT": 1, "GET": 1}


@pytest.mark.parametrize(
    "head",
    [
        b'HTTP/1.1 200 OK\r\nETag: "x"\r\nContent-Length: 100000\r\n\r\n',
        b'HTTP/1.1 200 OK\r\nETag: "x"\r\nTransfer-Encoding: chunked\r\n\r\n',
        b"HTTP/1.1 200 OK\r\nX-Long: ",
        b"",
    ],
    ids=["a body", "chunks", "headers", "the first line"],
)
def test_a_trickle_ends(store_at, head):
    drop = b"1\r\nx\r\n" if b"chunked" in head else b"x"
    answered_by_a_head = ("exists", "put_longer") if b"ETag" in head else ()
    with Endpoint(trickle(head, drop)) as service, ThreadPoolExecutor() as pool:
        store = hasty(store_at(service.url, multipart_bytes=10**3))
        waiting = [pool.submit(refused, store, each) for each in OPERATIONS if each not in answered_by_a_head]
        for each in waiting:
            each.result()


def test_a_value_that_never_ends_is_ended(store_at, monkeypatch):
    monkeypatch.setattr("icl.storage.s3._LARGEST_BYTES", 10**6)
    piece = b"10000\r\n" + bytes(2**16) + b"\r\n"
    endless = trickle(b'HTTP/1.1 200 OK\r\nETag: "x"\r\nTransfer-Encoding: chunked\r\n\r\n', piece, 0.0)
    with Endpoint(endless) as service:
        assert "larger than any that icl writes" in refused(store_at(service.url), "get")


@pytest.mark.parametrize("keys", ["new", "the same", "none"])
@pytest.mark.parametrize("new_tokens", [True, False])
def test_a_listing_that_never_ends_is_ended(store_at, keys, new_tokens):
    count = itertools.count()

    def answer(request):
        number = next(count)
        key = number if keys == "new" else 0
        content = b"" if keys == "none" else b"<Contents><Key>icl/run/%d</Key><Size>1</Size></Contents>" % key
        request.reply(
            b"<?xml version='1.0'?><ListBucketResult><IsTruncated>true</IsTruncated>"
            b"<NextContinuationToken>%d</NextContinuationToken>%b</ListBucketResult>"
            % (number if new_tokens else 0, content)
        )

    with Endpoint(answer) as service:
        refused(hasty(store_at(service.url)), "list")


@pytest.mark.parametrize("status", [301, 307])
def test_redirects_end(store_at, status):
    def elsewhere(request):
        request.reply(status=status, Location=f"{service.url}/again")

    with Endpoint(elsewhere) as service:
        store = store_at(service.url, multipart_bytes=10**3)
        for operation in OPERATIONS:
            assert "AWS_ENDPOINT_URL" in refused(store, operation)


@pytest.mark.parametrize(
    "endpoint",
    [
        f"user:{PASSWORD}@127.0.0.1:9000",
        f"http://user:{PASSWORD}@127.0.0.1:9",
        f"http://user:{PASSWORD}@127.0.0.1:notaport",
        f"http://user:{PASSWORD}@[::1",
        f"ftp://user:{PASSWORD}@127.0.0.1",
        f"//user:{PASSWORD}@127.0.0.1",
        f"http://user:{PASSWORD}@127.0.0.1:999999",
        f"http://user:{PASSWORD}@ä\u202e.invalid",
        f"http://user:{PASSWORD}@name.invalid",
        f"http:/{PASSWORD}",
        PASSWORD,
        " ",
        "http://",
    ],
)
def test_an_address_that_is_none_is_one_line_without_its_password(store_at, endpoint, caplog):
    store = store_at(endpoint, attempts=1)
    for operation in ("put", "list"):
        assert "AWS_ENDPOINT_URL" in refused(store, operation)
    assert PASSWORD not in caplog.text


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("AWS_PROFILE", f"none-{PASSWORD}", "correct AWS_PROFILE"),
        ("AWS_DEFAULT_REGION", f"no {PASSWORD} region", "AWS_DEFAULT_REGION"),
        ("AWS_CA_BUNDLE", f"/nonexistent/{PASSWORD}", ""),
        ("AWS_MAX_ATTEMPTS", PASSWORD, ""),
        ("AWS_REQUEST_CHECKSUM_CALCULATION", PASSWORD, ""),
        ("HTTPS_PROXY", f"http://user:{PASSWORD}@127.0.0.1:9", "cannot be reached"),
    ],
)
def test_settings_of_boto3_that_are_wrong_are_one_line(s3_environment, monkeypatch, variable, value, remedy):
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://bucket.invalid")
    store = S3Store("bucket", connect_timeout_s=0.5, read_timeout_s=0.5, attempts=2)
    assert remedy in refused(store, "put")


@pytest.mark.parametrize(
    ("answer", "remedy"),
    [
        (
            error(400, "AuthorizationHeaderMalformed", "wrong", "<Region>eu-central-1</Region>"),
            "set AWS_DEFAULT_REGION=eu-central-1",
        ),
        (error(400, "AuthorizationHeaderMalformed", "wrong", f"<Region>{PASSWORD} x</Region>"), "AWS_DEFAULT_REGION or"),
        (error(400, "InvalidRegionName"), "AWS_DEFAULT_REGION"),
        (error(301, "PermanentRedirect", more="<Endpoint>b.s3.eu-central-1.example</Endpoint>"), "AWS_DEFAULT_REGION"),
        (error(400, "InvalidArgument", "Unsupported header 'x-amz-sdk-checksum-algorithm'"), "CHECKSUM_CALCULATION"),
        (error(501, "NotImplemented"), "AWS_REQUEST_CHECKSUM_CALCULATION=when_required"),
        (error(403, "QuotaExceeded"), "free some space or raise its quota"),
        (error(507, "XMinioStorageFull"), "free some space or raise its quota"),
        (error(400, "KMS.DisabledException"), "enable it, or allow these credentials"),
        (error(403, "AccessDenied"), "to list, read, write and delete"),
        (error(400, f"{PASSWORD} {PASSWORD}"), "HTTP 400"),
    ],
)  # fmt: skip
def test_every_refusal_names_its_remedy_in_a_run_and_in_doctor(tmp_path, store_at, answer, remedy):
    with Endpoint(answer) as service:
        store = store_at(service.url)
        assert remedy in refused(store, "put")
        healthy, text = diagnosis(tmp_path)
        assert not healthy
        assert remedy.split()[0] in text
        assert PASSWORD not in text


def diagnosis(folder):
    console = Console(width=300, file=io.StringIO())
    healthy = doctor.report(
        {"LOCAL_ROOT": str(folder), "AWS_BUCKET_NAME": "bucket", "WANDB_MODE": "disabled"}, console=console
    )
    return healthy, console.file.getvalue()


def test_a_page_takes_no_copy_and_doctor_says_so(tmp_path, store_at):
    run = Checkpoints(LocalStore(tmp_path), "run")
    run.save(0, {"w": torch.zeros(3)})
    with Endpoint(page()) as service:
        with contextlib.suppress(StorageError):
            assert copy_run(run.store, store_at(service.url), "run").problems
        healthy, text = diagnosis(tmp_path)
        assert not healthy
        assert "check AWS_ENDPOINT_URL" in text


@pytest.mark.parametrize(
    ("forbidden", "said"),
    [("put", "cannot write"), ("list", "cannot list"), ("get", "cannot read"), ("delete", "cannot delete")],
)
def test_doctor_tries_each_part_on_the_bucket_itself(tmp_path, bucket, s3_server, monkeypatch, forbidden, said):
    """The folder has the value; the bucket, which refuses one operation, is not healthy all the same."""

    def operation(request):
        method = request.command.lower()
        return "list" if method == "get" and "list-type" in request.path else method

    with FaultProxy(s3_server) as proxy:
        handler = proxy._server.RequestHandlerClass
        forward = handler._forward
        body = b"<Error><Code>AccessDenied</Code></Error>"
        denied = 403, [("Content-Length", str(len(body)))], body
        handler._forward = lambda request, data: denied if operation(request) == forbidden else forward(request, data)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        environ = {"LOCAL_ROOT": str(tmp_path), "AWS_BUCKET_NAME": bucket, "WANDB_MODE": "disabled"}
        console = Console(width=300, file=io.StringIO())
        assert not doctor.report(environ, console=console)
        assert said in console.file.getvalue()
        handler._forward = forward
        assert doctor.report(environ, console=Console(file=io.StringIO()))
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "icl"])


def test_a_run_goes_on_beside_any_of_them(tmp_path, store_at):
    for name, answer in (("page", page()), ("redirect", lambda request: request.reply(status=307, Location="/x"))):
        with Endpoint(answer) as service:
            store = MirroredStore(LocalStore(tmp_path / name), store_at(service.url), first_pause_s=0.01)
            run = Checkpoints(store, "run")
            with run.lock():
                run.save_state(1, {"w": torch.zeros(3)})
                assert run.flush(20.0) != ()
            assert run.states() == [1]
