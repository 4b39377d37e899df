"""Reads of S3 objects: resumed after a broken body, and held to one version of the object."""

import hashlib
import logging
import re
from typing import Any

from botocore.exceptions import HTTPClientError, IncompleteReadError
from urllib3.exceptions import HTTPError

from vlal_dist.errors import DataError, ReplacedError, StorageError, TruncatedError
from vlal_dist.storage.checks import short_read
from vlal_dist.storage.s3_client import OutageError, S3Client
from vlal_dist.storage.s3_counts import Reason

logger = logging.getLogger(__name__)

_READ_BYTES = 1 << 20


def read_object(
    client: S3Client, versions: dict[str, str], key: str, *, offset: int, length: int | None
) -> bytes:
    """See `Store.read`; the range is in bytes, checked by the caller.

    Args:
        client: sends the requests.
        versions: ETag of each object of which a range was read; each use is one atomic operation.
        key: of the object.
    """
    for attempt in range(2):  # bytes that differ from their digest are fetched once more
        if attempt:
            client.add(repeated={"altered": 1})
        read = _Read(client, versions, key, offset, length)
        client.retry(read.advance, always=read.ranged)
        data = b"".join(read.parts)
        found = read.sha256 and hashlib.sha256(data).hexdigest()
        if found == read.sha256:
            return data
        logger.warning("%s: %r: received sha256 %s differs from the record", client.url, key, found)
    raise DataError(
        f"{client.url}: {key!r} has sha256 {found}, {read.sha256} was recorded when it was "
        "written; the object was damaged: restore it"
    )


class _Read:
    """One read in progress.

    Args:
        client, versions, key: as in `read_object`.
        offset, length: the range; the length of an open end is known from the first reply on.

    Attributes:
        ranged: whether a range was requested, so that the object's version is remembered.
        etag: the version that every reply must be of; None before the first.
        sha256: digest of the whole object as `S3Store` recorded it; None of other tools' objects.
        parts: the bytes received.
    """

    def __init__(
        self,
        client: S3Client,
        versions: dict[str, str],
        key: str,
        offset: int,
        length: int | None,
    ) -> None:
        self._client, self._versions, self._key = client, versions, key
        self._offset, self._length, self._received = offset, length, 0
        self.ranged = offset > 0 or length is not None
        self.etag = versions.get(key) if self.ranged else None
        self.sha256: str | None = None
        self.parts: list[bytes] = []

    def advance(self) -> None:
        """Request what is missing and keep what arrives; OutageError if that is not all."""
        if self._length == 0:  # HTTP has no empty range
            self._check_end()
            return
        start, extent = self._offset + self._received, None
        if start or self._length is not None:
            last = "" if self._length is None else self._offset + self._length - 1
            extent = f"bytes={start}-{last}"
        reply = self._request(extent)
        if reply.get("status") == 412:
            raise self._replaced()
        if reply.get("status") == 416:
            self._check_end()
            return
        if not self.ranged:
            self.sha256 = reply.get("Metadata", {}).get("sha256")
        try:
            self._check_version(reply)
            self._check_extent(reply, start, extent)
            broken = self._drain(reply["Body"])
        finally:
            reply["Body"].close()
        if self._received != self._length:
            raise OutageError(
                f"{self._client.url}: {self._key!r}: the body broke off at byte "
                f"{self._offset + self._received}: check the network and the store, then repeat "
                "the command",
                broken,
            )

    def _request(self, extent: str | None) -> Any:
        reply, arguments = None, {}
        if extent is not None:
            arguments["Range"] = extent
            if self.ranged and self.etag is not None:
                reply = self._client.get_signed(self._key, extent=extent, etag=self.etag)
        if self.etag is not None:
            arguments["IfMatch"] = self.etag
        return reply or self._client.call(
            "get_object", self._key, passing=(412, 416), reading=True, **arguments
        )

    def _check_end(self) -> None:
        """Check that the range, which no reply can have, is empty and inside the object."""
        head = self._client.call("head_object", self._key, reading=True)
        # Some stores look at the range before they look at the condition.
        if self.etag is not None and head.get("ETag") != self.etag:
            raise self._replaced()
        size_bytes = int(head["ContentLength"])
        end = size_bytes if self._length is None else self._offset + self._length
        if not self._offset <= end <= size_bytes:
            raise self._too_short(size_bytes)
        if self._offset < end:
            raise OutageError(
                f"{self._client.url}: {self._key!r}: the store refused a range (416) inside the "
                f"object's {size_bytes} bytes: check the store and the proxies before it"
            )

    def _check_version(self, reply: Any) -> None:
        """Hold this read, and later ranged ones, to the version of the first reply."""
        etag = reply.get("ETag")
        if etag is None:
            return
        if self.etag is None:
            self.etag = self._versions.setdefault(self._key, etag) if self.ranged else etag
        # Beside If-Match this covers two first reads at once, and stores that ignore it.
        if etag != self.etag:
            raise self._replaced()

    def _check_extent(self, reply: Any, start: int, requested: str | None) -> None:
        """Tell an object that is too short from a short reply; determines the read's length.

        A reply that is only shorter than requested is treated like a broken body.
        """
        stated_bytes = int(reply["ContentLength"])
        if requested is None:
            self._length = stated_bytes
            return
        if reply["ResponseMetadata"]["HTTPStatusCode"] != 206:
            raise StorageError(
                f"{self._client.url}: {self._key!r}: the store ignores Range requests; use one "
                "that serves them"
            )
        given = reply.get("ContentRange", "")
        extent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", given)
        end = size_bytes = int(extent[2]) if extent else 0
        if self._length is not None:
            end = self._offset + self._length
        if extent and int(extent[1]) == start and end > size_bytes:
            raise self._too_short(size_bytes)
        if extent is None or int(extent[1]) != start or stated_bytes > end - start:
            raise OutageError(
                f"{self._client.url}: {self._key!r}: requested {requested}, the reply has "
                f"{given or 'no range'} and {stated_bytes} bytes: check the store and the proxies "
                "before it"
            )
        self._length = end - self._offset

    def _drain(self, body: Any) -> Reason:
        """Keep what the body gives until it ends or breaks; returns how a broken one ended."""
        before = self._received
        broken: Reason = "truncated"
        try:
            while part := body.read(_READ_BYTES):
                self.parts.append(part)
                self._received += len(part)
        except (IncompleteReadError, HTTPClientError, HTTPError) as error:
            if type(error).__name__ == "ReadTimeoutError":  # botocore's or urllib3's
                broken = "timeout"
            logger.debug("%s: body broke off: %s", self._client.url, type(error).__name__)
        finally:
            self._client.add(bytes_in=self._received - before)
        return broken

    def _too_short(self, size_bytes: int) -> TruncatedError:
        return short_read(
            self._client.url,
            self._key,
            offset=self._offset,
            length=self._length,
            size_bytes=size_bytes,
        )

    def _replaced(self) -> ReplacedError:
        return ReplacedError(
            f"{self._client.url}: {self._key!r} was replaced while being read; stored data is "
            "never edited in place: find the writer, and start again from a root that stays as "
            "it is"
        )
