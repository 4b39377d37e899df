"""One request to S3: the client of this process, its counts, and clear errors.

The only file that imports boto3. Credentials, region and endpoint come from the AWS variables and
profiles; no message repeats one of their values.
"""

import os
import random
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import boto3.session
import botocore.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
)

from vlal_dist.errors import StorageError
from vlal_dist.storage.s3_connections import Connections
from vlal_dist.storage.s3_counts import Counts, Reason, Tally
from vlal_dist.storage.s3_errors import OutageError, reason_of, refused, unreachable

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
