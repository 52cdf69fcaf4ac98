"""An S3 service that gives false answers. The store believes no answer that contradicts itself or the request.

Every attack is one answer. What it may do is end in one line, in time; what it may not is pass for success, change what
is here, send anything to another address, or leave work behind that goes on.
"""

import base64
import gc
import gzip
import threading
import time
import zlib
from hashlib import md5
from itertools import count
from urllib.parse import parse_qs, urlsplit

import pytest
from endpoints import Endpoint, error, trickle

from icl.storage import History, LocalStore, MirroredStore, S3Store, StorageError
from icl.storage.claims import CLAIM
from icl.storage.locks import RunInUseError

# The client leaves answers that it cannot read unclosed. They are swept up at the end, not amid a test of another file.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

VALUE = b'{"step": 1}\n'
TAG = f'"{md5(VALUE).hexdigest()}"'
ENDS_S = 0.5


class Service:
    """One address whose answer every test sets, and the client of a machine that uses it."""

    def __init__(self, endpoint):
        self.endpoint, self.answer, self.client = endpoint, None, None
        self.prefix = ""

    def store(self, **options):
        """A store whose every operation has half a second in all."""
        store = S3Store("bucket", self.prefix, **{"attempts": 1, "claim_lifetime_s": 1.0, **options})
        store._cached_client = self.client = self.client or store._client()
        store._deadline_s = ENDS_S
        return store


@pytest.fixture(scope="module")
def address():
    services = []
    with Endpoint(lambda request: services[0].answer(request)) as endpoint:
        services.append(Service(endpoint))
        yield services[0]
    gc.collect()


@pytest.fixture
def service(address, s3_environment, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", address.endpoint.url)
    address.endpoint.served.clear()
    return address


def refused(act):
    """The one line that ends it."""
    begin = time.monotonic()
    with pytest.raises(StorageError) as caught:
        act()
    assert time.monotonic() - begin < 20 * ENDS_S  # 3 of them for a listing; a busy machine
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)


# Reading a value

READS = {
    "a part of it, to a plain question": (
        206,
        VALUE[:7],
        {"Content_Range": f"bytes 0-6/{len(VALUE)}", "Content_Length": "7"},
    ),
    "what a cache has of it": (203, VALUE[:7], {}),
    "accepted, some day": (202, b"", {}),
    "nothing at all": (204, b"", {}),
    "several states": (207, b"<multistatus xmlns='DAV:'/>", {}),
    "packed on its way": (200, gzip.compress(VALUE), {"Content_Encoding": "gzip"}),
    "packed twice": (200, gzip.compress(VALUE), {"Content_Encoding": "aws-chunked, br"}),
    "more announced than sent": (200, VALUE[:7], {"Content_Length": "100000"}),
    "another checksum": (200, VALUE, {"x_amz_checksum_crc32": base64.b64encode(bytes(4)).decode()}),
    "a length that is none": (200, VALUE, {"Content_Length": "many"}),
    "a negative length": (200, VALUE, {"Content_Length": "-5"}),
    "no tag": (200, VALUE, {"ETag": ""}),
    "an error with status 200": (200, b"<Error><Code>InternalError</Code></Error>", {"ETag": ""}),
    "not changed since": (304, b"", {}),
    "several places": (300, b"", {"Location": "/elsewhere"}),
}


@pytest.mark.parametrize("attack", READS)
def test_what_is_not_the_whole_value_is_no_value(service, attack):
    status, body, headers = READS[attack]
    service.answer = lambda request: request.reply(body, status, **{"ETag": TAG, **headers})
    refused(lambda: service.store().get("icl/run/metrics.jsonl"))


@pytest.mark.parametrize(
    "head", [b"", b"Transfer-Encoding: identity\r\n", b"Content-Length: \r\n"], ids=["no length", "identity", "empty"]
)
def test_a_value_whose_end_nobody_can_tell_is_refused(service, head):
    """Closing the connection would end it: whether on purpose, nobody knows."""

    def cut(request):
        request.wfile.write(b"HTTP/1.1 200 OK\r\nETag: " + TAG.encode() + b"\r\n" + head + b"\r\n" + VALUE[:7])
        request.close_connection = True

    service.answer = cut
    refused(lambda: service.store().get("icl/run/metrics.jsonl"))


def test_encodings_of_uploads_that_some_services_keep_are_no_change(service):
    service.answer = lambda request: request.reply(VALUE, ETag=TAG, Content_Encoding="aws-chunked")
    assert service.store().get("icl/run/metrics.jsonl") == VALUE


def test_chunks_have_an_end_and_an_end_that_is_missing_is_noticed(service):
    chunk = b"%x\r\n%b\r\n" % (len(VALUE), VALUE)

    def chunked(ending):
        def answer(request):
            request.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nETag: " + TAG.encode() + b"\r\n\r\n")
            request.wfile.write(chunk + ending)
            request.close_connection = True

        return answer

    service.answer = chunked(b"0\r\n\r\n")
    assert service.store().get("icl/run/metrics.jsonl") == VALUE
    for ending in (b"", b"5\r\nab", b"zz\r\n"):
        service.answer = chunked(ending)
        refused(lambda: service.store().get("icl/run/metrics.jsonl"))


# Heads, and answers before the answer

HEADS = {
    "1xx for ever": trickle(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.05),
    "early hints for ever": trickle(b"", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", 0.05),
    "a line without an end": trickle(b"HTTP/1.1 200 OK\r\nX: ", b"y" * 4096, 0.001),
    "headers without an end": trickle(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n", 0.001),
    "no status": trickle(b"HTTP/1.1 ok\r\n\r\n", b"", 0.1),
    "another protocol": trickle(b"SSH-2.0-OpenSSH_9.6\r\n", b"", 0.1),
    "a status that is none": trickle(b"HTTP/1.1 999999 OK\r\n\r\n", b"", 0.1),
    "a second answer at once": trickle(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" * 2, b"", 0.1),
}


@pytest.mark.parametrize("attack", HEADS)
def test_a_head_that_is_none_ends_every_operation(service, attack):
    service.answer = HEADS[attack]
    store = service.store()
    store._deadline_s = 0.25
    for act in (
        lambda: store.put("icl/run/1", VALUE),
        lambda: store.get("icl/run/1"),
        lambda: store.list("icl"),
        lambda: store.exists("icl/run/1"),
        lambda: store.delete("icl/run/1"),
        lambda: store.put_longer("icl/run/metrics.jsonl", VALUE),
    ):
        refused(act)


@pytest.mark.parametrize("tag", ["", '""'])
def test_an_object_that_has_no_tag_does_not_exist_nor_is_its_absence_known(service, tag):
    service.answer = lambda request: request.reply(ETag=tag)
    refused(lambda: service.store().exists("icl/run/1"))


def test_a_record_of_unknown_length_is_not_replaced(service):
    """Whether the one there is longer cannot be said."""

    def headless(request):
        request.wfile.write(b'HTTP/1.1 200 OK\r\nETag: "x"\r\nConnection: close\r\n\r\n')
        request.close_connection = True

    service.answer = headless
    refused(lambda: service.store().put_longer("icl/run/metrics.jsonl", VALUE))
    assert service.endpoint.served.keys() == {"HEAD"}


# Writing a value


def stand_in(values, **special):
    """A service that is right but for some methods: each a function of the request and of the value there, or None."""

    def answer(request):
        path = urlsplit(request.path).path
        if request.command in special:
            return special[request.command](request, values.get(path))
        if request.command == "PUT":
            values[path] = request.body
            return request.reply(ETag=f'"{md5(request.body).hexdigest()}"')
        if request.command == "DELETE":
            values.pop(path, None)
            return request.reply(status=204)
        if path not in values:
            return error(404, "NoSuchKey")(request)
        return request.reply(values[path], ETag=f'"{md5(values[path]).hexdigest()}"')

    return answer


WRITES = {
    "the tag of nothing": lambda body: {"ETag": f'"{md5().hexdigest()}"'},
    "the tag of its beginning": lambda body: {"ETag": f'"{md5(body[:3]).hexdigest()}"'},
    "a tag of a size": lambda body: {"ETag": f'"{len(body)}"'},
    "a right tag with another checksum": lambda body: {
        "ETag": f'"{md5(body).hexdigest()}"',
        "x_amz_checksum_crc32": base64.b64encode(zlib.crc32(b"else").to_bytes(4, "big")).decode(),
    },
}


@pytest.mark.parametrize("attack", WRITES)
@pytest.mark.parametrize(
    "there", [b"", VALUE[:3], VALUE + b"x", bytes(len(VALUE))], ids=["none", "cut", "more", "zeros"]
)
def test_a_write_whose_answer_does_not_fit_is_looked_at_and_not_believed(service, attack, there):
    values = {}

    def put(request, value):
        values[urlsplit(request.path).path] = there
        request.reply(**WRITES[attack](request.body))

    service.answer = stand_in(values, PUT=put)
    assert "does not have what was sent" in refused(lambda: service.store().put("icl/run/1", VALUE))


def test_looking_at_what_was_written_has_an_end_too(service, monkeypatch):
    """The look is at an endless value: neither the time nor the memory may be."""
    monkeypatch.setattr("icl.storage.s3._LARGEST_BYTES", 10**6)
    piece = b"10000\r\n" + bytes(2**16) + b"\r\n"
    endless = trickle(b'HTTP/1.1 200 OK\r\nETag: "x"\r\nTransfer-Encoding: chunked\r\n\r\n', piece, 0.0)
    service.answer = stand_in(
        {}, PUT=lambda request, _: request.reply(ETag='"x"'), GET=lambda request, _: endless(request)
    )
    before = set(threading.enumerate())
    refused(lambda: service.store().put("icl/run/1", VALUE))
    assert none_left(before)


def none_left(before):
    """Whether of the threads that wait for an answer those that are new end."""
    for thread in set(threading.enumerate()) - before:
        if thread.name == "under a deadline":
            thread.join(20)
    return not [each for each in set(threading.enumerate()) - before if each.name == "under a deadline"]


@pytest.mark.parametrize("status", [201, 202, 206, 207])
def test_other_kinds_of_success_are_success_only_if_the_value_is_there(service, status):
    values = {}
    service.answer = stand_in(values, PUT=lambda request, _: request.reply(b"<multistatus/>", status, ETag='"x"'))
    with pytest.raises(StorageError):
        service.store().put("icl/run/1", VALUE)


@pytest.mark.parametrize("status", [200, 202, 207])
def test_a_delete_that_is_not_confirmed_is_none(service, status):
    service.answer = stand_in({}, DELETE=lambda request, _: request.reply(b"<DeleteResult/>", status))
    assert "does not confirm" in refused(lambda: service.store().delete("icl/run/1"))


PARTS = {
    "begins without a name": {"uploads": b"<InitiateMultipartUploadResult/>"},
    "takes no part": {"partNumber": b""},
    "ends in an error with status 200": {"uploadId": b"<Error><Code>AccessDenied</Code></Error>"},
    "ends without a value": {"uploadId": b"<CompleteMultipartUploadResult/>"},
}


@pytest.mark.parametrize("attack", PARTS)
def test_an_upload_in_parts_that_does_not_end_well_stores_nothing(service, attack):
    """Each step of it answers with success."""
    right = {
        "uploads": b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>",
        "uploadId": b"<CompleteMultipartUploadResult><ETag>x-1</ETag></CompleteMultipartUploadResult>",
    }

    def answer(request):
        asked = parse_qs(urlsplit(request.path).query, keep_blank_values=True)
        step = next((step for step in ("uploads", "partNumber", "uploadId") if step in asked), "")
        if request.command in ("HEAD", "GET"):
            return error(404, "NoSuchKey")(request)
        if request.command == "DELETE":
            return request.reply(status=204)
        tag = {"ETag": '"x"'} if step == "partNumber" and "partNumber" not in PARTS[attack] else {}
        return request.reply({**right, **PARTS[attack]}.get(step, b""), **tag)

    service.answer = answer
    refused(lambda: service.store(multipart_bytes=5).put("icl/run/1", VALUE))


def test_an_upload_in_parts_that_ends_as_told_but_left_something_else_is_noticed(service):
    parts = {}

    def answer(request):
        asked = parse_qs(urlsplit(request.path).query, keep_blank_values=True)
        if "uploads" in asked:
            return request.reply(
                b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
            )
        if request.command == "PUT":
            parts[int(asked["partNumber"][0])] = request.body
            return request.reply(ETag='"x"')
        if request.command == "POST":
            return request.reply(b"<CompleteMultipartUploadResult><ETag>x-1</ETag></CompleteMultipartUploadResult>")
        return request.reply(parts[1][:-1], ETag='"x-1"')

    service.answer = answer
    assert "does not have what was sent" in refused(lambda: service.store(multipart_bytes=5).put("icl/run/1", VALUE))


# Listings


def listing(*entries, folder="icl/", truncated="false", more=""):
    """An answer with so many (key, size)."""
    contents = "".join(f"<Contents><Key>{key}</Key><Size>{size}</Size></Contents>" for key, size in entries)
    echo = "" if folder is None else f"<Prefix>{folder}</Prefix>"
    return (
        f"<?xml version='1.0'?><ListBucketResult>{echo}<IsTruncated>{truncated}</IsTruncated>{more}{contents}"
        "</ListBucketResult>"
    ).encode()


BOMB = "<!DOCTYPE x [<!ENTITY a0 'xxxxxxxxxx'>" + "".join(
    f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>" for n in range(1, 10)
)
LISTINGS = {
    "of another folder": listing(("other/1", 1), folder="other/"),
    "of another folder, empty": listing(folder="other/"),
    "of the whole bucket": listing(("icl/run/1", 1), ("other/1", 1), folder=None),
    "of a folder whose name begins so": listing(("icl-2/run/1", 1), folder=None),
    "that climbs out": listing(("../icl/run/1", 1), folder=None),
    "with a size that is none": listing(("icl/run/1", "big")),
    "with a negative size": listing(("icl/run/1", -1)),
    "without a size": listing(("icl/run/1", "")),
    "with entries without names": b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents/></ListBucketResult>",
    "that says it goes on, but not where": listing(("icl/run/1", 1), truncated="true"),
    "cut amid": listing(("icl/run/1", 1), ("icl/run/2", 1))[:-30],
    "that is packed": gzip.compress(listing(("icl/run/1", 1))),
    "an error with status 200": b"<?xml version='1.0'?><Error><Code>SlowDown</Code></Error>",
    "of another call": b"<ListAllMyBucketsResult><Buckets/></ListAllMyBucketsResult>",
    "a bomb": (
        BOMB + "]><ListBucketResult><IsTruncated>false</IsTruncated><Name>&a9;</Name></ListBucketResult>"
    ).encode(),
    "in an unknown encoding": b"<?xml version='1.0' encoding='klingon'?><ListBucketResult/>",
}


@pytest.mark.parametrize("attack", LISTINGS)
def test_what_is_no_listing_of_the_folder_is_none(service, attack):
    service.answer = lambda request: request.reply(LISTINGS[attack], Content_Type="application/xml")
    message = refused(lambda: service.store().list("icl"))
    assert "AWS_ENDPOINT_URL is no address" not in message


@pytest.mark.parametrize("keys", [("icl/run/1",), ("icl/run/2", "icl/run/1")])
def test_a_listing_that_goes_in_a_circle_ends_at_once(service, keys):
    numbers = count()

    def answer(request):
        more = f"<NextContinuationToken>{next(numbers)}</NextContinuationToken>"
        request.reply(listing(*((key, 1) for key in keys), truncated="true", more=more))

    service.answer = answer
    assert "circle" in refused(lambda: service.store().list("icl"))
    assert service.endpoint.served == {"GET": 2}


def test_nobody_goes_on_listing_when_nobody_waits(service):
    numbers = count()

    def answer(request):
        time.sleep(0.01)
        number = next(numbers)
        more = f"<NextContinuationToken>{number}</NextContinuationToken>"
        request.reply(listing((f"icl/run/{number}", 1), truncated="true", more=more))

    service.answer = answer
    before = set(threading.enumerate())
    refused(lambda: service.store().list("icl"))
    assert none_left(before)


def test_names_that_are_no_keys_are_left_out_and_the_others_stay(service):
    odd = [
        "icl/../../etc/passwd",
        "icl//1",
        "icl/.claim",
        "icl/a b",
        "icl/\u202egnp",
        "icl/&#10;x",
        "icl/",
        "icl/" + "x" * 500,
    ]
    service.answer = lambda request: request.reply(listing(*((key, 3) for key in [*odd, "icl/run/1", "icl/run/1"])))
    assert service.store().sizes("icl") == {"icl/run/1": 3}


def test_what_is_listed_below_a_prefix_of_the_bucket_keeps_its_name(service):
    service.prefix = "team"
    try:
        service.answer = lambda request: request.reply(listing(("team/icl/run/1", 3), folder="team/icl/"))
        assert service.store().sizes("icl") == {"icl/run/1": 3}
        service.answer = lambda request: request.reply(listing(("icl/icl/run/1", 3), folder=None))
        refused(lambda: service.store().sizes("icl"))
    finally:
        service.prefix = ""


def test_odd_characters_of_keys_survive_a_real_service(bucket):
    store = S3Store(bucket, "a+b=c,d@e")
    store.put("icl/lr=1e-3,x@y+z/1", b"x")
    assert store.list("icl/lr=1e-3,x@y+z") == store.list() == ["icl/lr=1e-3,x@y+z/1"]


def test_uploads_of_other_folders_are_not_aborted(service):
    def answer(request):
        if request.command == "DELETE":
            return request.reply(status=204)
        uploads = "".join(
            f"<Upload><Key>{key}</Key><UploadId>1</UploadId></Upload>" for key in ("icl/run-2/1", "other")
        )
        return request.reply(f"<ListMultipartUploadsResult>{uploads}</ListMultipartUploadsResult>".encode())

    service.answer = answer
    service.store().recover("icl/run")
    assert service.endpoint.served == {"GET": 1}


# Elsewhere


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_nothing_follows_a_redirect_to_another_address(service, status):
    """Neither bytes nor signatures go to whoever the service names."""
    with Endpoint(lambda request: request.reply(ETag=TAG)) as other:
        body = f"<Error><Code>PermanentRedirect</Code><Endpoint>{other.url[7:]}</Endpoint><Bucket>b</Bucket></Error>"
        service.answer = lambda request: request.reply(
            body.encode(), status, Location=f"{other.url}/bucket", x_amz_bucket_region="eu-central-1"
        )
        store = service.store()
        for act in (lambda: store.put("icl/run/1", VALUE), lambda: store.get("icl/run/1"), lambda: store.list("icl")):
            assert other.url not in refused(act)
        assert other.served == {}


# Two copies, and who writes


def test_a_record_that_comes_shorter_than_listed_replaces_nothing_here(service, tmp_path):
    """The bucket says that it is ahead, and then does not have what it said."""
    local = LocalStore(tmp_path)
    local.put("icl/run/metrics.jsonl", VALUE)
    long = VALUE * 5

    def answer(request):
        if "list-type" in request.path:
            return request.reply(listing(("icl/run/metrics.jsonl", len(long)), folder="icl/run/"))
        return request.reply(VALUE[:4], ETag='"x"') if request.command == "GET" else error(503, "SlowDown")(request)

    service.answer = answer
    store = MirroredStore(local, service.store(), first_pause_s=0.01)
    store.recover("icl/run", History(lambda sizes: (sizes.get("icl/run/metrics.jsonl", 0),), ["icl/run/metrics.jsonl"]))
    assert local.get("icl/run/metrics.jsonl") == VALUE
    assert store.get("icl/run/metrics.jsonl") == VALUE


def claimed(service, served_at, written_at, **options):
    """A claim of another machine, as a service shows it whose clocks say so; its writer renews it every fifth second."""
    numbers = count()

    def answer(request):
        if request.command == "PUT":
            return error(412, "PreconditionFailed")(request)
        number = next(numbers) // 4
        fields = f'"host": "elsewhere", "pid": 1, "since": "today", "place": null, "token": "t", "serial": {number}'
        request.wfile.write(
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nDate: %b\r\nLast-Modified: %b\r\n" % (served_at, written_at)
        )
        body = f'{{{fields}, "free": false}}'.encode()
        request.wfile.write(b'ETag: "%d"\r\nContent-Length: %d\r\n\r\n' % (number, len(body)) + body)
        request.close_connection = True

    service.answer = answer
    return service.store(**options).claim("icl/run")


@pytest.mark.parametrize(
    ("served_at", "written_at"),
    [
        (b"Wed, 01 Jan 2031 00:00:00 GMT", b"Tue, 01 Jan 2030 00:00:00 GMT"),
        (b"Wed, 01 Jan 2031 00:00:00 GMT", b"Wed, 01 Jan 2031 00:00:00 GMT"),
        (b"Tue, 01 Jan 2030 00:00:00 GMT", b"Wed, 01 Jan 2031 00:00:00 GMT"),
        (b"yesterday", b"Wed, 01 Jan 2031 00:00:00 GMT"),
        (b"Wed, 01 Jan 99999999999999 00:00:00 GMT", b"Wed, 01 Jan 2031 00:00:00 GMT"),
    ],
    ids=["a proxy's clock is ahead", "right", "behind", "no date", "a date of no year"],
)
def test_a_claim_that_is_renewed_is_respected_whatever_the_clocks_say(service, served_at, written_at):
    claim = claimed(service, served_at, written_at)
    with pytest.raises(RunInUseError), claim.held("the run", wait_s=0.1):
        pytest.fail("two writers")


@pytest.mark.parametrize("status", [409, 412])
def test_a_claim_that_can_never_be_made_ends_the_wait(service, status):
    """Nothing is there, and every write is told that something is."""
    service.answer = stand_in({}, PUT=lambda request, _: error(status, "PreconditionFailed")(request))
    store = service.store()
    with store.claim("icl/run").held("the run"):
        assert "claim" in refused(lambda: store.put("icl/run/1", VALUE))


def test_weak_tags_of_a_proxy_lose_no_claim(service):
    """A proxy that packs answers weakens their tags; as a condition, a weak tag fits nothing."""
    values = {}

    def put(request, value):
        condition = request.headers.get("If-Match")
        if condition is not None and (value is None or condition != f'"{md5(value).hexdigest()}"'):
            return error(412, "PreconditionFailed")(request)
        if request.headers.get("If-None-Match") and value is not None:
            return error(412, "PreconditionFailed")(request)
        values[urlsplit(request.path).path] = request.body
        return request.reply(ETag=f'W/"{md5(request.body).hexdigest()}"')

    service.answer = stand_in(values, PUT=put)
    store = service.store()
    with store.claim("icl/run").held("the run"):
        for number in range(3):
            store.put(f"icl/run/{number}", VALUE)
            store.put_longer("icl/run/metrics.jsonl", VALUE * (number + 1))
            time.sleep(0.4)  # renewals of a claim that lives for a second
    assert values["/bucket/icl/run/metrics.jsonl"] == VALUE * 3


def test_a_huge_claim_is_not_read_to_its_end(service):
    big = b"x" * 2**20

    def answer(request):
        request.reply(big if request.path.endswith(CLAIM) else b"", ETag='"x"')

    service.answer = answer
    refused(lambda: service.store().claim("icl/run").holder())
