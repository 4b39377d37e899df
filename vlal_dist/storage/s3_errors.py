"""What a failed S3 request means to the user; no message repeats a credential."""

from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
)
from botocore.exceptions import (
    ConnectionError as NoConnectionError,
)

from vlal_dist.errors import NotFoundError, StorageError
from vlal_dist.storage.s3_counts import Reason

_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}
_WRONG_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraint"}


class OutageError(StorageError):
    """The store was out of reach or busy: the same request may succeed later.

    Args:
        message: in one line, with a remedy.
        reason: what a repetition is counted under.
    """

    def __init__(self, message: str, reason: Reason = "error") -> None:
        super().__init__(message)
        self.reason: Reason = reason


def reason_of(status: int) -> Reason:
    """What a repetition after an answer of this HTTP status is counted under."""
    return "throttled" if status in (429, 503) else "error"


def refused(error: ClientError, *, url: str, bucket: str, key: str, status: int) -> StorageError:
    """The error for an answer; its text may hold a key id, so only its code is used."""
    code = error.response["Error"]["Code"]
    what = f"{url}: {key!r}: {error.operation_name} was refused ({status} {code})"
    if code == "NoSuchBucket":
        return StorageError(
            f"{what}: there is no bucket {bucket!r}; create it, or check the name "
            "and AWS_ENDPOINT_URL"
        )
    if status == 404:
        return NotFoundError(f"{what}: no such object; check the root and the key")
    if code in _WRONG_REGION or status == 301:
        return StorageError(f"{what}: the bucket is in another region; set AWS_DEFAULT_REGION")
    if status == 403 or code in _DENIED:
        return StorageError(
            f"{what}: check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or "
            "AWS_PROFILE, and that they may list, read and write this bucket"
        )
    if status >= 500 or status == 429 or code == "RequestTimeout":
        reason = "timeout" if code == "RequestTimeout" else reason_of(status)
        return OutageError(f"{what}: the store is busy; repeat the command later", reason)
    if code == "BadDigest":
        return StorageError(f"{what}: the bytes changed on the way; repeat the command")
    return StorageError(f"{what}: check the settings of the bucket, then repeat the command")


def unreachable(error: Exception, *, url: str, connected: bool) -> StorageError:
    """The error for a request that got no answer, or could not be sent."""
    kind = type(error).__name__
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return StorageError(
            f"{url}: no AWS credentials ({kind}): set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if isinstance(error, HTTPClientError | NoConnectionError) and connected:
        late = isinstance(error, ConnectTimeoutError | ReadTimeoutError)
        return OutageError(
            f"{url}: no answer from the store ({kind}): check AWS_ENDPOINT_URL and the network",
            "timeout" if late else "unreachable",
        )
    return StorageError(
        f"{url}: the request could not be made ({kind}): check AWS_ENDPOINT_URL, "
        "AWS_PROFILE, AWS_DEFAULT_REGION and the AWS configuration files"
    )
