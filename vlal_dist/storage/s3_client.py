"""S3 requests: the client of this process, retries during outages, counts, and error messages.

All repetition happens here, in one loop; the client below sends each request once.

The only file that imports boto3. Credentials, region and endpoint come from the AWS variables and
profiles; no message repeats one of their values.
"""

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args
from urllib.parse import urlsplit

import boto3.session
import botocore.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
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
from vlal_dist.storage.s3_connections import Connections

logger = logging.getLogger(__name__)

Reason = Literal[
    "throttled",  # the store asked for fewer requests (429, 503)
    "error",  # it failed (5xx), or answered something else than was asked
    "unreachable",  # no connection, or one that ended before the answer
    "timeout",  # no answer, or silence within one
    "truncated",  # the body ended early; what came is kept
    "altered",  # what arrived had another sha256 than was recorded
    "commit",  # a create-only PUT met another one, or a delete
    "redirected",  # the store named another place
]
"""Why a request was repeated."""
REASONS: tuple[Reason, ...] = get_args(Reason)


@dataclass(frozen=True)
class Counts:
    """What one store did in this process, or all of them did.

    Attributes:
        requests: HTTP requests sent, repetitions included.
        repeated: reason -> requests repeated for it; those of which there were any.
        bytes_in: object bytes received.
        bytes_out: object bytes of accepted PUTs.
    """

    requests: int = 0
    repeated: Mapping[Reason, int] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0

    @property
    def retries(self) -> int:
        """Requests repeated for any reason."""
        return sum(self.repeated.values())

    def __add__(self, more: "Counts") -> "Counts":
        repeated = dict(self.repeated)
        for reason, count in more.repeated.items():
            repeated[reason] = repeated.get(reason, 0) + count
        return Counts(
            self.requests + more.requests,
            repeated,
            self.bytes_in + more.bytes_in,
            self.bytes_out + more.bytes_out,
        )


class Tally:
    """Counts that threads add to; of the process that made it."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._lock = threading.Lock()
        _tallies.append((os.getpid(), self))

    def add(self, more: Counts) -> None:
        """Count."""
        with self._lock:
            self.counts += more


_tallies: list[tuple[int, Tally]] = []
"""With the process of each: a forked child inherits the list, not the work."""


def process_counts() -> Counts:
    """What all stores did in this process so far, those that are gone included."""
    own = os.getpid()
    return sum((tally.counts for pid, tally in list(_tallies) if pid == own), Counts())


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


T = TypeVar("T")

TRIES = 5
"""Times that a request, a body or a commit is tried at least before giving up."""
OUTAGE_S = 60.0
"""Seconds after a request's first failure at which it gives up (and not before `TRIES` tries)."""


def patiently(attempt: Callable[[], T], client: "S3Client", *, always: bool = False) -> T:
    """Repeat an attempt while the store is out of reach or busy.

    Args:
        attempt: raises OutageError where another one may succeed; may be carried out by the store
            although it failed here.
        client: waits between attempts.
        always: wait for a store that has never answered this process, too. Without it such a
            store, which is rather misnamed than away, is given up after `TRIES` tries.

    Raises:
        StorageError: `OUTAGE_S` after the first failure it still fails.
    """
    tries, failing_since = 0, 0.0
    while True:
        try:
            return attempt()
        except OutageError as error:
            problem = error
        patient = always or client.answered
        tries += 1
        failing_since = failing_since or time.monotonic()
        failing_s = time.monotonic() - failing_since
        if tries >= TRIES and not (patient and failing_s < OUTAGE_S):
            raise StorageError(
                f"{problem}; given up after {tries} tries, {failing_s:.0f} s after the first failed"
            ) from problem
        logger.warning("%s; try %d follows", problem, tries + 1)
        client.pause(tries, problem.reason)


_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_CONNECT_TIMEOUT_S = 10.0
_ANSWER_TIMEOUT_S = 60.0
"""Longest silence but in reads: a store may hash and replicate 5 GiB before it answers a PUT."""
_CONNECTIONS = 32
_SIGNED_S = 3600
_answered: set[str] = set()
"""Endpoints that answered this process, whatever the bucket."""
# Own generator: a retry must not move the random state that training depends on.
_jitter = random.SystemRandom()


@dataclass
class _Process:
    """What must not cross a fork: sockets, locks, counts."""

    pid: int
    core: Any = field(default_factory=botocore.session.get_session)
    session: Any = None
    clients: dict[bool, Any] = field(default_factory=dict)
    signed: dict[str, tuple[str | None, float]] = field(default_factory=dict)
    connections: Connections | None = None
    endpoint: str = ""
    tally: Tally = field(default_factory=Tally)
    lock: threading.Lock = field(default_factory=threading.Lock)
    sent: threading.local = field(default_factory=threading.local)


class S3Client:
    """Requests to one bucket; safe to share by threads, to pickle, and to inherit by fork.

    Args:
        url: the root, for messages.
        bucket: its bucket.
        read_timeout_s: longest silence of the server before a read is broken off.
    """

    def __init__(self, url: str, bucket: str, *, read_timeout_s: float) -> None:
        self._url = url
        self._bucket = bucket
        self._read_timeout_s = read_timeout_s
        self._state: _Process | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_state": None}

    @property
    def counts(self) -> Counts:
        """What this process did so far."""
        return self._process().tally.counts

    @property
    def answered(self) -> bool:
        """Whether the endpoint ever answered this process, be it with a refusal."""
        return self._process().endpoint in _answered

    def add(self, *, requests: int = 0, bytes_in: int = 0, bytes_out: int = 0) -> None:
        """Add to the counts."""
        self._process().tally.add(Counts(requests=requests, bytes_in=bytes_in, bytes_out=bytes_out))

    def repeating(self, reason: Reason, *, times: int = 1) -> None:
        """Count requests that are repeated."""
        self._process().tally.add(Counts(repeated={reason: times}))

    def call(
        self,
        operation: str,
        key: str,
        *,
        passing: Collection[int] = (),
        reading: bool = False,
        **arguments: Any,
    ) -> Any:
        """Send one request, once, and return its reply; `s3_patience` repeats it.

        Args:
            operation: name of the boto3 method.
            key: for messages.
            passing: HTTP statuses that are returned as `{"status": ...}` instead of raised.
            reading: whether `read_timeout_s` bounds the silence of the server.
            arguments: of the method, without the bucket.

        Raises:
            NotFoundError: status 404, unless the bucket itself is absent.
            OutageError: the store was out of reach or busy.
            StorageError: anything else, in one line with a remedy.
        """
        process = self._process()
        process.sent.requests = 0
        try:
            client = self._connected(process, reading)
            reply = getattr(client, operation)(Bucket=self._bucket, **arguments)
            _answered.add(process.endpoint)
            return reply
        except ClientError as error:
            _answered.add(process.endpoint)
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status in passing:
                return {"status": status}
            raise refused(
                error, url=self._url, bucket=self._bucket, key=key, status=status
            ) from error
        except (BotoCoreError, ValueError) as error:
            raise self._unreachable(error, process) from error
        finally:
            sent = process.sent.requests
            self.add(requests=sent)
            if sent > 1:
                self.repeating("redirected", times=sent - 1)

    def get_range(self, name: str, key: str, *, extent: str, etag: str) -> Any:
        """One ranged GET by a URL that is signed once an hour, over a connection of our own.

        boto3 spends 1.5 ms of Python on each request, with the interpreter's lock, of which nine
        tenths are the same for every range of an object.

        Args:
            name: the object's name in the bucket.
            key: for messages.
            extent: the `Range` header.
            etag: the `If-Match` header.

        Returns:
            A reply as `call("get_object")` gives it; None where the answer is not the range, or
            comes through a proxy: the caller then asks by `call`, which can say why.

        Raises:
            OutageError: the store was out of reach or busy.
        """
        process = self._process()
        process.sent.requests = 1
        try:
            client = self._connected(process, True)
            url = self._signed(process, client, name)
            if url is None:
                return None
            connections = self._connections(process, url)
            if not connections.direct:
                return None
            self.add(requests=1)
            target = url[url.index("/", url.index("://") + 3) :]
            reply = connections.get(target, {"Range": extent, "If-Match": etag})
        except (BotoCoreError, ValueError) as error:
            # Without its cause: no traceback may show the signed URL.
            raise self._unreachable(error, process) from None
        _answered.add(process.endpoint)
        status = reply.status
        if status != 206:
            reply.close()
            if status >= 500 or status == 429:
                raise OutageError(
                    f"{self._url}: {key!r}: GetObject was refused ({status}): the store is busy; "
                    "repeat the command later",
                    reason_of(status),
                )
            # Expired credentials, or a policy against signed URLs: the long way for a while.
            process.signed[name] = (None, time.monotonic() + _SIGNED_S / 2)
            return None
        return {
            "Body": reply,
            "ETag": reply.headers.get("ETag"),
            "ContentLength": reply.headers.get("Content-Length", 0),
            "ContentRange": reply.headers.get("Content-Range", ""),
            "ResponseMetadata": {"HTTPStatusCode": status},
        }

    def pause(self, attempt: int, reason: Reason) -> None:
        """Wait before the `attempt`-th repetition (1, 2, ...): doubling, with jitter; counts it."""
        self.repeating(reason)
        longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(attempt, 16))
        time.sleep(longest_s * _jitter.uniform(0.5, 1.0))

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

    def _signed(self, process: _Process, client: Any, name: str) -> str | None:
        """A URL to read the object with, never shown; None while signed URLs are refused."""
        url, until = process.signed.get(name, (None, 0.0))
        if time.monotonic() >= until:
            url = client.generate_presigned_url(
                "get_object", {"Bucket": self._bucket, "Key": name}, ExpiresIn=_SIGNED_S
            )
            process.signed[name] = (url, time.monotonic() + _SIGNED_S / 2)
        return url

    def _connections(self, process: _Process, url: str) -> Connections:
        with process.lock:
            if process.connections is None:
                process.connections = Connections(
                    url,
                    connect_timeout_s=_CONNECT_TIMEOUT_S,
                    read_timeout_s=self._read_timeout_s,
                    most=_CONNECTIONS,
                    ca_bundle=process.core.get_config_variable("ca_bundle"),
                )
            return process.connections

    def _connect(self, process: _Process, reading: bool) -> Any:
        """A client: safe to share by threads, as the session is not.

        Stores other than AWS rarely have a host name per bucket, so they are addressed by path
        unless the AWS profile says otherwise.
        """
        if process.session is None:
            process.session = boto3.session.Session(botocore_session=process.core)
        session = process.session
        config = Config(
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=_CONNECT_TIMEOUT_S,
            read_timeout=self._read_timeout_s if reading else _ANSWER_TIMEOUT_S,
            max_pool_connections=_CONNECTIONS,
            signature_version="s3v4",
            # We send Content-MD5 and check our own digests; older stores reject the newer trailers.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        client = session.client("s3", config=config)
        process.endpoint = client.meta.endpoint_url
        host = urlsplit(process.endpoint).hostname or ""
        chosen = process.core.get_scoped_config().get("s3", {})
        by_path = Config(s3={"addressing_style": "path"})
        if ".amazonaws.com" not in host and "addressing_style" not in chosen:
            client = session.client("s3", config=config.merge(by_path))

        def count_request(**_: Any) -> None:
            # Runs in the calling thread; more than once where a store sends to another place.
            process.sent.requests += 1

        client.meta.events.register("before-send.s3", count_request)
        return client

    def _unreachable(self, error: Exception, process: _Process) -> StorageError:
        return unreachable(error, url=self._url, connected=bool(process.clients))
