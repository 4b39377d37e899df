"""Reading from S3: resumed mid-body, held to one version of the object, patient with an outage."""

import hashlib
import logging
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from botocore.exceptions import HTTPClientError, IncompleteReadError, ReadTimeoutError
from urllib3.exceptions import HTTPError

from vlal_dist.errors import DataError, ReplacedError, StorageError
from vlal_dist.storage.checks import short_read
from vlal_dist.storage.s3_client import OutageError, Reason, S3Client, patiently

logger = logging.getLogger(__name__)

_READ_BYTES = 1 << 20
_BROKEN_BODY = (IncompleteReadError, HTTPClientError, HTTPError)


@dataclass
class _Read:
    """One read under way: what was asked, and what came so far (all in bytes).

    Attributes:
        name, key: the object in the bucket, and in messages.
        offset, length: the range; the length of an open end is known from the first reply on.
        ranged: whether a range was asked for, so that the object's version is remembered.
        etag: the version that every reply must be of; None before the first.
        sha256: digest of the whole object as `S3Store` recorded it; None of other tools' objects.
        parts, got: what came, and its length.
        broken: how the last body ended early.
    """

    name: str
    key: str
    offset: int
    length: int | None
    ranged: bool
    etag: str | None
    sha256: str | None = None
    parts: list[bytes] = field(default_factory=list)
    got: int = 0
    broken: Reason = "truncated"


class S3Reader:
    """Reads of the objects of one root; safe to share by threads, to pickle, to inherit by fork.

    Args:
        url: the root, for messages.
        client: sends the requests.
    """

    def __init__(self, url: str, client: S3Client) -> None:
        self._url = url
        self._client = client
        # Versions by name. Each use is one atomic operation; a forked child keeps what it inherits.
        self._versions: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_versions": {}}

    def read(self, name: str, key: str, *, offset: int, length: int | None) -> bytes:
        """See `Store.read`; the range is in bytes, checked by the caller.

        Args:
            name: the object's name in the bucket.
            key: its key, for messages.
        """
        ranged = offset > 0 or length is not None
        etag = self._versions.get(name) if ranged else None
        for again in (False, True):  # what arrives altered is asked for once more
            if again:
                self._client.repeating("altered")
            read = _Read(name, key, offset, length, ranged, etag)
            # A store that never answered is rather misnamed than away: that is to be said soon.
            patiently(partial(self._advanced, read), self._client, always=ranged)
            data = b"".join(read.parts)
            found = read.sha256 and hashlib.sha256(data).hexdigest()
            if found == read.sha256:
                return data
            logger.warning("%s: %r arrived altered (sha256 %s)", self._url, key, found)
        raise DataError(
            f"{self._url}: {key!r} has sha256 {found}, {read.sha256} was recorded when it was "
            "written; the object was damaged: restore it"
        )

    def size(self, name: str, key: str) -> int:
        """See `Store.size`; as patient as a read."""
        head = patiently(
            lambda: self._client.call("head_object", key, reading=True, Key=name), self._client
        )
        return int(head["ContentLength"])

    def _advanced(self, read: _Read) -> None:
        if not self._advance(read):
            raise OutageError(
                f"{self._url}: {read.key!r}: the body broke off at byte {read.offset + read.got}: "
                "check the network and the store, then repeat the command",
                read.broken,
            )

    def forget(self, name: str) -> None:
        """Expect another version from now on: this process itself wrote or removed the object."""
        self._versions.pop(name, None)

    def _advance(self, read: _Read) -> bool:
        """Ask for what is missing and keep what comes; returns whether that was all."""
        if read.length == 0:
            # HTTP has no empty range.
            return self._is_at_end(read)
        start = read.offset + read.got
        arguments = {"Key": read.name}
        if start or read.length is not None:
            last = "" if read.length is None else read.offset + read.length - 1
            arguments["Range"] = f"bytes={start}-{last}"
        if read.etag is not None:
            arguments["IfMatch"] = read.etag
        reply = None
        if read.ranged and read.etag is not None and "Range" in arguments:
            reply = self._client.get_range(
                read.name, read.key, extent=arguments["Range"], etag=read.etag
            )
        reply = reply or self._client.call(
            "get_object", read.key, passing=(412, 416), reading=True, **arguments
        )
        if reply.get("status") == 412:
            raise self._replaced(read.key)
        if reply.get("status") == 416:
            return self._is_at_end(read)
        if not read.ranged:
            read.sha256 = reply.get("Metadata", {}).get("sha256")
        try:
            self._check_version(read, reply)
            self._check_extent(read, reply, start, arguments.get("Range"))
            self._drain(read, reply["Body"])
        finally:
            reply["Body"].close()
        return read.got == read.length

    def _is_at_end(self, read: _Read) -> bool:
        """True if the range, which no reply can have, is empty and inside the object."""
        head = self._client.call("head_object", read.key, reading=True, Key=read.name)
        # Some stores look at the range before they look at the condition.
        if read.etag is not None and head.get("ETag") != read.etag:
            raise self._replaced(read.key)
        size_bytes = int(head["ContentLength"])
        end = size_bytes if read.length is None else read.offset + read.length
        if not read.offset <= end <= size_bytes:
            raise short_read(
                self._url, read.key, offset=read.offset, length=read.length, size_bytes=size_bytes
            )
        if read.offset < end:
            raise OutageError(
                f"{self._url}: {read.key!r}: the store refused a range (416) inside the object's "
                f"{size_bytes} bytes: check the store and the proxies before it"
            )
        return True

    def _check_version(self, read: _Read, reply: Any) -> None:
        """Hold the read, and later ranged ones, to the version of its first reply."""
        etag = reply.get("ETag")
        if etag is None:
            return
        if read.etag is None:
            read.etag = self._versions.setdefault(read.name, etag) if read.ranged else etag
        # Beside If-Match this covers two first reads at once, and stores that ignore it.
        if etag != read.etag:
            raise self._replaced(read.key)

    def _check_extent(self, read: _Read, reply: Any, start: int, asked: str | None) -> None:
        """Tell an object that is too short from a reply that is; settles the read's length.

        A reply that is only shorter than asked is read like a broken body.
        """
        stated_bytes = int(reply["ContentLength"])
        if asked is None:
            read.length = stated_bytes
            return
        if reply["ResponseMetadata"]["HTTPStatusCode"] != 206:
            raise StorageError(
                f"{self._url}: {read.key!r}: the store ignores Range requests; use one that serves "
                "them"
            )
        given = reply.get("ContentRange", "")
        extent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", given)
        if extent is None or int(extent[1]) != start:
            raise self._garbled(read.key, asked, given)
        size_bytes = int(extent[2])
        end = size_bytes if read.length is None else read.offset + read.length
        if end > size_bytes:
            raise short_read(
                self._url, read.key, offset=read.offset, length=read.length, size_bytes=size_bytes
            )
        if stated_bytes > end - start:
            raise self._garbled(read.key, asked, f"{given} of {stated_bytes} bytes")
        read.length = end - read.offset

    def _drain(self, read: _Read, body: Any) -> None:
        """Keep what the body gives until it ends or breaks."""
        before, read.broken = read.got, "truncated"
        try:
            while part := body.read(_READ_BYTES):
                read.parts.append(part)
                read.got += len(part)
        except _BROKEN_BODY as error:
            if isinstance(error, ReadTimeoutError):
                read.broken = "timeout"
            logger.debug("%s: body broke off: %s", self._url, type(error).__name__)
        finally:
            self._client.add(bytes_in=read.got - before)

    def _replaced(self, key: str) -> ReplacedError:
        return ReplacedError(
            f"{self._url}: {key!r} was replaced while being read; stored data is never "
            "edited in place: find the writer, and start again from a root that nobody changes"
        )

    def _garbled(self, key: str, asked: str, given: str) -> OutageError:
        return OutageError(
            f"{self._url}: {key!r}: asked for {asked}, the reply says {given or 'no range'}: check "
            "the store and the proxies before it"
        )
