"""Store on S3: retried requests, conditional PUTs that never overwrite.

Every request outlasts an outage of about a minute (`S3Client.retry`). Writes are single PUTs,
never multipart.
"""

import base64
import hashlib
import logging
import re
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vlal_dist.errors import ConfigError, DataError, NotFoundError, StorageError
from vlal_dist.storage.checks import (
    TEMPORARY_PREFIX,
    Digests,
    check_key,
    check_prefix,
    check_range,
    conflict,
    digests_of,
    translated_errors,
)
from vlal_dist.storage.s3_client import TRIES, S3Client
from vlal_dist.storage.s3_counts import S3Counts
from vlal_dist.storage.s3_lease import check_leases
from vlal_dist.storage.s3_read import read_object

logger = logging.getLogger(__name__)

MAX_OBJECT_BYTES = 5 << 30
"""What one PUT may carry."""
LIST_PAGE = 1000
"""Keys in one reply of a listing."""
_COMPARE_BYTES = 64 << 20
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")
"""What botocore sends; stores other than AWS allow more than AWS."""


class S3Store:
    """Objects under `s3://bucket/prefix`; implements `vlal_dist.storage.store.Store`.

    Args:
        url: the root.
        read_timeout_s: longest silence of the server before a read is broken off and repeated.

    Raises:
        ConfigError: the URL names no bucket or an unclean prefix.
    """

    def __init__(self, url: str, *, read_timeout_s: float = 20.0) -> None:
        scheme, _, rest = url.partition("://")
        bucket, _, prefix = rest.partition("/")
        prefix = prefix.rstrip("/")
        if ":" in bucket or "@" in bucket:  # not shown: it may hold a secret
            raise ConfigError(
                "root s3://***: an S3 root is written s3://bucket/prefix and holds no credentials; "
                "give those by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            )
        if scheme.lower() != "s3" or not bucket:
            raise ConfigError(f"root {url!r}: an S3 root is written s3://bucket/prefix")
        if not _BUCKET.fullmatch(bucket):
            raise ConfigError(
                f"root {url!r}: {bucket!r} cannot be the name of a bucket: letters, digits, '.', "
                "'-' and '_' alone; a root is written s3://bucket/prefix"
            )
        try:
            prefix = f"{check_key(prefix)}/" if prefix else ""
        except DataError as error:
            raise ConfigError(f"root {url!r}: {error}") from error
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client = S3Client(self.url, bucket, prefix, read_timeout_s=read_timeout_s)
        self._versions: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_versions": {}}  # a forked child keeps what it inherits

    @property
    def counts(self) -> S3Counts:
        """Requests, retries and bytes of this store in this process."""
        return self._client.counts

    def read(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """See `Store.read`."""
        check_key(key)
        check_range(key, offset, length)
        return read_object(self._client, self._versions, key, offset=offset, length=length)

    def size(self, key: str) -> int:
        """See `Store.size`."""
        head = self._client.request("head_object", check_key(key), reading=True)
        return int(head["ContentLength"])

    def exists(self, key: str) -> bool:
        """See `Store.exists`."""
        try:
            self.size(key)
        except NotFoundError:
            return False
        return True

    def create(self, key: str, data: bytes | Path) -> bool:
        """See `Store.create`: a conditional PUT (`If-None-Match: *`).

        Raises:
            StorageError: also above 5 GiB, the most that one PUT carries.
        """
        digests = self._digests(check_key(key), data)
        for attempt in range(TRIES):
            if attempt:
                logger.warning(
                    "%s: %r: another writer is committing; try %d of %d",
                    self.url,
                    key,
                    attempt + 1,
                    TRIES,
                )
                self._client.pause(attempt, "commit")
            status = self._put(key, data, digests, passing=(409, 412), IfNoneMatch="*")
            if status == 200:
                return True
            # 409: a delete or another commit was under way. 412: something is there.
            existing = self._existing_sha256(key) if status == 412 else None
            if existing == digests.sha256:
                return False
            if existing is not None:
                raise conflict(self.url, key, existing=existing, given=digests.sha256)
        raise StorageError(
            f"{self.url}: {key!r}: the store refused the create-only PUT {TRIES} times although no "
            "object stayed; look for another writer of this root, then repeat the command"
        )

    def replace(self, key: str, data: bytes) -> None:
        """See `Store.replace`."""
        self._put(key, data, self._digests(check_key(key), data))

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        check_key(key)

        def delete() -> Any:
            check_leases()
            return self._client.call("delete_object", key)

        self._client.retry(delete)
        self._versions.pop(key, None)

    def list_keys(self, prefix: str = "") -> list[str]:
        """See `Store.list_keys`; names that end in `/` (folder marks of consoles) are left out."""
        keys: list[str] = []
        page: dict[str, Any] = {"MaxKeys": LIST_PAGE}
        while True:
            reply = self._client.request("list_objects_v2", check_prefix(prefix), **page)
            root = len(self._client.prefix)
            names = [entry["Key"][root:] for entry in reply.get("Contents", [])]
            keys += [name for name in names if not (name.endswith("/") or _is_hidden(name))]
            if not reply.get("IsTruncated"):
                return sorted(keys)
            page["ContinuationToken"] = reply["NextContinuationToken"]

    def sweep(self, folder: str) -> None:
        """See `Store.sweep`: a single PUT leaves nothing unfinished, and there are no folders."""
        check_key(folder)

    def local_path(self, key: str) -> Path | None:
        """See `Store.local_path`: None."""
        check_key(key)
        return None

    def _digests(self, key: str, data: bytes | Path) -> Digests:
        with translated_errors(data if isinstance(data, Path) else Path(key)):
            size_bytes = len(data) if isinstance(data, bytes) else data.stat().st_size
            if size_bytes > MAX_OBJECT_BYTES:
                raise StorageError(
                    f"{self.url}: {key!r} has {size_bytes} bytes; an S3 object written in one "
                    f"request has at most {MAX_OBJECT_BYTES}: pack smaller shards "
                    "(--pack.shard_bytes)"
                )
            return digests_of(data)

    def _put(
        self,
        key: str,
        data: bytes | Path,
        digests: Digests,
        *,
        passing: Collection[int] = (),
        **conditions: Any,
    ) -> int:
        """A PUT, its bytes checked by the server through Content-MD5; returns the status."""

        def put() -> Any:
            check_leases()
            with ExitStack() as stack:
                body: Any = data
                if isinstance(data, Path):
                    with translated_errors(data):
                        body = stack.enter_context(data.open("rb"))
                return self._client.call(
                    "put_object",
                    key,
                    passing=passing,
                    Body=body,
                    ContentMD5=base64.b64encode(digests.md5).decode(),
                    Metadata={"sha256": digests.sha256},
                    **conditions,
                )

        reply = self._client.retry(put)
        if "status" in reply:
            return int(reply["status"])
        self._client.add(bytes_out=digests.size_bytes)
        self._versions.pop(key, None)  # this process itself changed the object
        return 200

    def _existing_sha256(self, key: str) -> str | None:
        """Digest of the stored object, computed if another tool wrote it; None if it is gone."""
        head = self._client.request("head_object", key, passing=(404,))
        if head.get("status") == 404:
            return None
        if recorded := head["Metadata"].get("sha256"):
            return str(recorded)
        digest = hashlib.sha256()
        size_bytes = int(head["ContentLength"])
        for offset in range(0, size_bytes, _COMPARE_BYTES):
            length = min(_COMPARE_BYTES, size_bytes - offset)
            digest.update(self.read(key, offset=offset, length=length))
        return digest.hexdigest()


def _is_hidden(key: str) -> bool:
    """Whether a key is reserved, such as a lease's."""
    return any(part.startswith(TEMPORARY_PREFIX) for part in key.split("/"))
