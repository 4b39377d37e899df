"""S3 requests: botocore clients per process, retries, counts, and error messages.

botocore sends each request once; `S3Client.retry` is the only loop that repeats one. Credentials,
region and endpoint come from the AWS variables and profiles; no message repeats one of their
values. No URL is signed: signatures are headers, which logs of stores and proxies do not show.
"""

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import botocore.session
import urllib3
from botocore import UNSIGNED
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigParseError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as NoConnectionError
from botocore.httpsession import get_cert_path
from botocore.utils import get_environ_proxies
from urllib3.exceptions import HTTPError

from vlal_dist.errors import ConfigError, NotFoundError, StorageError, VlalError
from vlal_dist.storage.checks import masked
from vlal_dist.storage.s3_counts import Reason, S3Counts, S3Tally

logger = logging.getLogger(__name__)
logging.getLogger("urllib3.connectionpool").setLevel(logging.INFO)  # else a line per request


class OutageError(StorageError):
    """The store was unreachable or busy: the same request may succeed later.

    Args:
        message: one line, with a remedy.
        reason: what a repetition is counted under.
    """

    def __init__(self, message: str, reason: Reason = "error") -> None:
        super().__init__(message)
        self.reason: Reason = reason


T = TypeVar("T")

TRIES = 5
"""Least number of times that a request, a body or a commit is tried before giving up."""
OUTAGE_S = 60.0
"""Seconds after its first failure at which a request gives up (and not before `TRIES` tries)."""
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_CONNECT_TIMEOUT_S = 10.0
_ANSWER_TIMEOUT_S = 60.0
"""Longest silence except in reads: a store may hash and replicate 5 GiB before it answers a PUT."""
_CONNECTIONS = 32
_SIGNED_S = 300.0
"""How long a signature is used: stores take it for 15 minutes from its time on."""
_REFUSED_S = 1800.0
"""How long an object is read through botocore after a direct read of it was refused."""
NO_SIGN_REQUEST = "AWS_NO_SIGN_REQUEST"
"""Environment variable: read public buckets without credentials (the name that GDAL uses)."""
_SWITCH = {"": False, "0": False, "no": False, "false": False, "off": False} | dict.fromkeys(
    ("1", "yes", "true", "on"), True
)
_DENIED = {
    "InvalidAccessKeyId": "the store does not know AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID",
    "ExpiredToken": "the session has expired: get new credentials",
    "InvalidToken": "AWS_SESSION_TOKEN is not valid: get new credentials",
    "RequestTimeTooSkewed": "the clock of this machine is wrong: set it",
}
_CREDENTIALS_FILE = "AWS_SHARED_CREDENTIALS_FILE"
_NO_BUCKET = {"NoSuchBucket", "InvalidBucketName"}
_WRONG_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraint"}
_answered: set[str] = set()
"""Endpoints that answered this process, whatever the bucket."""
# Own generator: a retry must not move the random state that training depends on.
_jitter = random.SystemRandom()


class _Sent(threading.local):
    """Requests of the thread's present call; a thread that made none has 0."""

    requests: int = 0


@dataclass
class _Process:
    """What must not cross a fork: sockets, locks, counts."""

    pid: int
    session: Any = field(default_factory=botocore.session.get_session)
    clients: dict[bool, Any] = field(default_factory=dict)
    signed: dict[str, tuple[str, dict[str, str] | None, float]] = field(default_factory=dict)
    bucket_seen: bool = False
    pool: Any = None
    endpoint: str = ""
    tally: S3Tally = field(default_factory=S3Tally)
    lock: threading.Lock = field(default_factory=threading.Lock)
    sent: _Sent = field(default_factory=_Sent)


class S3Client:
    """Requests for the objects below one root; may be shared by threads, pickled and forked.

    Args:
        url: the root, for messages.
        bucket: its bucket.
        prefix: what is put before each key, ends in `/` unless empty.
        read_timeout_s: longest silence of the server before a read is broken off.
    """

    def __init__(self, url: str, bucket: str, prefix: str, *, read_timeout_s: float) -> None:
        self.url, self.bucket, self.prefix = url, bucket, prefix
        self._read_timeout_s = read_timeout_s
        self._state: _Process | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_state": None}

    @property
    def counts(self) -> S3Counts:
        """S3Counts of this client in this process."""
        return self._process().tally.counts

    @property
    def endpoint(self) -> str:
        """Where the requests of this process go; empty before the first."""
        return masked(self._process().endpoint)

    def add(self, **more: Any) -> None:
        """Add to the counts; see `S3Counts`."""
        self._process().tally.add(S3Counts(**more))

    def retry(self, attempt: Callable[[], T], *, always: bool = False) -> T:
        """Repeat an attempt while it raises OutageError, with growing pauses.

        Args:
            attempt: one request; the store may have carried it out although it failed here.
            always: wait for an endpoint that has never answered this process, too. Without it such
                an endpoint, most likely a wrong address, is given up after `TRIES` tries.

        Raises:
            StorageError: it still fails `OUTAGE_S` after the first failure.
        """
        tries, failing_since = 0, 0.0
        while True:
            try:
                return attempt()
            except OutageError as error:
                problem = error
            tries += 1
            failing_since = failing_since or time.monotonic()
            failing_s = time.monotonic() - failing_since
            wait = always or self._process().endpoint in _answered
            if tries >= TRIES and not (wait and failing_s < OUTAGE_S):
                raise StorageError(
                    f"{problem}; given up after {tries} tries, {failing_s:.0f} s after the first "
                    "failed"
                ) from problem
            logger.warning("%s; try %d follows", problem, tries + 1)
            self.pause(tries, problem.reason)

    def pause(self, attempt: int, reason: Reason) -> None:
        """Wait before the `attempt`-th repetition (1, 2, ...): doubling, with jitter; counts it."""
        self.add(repeated={reason: 1})
        longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(attempt, 16))
        time.sleep(longest_s * _jitter.uniform(0.5, 1.0))

    def request(self, operation: str, key: str, **arguments: Any) -> Any:
        """`call`, retried."""
        return self.retry(lambda: self.call(operation, key, **arguments))

    def call(
        self,
        operation: str,
        key: str,
        *,
        passing: Collection[int] = (),
        reading: bool = False,
        **arguments: Any,
    ) -> Any:
        """Send one request, once, and return its reply.

        Args:
            operation: name of the client's method.
            key: of the object; of a listing: the prefix.
            passing: HTTP statuses that are returned as `{"status": ...}` instead of raised.
            reading: whether `read_timeout_s` limits the silence of the server.
            arguments: of the method, without bucket and key.

        Raises:
            NotFoundError: status 404, unless the bucket itself is absent.
            OutageError: the store was unreachable or busy.
            StorageError: anything else, in one line with a remedy.
        """
        process = self._process()
        place = "Prefix" if operation == "list_objects_v2" else "Key"
        arguments |= {"Bucket": self.bucket, place: self.prefix + key}
        try:
            reply = self._send(process, operation, arguments, reading=reading)
            _answered.add(process.endpoint)
            process.bucket_seen = True
            return reply
        except VlalError:
            raise
        except ClientError as error:
            _answered.add(process.endpoint)
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status in passing and error.response["Error"]["Code"] not in _NO_BUCKET:
                return {"status": status}
            raise self._refused(error, key, status) from error
        except (BotoCoreError, ValueError) as error:
            raise self._unreachable(error) from error

    def _send(
        self, process: _Process, operation: str, arguments: dict[str, Any], *, reading: bool
    ) -> Any:
        """Call a method of the client, and count the requests that this sent."""
        process.sent.requests = 0
        try:
            return getattr(self._connected(process, reading), operation)(**arguments)
        finally:
            if sent := process.sent.requests:
                self.add(requests=sent, repeated={"redirected": sent - 1} if sent > 1 else {})

    def get_signed(self, key: str, *, extent: str, etag: str) -> Any:
        """One ranged GET by headers that are signed every few minutes, through urllib3 directly.

        botocore spends 1.5 ms of Python on each request, holding the interpreter's lock, most of it
        on work that is the same for every range of an object.

        Args:
            key: the object.
            extent: the `Range` header.
            etag: the `If-Match` header.

        Returns:
            A reply like that of `call("get_object")`; None if the answer is not the range, or a
            proxy lies before the store: `call` then gets it, or says why not.

        Raises:
            OutageError: the store was unreachable or busy.
        """
        process = self._process()
        try:
            if (signed := self._signed(process, key)) is None:
                return None
            url, headers = signed
            if (pool := self._pool(process, url)) is None:
                return None
            self.add(requests=1)
            reply = pool.urlopen(
                "GET",
                url[url.index("/", url.index("://") + 3) :],
                headers={**headers, "Range": extent, "If-Match": etag},
                redirect=False,
                preload_content=False,
                decode_content=False,
                enforce_content_length=False,  # the reader keeps what a short body gives
            )
        except VlalError:
            raise
        except (BotoCoreError, HTTPError, ValueError) as error:
            # Without its cause: no traceback may show the signature.
            raise self._unreachable(error) from None
        _answered.add(process.endpoint)
        status = reply.status
        if status != 206:
            reply.close()
            if status >= 500 or status == 429:
                raise OutageError(
                    f"{self.url}: {key!r}: GetObject was refused ({status}): the store is busy; "
                    "repeat the command later",
                    "throttled" if status in (429, 503) else "error",
                )
            # Another version, expired credentials or a redirect: `call` finds out which.
            process.signed[key] = (url, None, time.monotonic() + _REFUSED_S)
            return None
        return {
            "Body": reply,
            "ETag": reply.headers.get("ETag"),
            "ContentLength": reply.headers.get("Content-Length", 0),
            "ContentRange": reply.headers.get("Content-Range", ""),
            "ResponseMetadata": {"HTTPStatusCode": status},
        }

    def _process(self) -> _Process:
        state = self._state
        if state is None or state.pid != os.getpid():
            # Two first threads may both get here; one client too many is closed unused.
            self._state = state = _Process(os.getpid())
        return state

    def _connected(self, process: _Process, reading: bool) -> Any:
        with process.lock:
            if reading not in process.clients:
                process.clients[reading] = self._connect(process, reading)
            return process.clients[reading]

    def _connect(self, process: _Process, reading: bool) -> Any:
        """A client: may be shared by threads, as the session may not.

        Stores other than AWS rarely have a host name per bucket, so they are addressed by path
        unless the AWS profile says otherwise.
        """
        try:
            return self._make_client(process, reading)
        except VlalError:
            raise
        except Exception as error:  # no request is made yet: it is the settings, whatever is raised
            raise _unusable(self.url, error) from None

    def _make_client(self, process: _Process, reading: bool) -> Any:
        session = process.session
        chosen = session.get_scoped_config().get("s3", {})
        if not isinstance(chosen, dict):
            raise ConfigError(
                f"{self.url}: {_config_file()}: 's3 =' has no value of its own: its settings are "
                "indented lines below it, such as addressing_style = path; correct the line, or "
                "remove it"
            )
        config = Config(
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=_CONNECT_TIMEOUT_S,
            read_timeout=self._read_timeout_s if reading else _ANSWER_TIMEOUT_S,
            max_pool_connections=_CONNECTIONS,
            signature_version=UNSIGNED if _unsigned() else "s3v4",
            # We send Content-MD5 and check our own digests; older stores reject the newer trailers.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        client = session.create_client("s3", config=config)
        process.endpoint = client.meta.endpoint_url
        host = urlsplit(process.endpoint).hostname or ""
        if ".amazonaws.com" not in host and "addressing_style" not in chosen:
            by_path = Config(s3={"addressing_style": "path"})
            client = session.create_client("s3", config=config.merge(by_path))

        def count_request(**_: Any) -> None:
            # Runs in the calling thread; more than once where a store redirects.
            process.sent.requests += 1

        client.meta.events.register("before-send.s3", count_request)
        return client

    def _signed(self, process: _Process, key: str) -> tuple[str, dict[str, str]] | None:
        """The URL of an object and headers of a signature; None while direct reads are refused.

        Only the address and the time are signed, so one signature serves every range.
        """
        url, headers, until = process.signed.get(key, ("", None, 0.0))
        if time.monotonic() >= until:
            client = self._connected(process, True)
            url = (
                url
                or client.generate_presigned_url(
                    "get_object", {"Bucket": self.bucket, "Key": self.prefix + key}, ExpiresIn=1
                ).partition("?")[0]
            )
            request = AWSRequest("GET", url)
            if not _unsigned():
                credentials = process.session.get_credentials()
                if credentials is None:
                    raise NoCredentialsError()
                region = client.meta.region_name
                region = "us-east-1" if region in (None, "aws-global") else region
                S3SigV4Auth(credentials.get_frozen_credentials(), "s3", region).add_auth(request)
            headers = dict(request.headers.items())
            process.signed[key] = (url, headers, time.monotonic() + _SIGNED_S)
        return None if headers is None else (url, headers)

    def _pool(self, process: _Process, url: str) -> Any:
        """Kept connections to the endpoint; None behind a proxy."""
        with process.lock:
            if process.pool is None and not get_environ_proxies(url):
                options: dict[str, Any] = {}
                if url.startswith("https:"):
                    trusted = process.session.get_config_variable("ca_bundle")
                    options["ca_certs"] = trusted or get_cert_path(True)
                process.pool = urllib3.connection_from_url(
                    url,
                    maxsize=_CONNECTIONS,
                    timeout=urllib3.Timeout(connect=_CONNECT_TIMEOUT_S, read=self._read_timeout_s),
                    retries=False,
                    **options,
                )
            return process.pool

    def _has_bucket(self) -> bool:
        """Whether the bucket is there, asked once; a HEAD's 404 does not say what is absent."""
        process = self._process()
        if not process.bucket_seen:
            try:
                self._send(process, "head_bucket", {"Bucket": self.bucket}, reading=True)
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                    return False
            except BotoCoreError:
                return True  # as far as is known
            process.bucket_seen = True
        return True

    def _refused(self, error: ClientError, key: str, status: int) -> StorageError:
        """The error for an answer; its text may hold a key id, so only its code is used."""
        code = error.response["Error"]["Code"]
        what = f"{self.url}: {key!r}: {error.operation_name} was refused ({status} {code})"
        if code in _NO_BUCKET or (status == 404 and not self._has_bucket()):
            return StorageError(
                f"{self.url}: there is no bucket {self.bucket!r} at {self.endpoint}: check the "
                "name, or create it"
            )
        if status == 404:
            return NotFoundError(f"{what}: no such object; check the root and the key")
        if code in _WRONG_REGION or status == 301:
            return StorageError(f"{what}: the bucket is in another region; set AWS_DEFAULT_REGION")
        if code in _DENIED:
            return StorageError(f"{what}: {_DENIED[code]}")
        if status == 403 and _unsigned():
            return StorageError(
                f"{what}: the bucket does not allow this to everyone: unset {NO_SIGN_REQUEST}, and "
                "give credentials"
            )
        if status in (401, 403):
            return StorageError(
                f"{what}: the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
                "AWS_SESSION_TOKEN or AWS_PROFILE) do not allow this: use those of someone who may "
                "list, read and write this bucket"
            )
        if status >= 500 or status == 429 or code == "RequestTimeout":
            reason: Reason = "throttled" if status in (429, 503) else "error"
            return OutageError(
                f"{what}: the store is busy; repeat the command later",
                "timeout" if code == "RequestTimeout" else reason,
            )
        if code == "BadDigest":
            return StorageError(f"{what}: the bytes changed on the way; repeat the command")
        return StorageError(f"{what}: check the settings of the bucket, then repeat the command")

    def _unreachable(self, error: Exception) -> StorageError:
        """The error for a request that got no answer, or could not be sent."""
        kind = type(error).__name__
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return StorageError(
                f"{self.url}: no AWS credentials ({kind}): set AWS_ACCESS_KEY_ID and "
                f"AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket {NO_SIGN_REQUEST}=yes"
            )
        if isinstance(error, HTTPClientError | NoConnectionError | HTTPError):
            # By name, as botocore and urllib3 have classes of their own.
            late = kind in ("ConnectTimeoutError", "ReadTimeoutError")
            return OutageError(
                f"{self.url}: no answer from the store ({kind}): check AWS_ENDPOINT_URL and the "
                "network",
                "timeout" if late else "unreachable",
            )
        return StorageError(
            f"{self.url}: the request could not be made ({kind}): check AWS_ENDPOINT_URL, "
            "AWS_PROFILE, AWS_DEFAULT_REGION and the AWS configuration files"
        )


def _unsigned() -> bool:
    """Whether requests are sent without credentials."""
    given = os.environ.get(NO_SIGN_REQUEST, "")
    if given.lower() not in _SWITCH:
        raise ConfigError(f"{NO_SIGN_REQUEST}={given}: give yes, or no")
    return _SWITCH[given.lower()]


def _config_file() -> str:
    return os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config"


def _unusable(url: str, error: Exception) -> ConfigError:
    """The error for AWS settings from which no client can be made; shows none of their values."""
    files = f"{_config_file()} and {os.environ.get(_CREDENTIALS_FILE) or '~/.aws/credentials'}"
    if isinstance(error, ConfigParseError):
        files = str(error.kwargs["path"])
    return ConfigError(
        f"{url}: the AWS settings cannot be used ({type(error).__name__}): correct {files}"
        + (
            ""
            if isinstance(error, ConfigParseError)
            else ", or the variables AWS_ENDPOINT_URL, AWS_PROFILE, AWS_DEFAULT_REGION"
        )
    )
