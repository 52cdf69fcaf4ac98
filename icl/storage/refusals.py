"""What the exceptions of boto3 mean and what to do about them.

No message quotes the client's or the service's own words, because these may contain keys, addresses or a password.
"""

import re
from typing import Any

MISSING = {"NoSuchKey", "404", "NotFound"}
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"}
REFUSED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AllAccessDisabled", "403", "Forbidden"}
DAMAGED = {"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch"}
_BUSY = {"SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout"}
_ELSEWHERE = {
    *("AuthorizationHeaderMalformed", "InvalidRegionName", "IllegalLocationConstraintException", "InvalidRegionError"),
    *("PermanentRedirect", "TemporaryRedirect", "Redirect", "301", "302", "307", "308", "NoRegionError"),
}
_FULL = {"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "507", "InsufficientStorage"}

NOT_S3 = "check AWS_ENDPOINT_URL, and that no proxy or login page stands before the service"
_CHECKSUMS = (
    "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required and AWS_RESPONSE_CHECKSUM_VALIDATION=when_required, which some "
    "services need"
)


class NotS3Error(Exception):
    """The service reports success, but its answer is not S3's. The message, in our own words, says what is wrong."""


def code_of(error: BaseException) -> str:
    """The service's name of the error; empty if the service did not answer."""
    code = _answer(error).get("Error", {}).get("Code", "")
    # One short word only, because it goes into messages.
    return code if isinstance(code, str) and re.fullmatch(r"[\w.-]{1,60}", code) else ""


def status_of(error: BaseException) -> int:
    """The HTTP status of the error; 0 if the service did not answer."""
    return _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def explain(error: BaseException) -> str:
    """What happened and what to do."""
    name, code = type(error).__name__, code_of(error)
    about = str(_answer(error).get("Error", {}).get("Message", "")).lower()
    if isinstance(error, NotS3Error):
        return f"{error}; {NOT_S3}"
    if code == "NoSuchBucket":
        return "there is no such bucket; create it or correct AWS_BUCKET_NAME"
    if code in EXPIRED:
        return "the credentials have expired; renew them"
    if code in REFUSED:
        return (
            f"the service refuses these credentials ({code}); check AWS_ACCESS_KEY_ID, its secret and its permissions: "
            "to list, read, write and delete"
        )
    if code in _ELSEWHERE or name in _ELSEWHERE:
        return f"the bucket is in another region, or at another address; set {_region(error)} or AWS_ENDPOINT_URL"
    if code in _FULL:
        return f"the bucket is full ({code}); free some space or raise its quota"
    if code == "NotImplemented" or "checksum" in about:
        return f"the service refuses a header of the request ({code}); {_CHECKSUMS}"
    if code.startswith("KMS."):
        return f"the bucket's encryption key cannot be used ({code}); enable it, or allow these credentials to use it"
    if code == "InvalidObjectState":
        return "it was archived; restore it from the archive first"
    if code == "RequestTimeTooSkewed":
        return "this machine's clock is wrong; set it"
    if code.isdigit() or (name == "ClientError" and not code):  # botocore's names for an answer not in S3's form
        return f"the service does not answer as S3 does (HTTP {status_of(error)}); try again later, or {NOT_S3}"
    if code in _BUSY:
        return f"the service is overloaded ({code}); try again later"
    if code in DAMAGED:
        return f"the data arrive damaged ({code}); check the network"
    if "Credential" in name or name in ("TokenRetrievalError", "UnauthorizedSSOTokenError", "SSOTokenLoadError"):
        return (
            "no usable credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`"
        )
    if name in ("ProfileNotFound", "ConfigParseError", "InvalidConfigError", "ConfigNotFound"):
        return f"boto3's own settings cannot be used ({name}); correct AWS_PROFILE or the file ~/.aws/config"
    if name in ("SSLError", "InvalidProxiesConfigError"):
        return f"no safe connection can be made ({name}); set AWS_CA_BUNDLE, or https or http in AWS_ENDPOINT_URL"
    if name in ("EndpointConnectionError", "ConnectTimeoutError", "ConnectionClosedError", "ProxyConnectionError"):
        return f"the service cannot be reached ({name}); check the network and AWS_ENDPOINT_URL"
    if name in ("ReadTimeoutError", "DeadlineError"):
        return "the service did not answer in time; try again later, or check the network and AWS_ENDPOINT_URL"
    if name == "ParamValidationError":
        return "this is not a valid bucket name; correct AWS_BUCKET_NAME"
    if name == "RecursionError":
        return (
            "the service redirects in a circle; set AWS_DEFAULT_REGION to the bucket's region, or correct "
            "AWS_ENDPOINT_URL"
        )
    if name in ("ResponseParserError", "PaginationError", "KeyError"):
        return f"the answer is not that of an S3 service ({name}); {NOT_S3}"
    if isinstance(error, ValueError) and not code:  # InvalidEndpoint and its like
        return "AWS_ENDPOINT_URL is not an address; write http://host:port or https://host"
    status = f", HTTP {status_of(error)}" if status_of(error) else ""
    return f"the request failed ({code or name}{status}); check the network, AWS_ENDPOINT_URL and the bucket's settings"


def _answer(error: BaseException) -> dict[str, Any]:
    # Some botocore errors have the attribute without a response in it.
    answer = getattr(error, "response", None)
    return answer if isinstance(answer, dict) else {}


def _region(error: BaseException) -> str:
    """The setting that is wrong, with its right value if the service says it."""
    headers = _answer(error).get("ResponseMetadata", {}).get("HTTPHeaders", {})
    named = _answer(error).get("Error", {}).get("Region") or headers.get("x-amz-bucket-region") or ""
    return f"AWS_DEFAULT_REGION={named}" if re.fullmatch(r"[a-z0-9-]{1,40}", str(named)) else "AWS_DEFAULT_REGION"
