"""Lease of a root on S3: an object that its holder renews, so that a root has one writer.

Created with `If-None-Match: *`, renewed every `RENEW_S` and taken over with `If-Match` on its
ETag, so of racing processes one wins. A newcomer watches the lease by its own clock: nothing
depends on the clocks of two machines. A store that ignores these conditions is refused before
anything else is written.
"""

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vlal_dist.errors import ConfigError, NotFoundError, StorageError, VlalError
from vlal_dist.storage.s3_client import OutageError, S3Client

logger = logging.getLogger(__name__)

RENEW_S = 5.0
"""Time between two renewals of a lease by its holder."""
HOLD_S = 20.0
"""Time after its last renewal at which a holder stops writing until it has renewed again."""
EXPIRED_S = 30.0
"""Time without a renewal after which a newcomer takes a lease over: longer than `HOLD_S`."""
POLL_S = 0.5
_ANSWER_S = 5.0
_PROOFS = 30
_NO_MATCH = '"00000000000000000000000000000000"'
"""An ETag that no lease has."""

Holder = dict[str, Any]

_held: list["_Lease"] = []


def check_leases() -> None:
    """Refuse a write unless this process still holds every lease that it took.

    Raises:
        StorageError: one was taken over, as this process was stopped for too long.
        OutageError: one could not be renewed in time, and the store is out of reach.
    """
    for one in _held:
        if one.pid == os.getpid():  # a forked child has the list, but renews nothing
            one.check()


@contextmanager
def lease(
    url: str,
    key: str,
    holder: Holder,
    *,
    gone: Callable[[Mapping[str, Any]], bool],
    refused: Callable[[str, Mapping[str, Any]], StorageError],
    grace_s: float,
) -> Iterator[None]:
    """Context in which this process holds a lease.

    Args:
        url: the root, `s3://bucket/prefix`.
        key: of the lease below the root.
        holder: what the object says of this process.
        gone: whether a holder was a process of this machine that has ended: it is replaced at once.
        refused: makes the error for a second writer.
        grace_s: how long a holder that renews may take to end.

    Raises:
        StorageError: another process holds it, or the store is out of reach.
        ConfigError: the store ignores conditional requests.
    """
    one = _Lease(url, key, holder, refused)
    one.acquire(gone=gone, grace_s=grace_s)
    _held.append(one)
    stop = threading.Event()
    thread = threading.Thread(target=one.keep, args=(stop,), name=f"lease of {url}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        _held.remove(one)
        one.release()


class _Lease:
    """One lease; `acquire` first. Safe to use from many threads."""

    def __init__(
        self,
        url: str,
        key: str,
        holder: Holder,
        refused: Callable[[str, Mapping[str, Any]], StorageError],
    ) -> None:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        prefix = f"{prefix}/" if prefix else ""
        self._client = S3Client(url, bucket, prefix, read_timeout_s=_ANSWER_S)
        self._url, self._key, self._refused = url, key, refused
        self._holder: Holder = {**holder, "id": uuid.uuid4().hex}
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._etag, self._renewed_at, self._count = "", 0.0, 0
        self._taker: Holder | None = None
        self._quote: str | None = None
        """Around an ETag in `If-Match`: the standard's quotes; Ceph 16 knows it without alone."""

    def acquire(self, *, gone: Callable[[Mapping[str, Any]], bool], grace_s: float) -> None:
        """Create the lease, or take it over; see `lease`."""
        began, seen, since, changed = _now(), "", 0.0, False
        while True:
            if self._put(retried=True, IfNoneMatch="*") == 200:
                self._probe()
                return
            etag, other = self._get()
            if etag == "":  # released meanwhile
                time.sleep(POLL_S)
                continue
            if other.get("id") == self._holder["id"]:  # our own, whose answer was lost
                self._etag = etag
                return
            if etag != seen:
                changed, seen, since = seen != "", etag, _now()
                if not changed:
                    logger.info(
                        "%s: %s holds the lease; if it is not renewed within %.0f s, it is taken",
                        self._url,
                        _who(other),
                        EXPIRED_S,
                    )
            if changed and _now() - began > grace_s:
                raise self._refused(self._url, other)
            if gone(other) or _now() - since > EXPIRED_S:
                if self._replace(seen, retried=True) == 200:
                    logger.warning("%s: took over the lease of %s", self._url, _who(other))
                    return
                continue
            time.sleep(POLL_S)

    def check(self) -> None:
        """Refuse to go on without the lease; see `check_leases`."""
        if self._taker is None and _now() - self._renewed_at > HOLD_S:
            self._renew()
        if self._taker is not None:
            raise StorageError(
                f"{self._url}: this process was stopped or cut off for more than {EXPIRED_S:.0f} "
                f"s, and {_who(self._taker)} writes here now; this one writes no more. Wait until "
                "that one ends, then repeat the command"
            )

    def keep(self, stop: threading.Event) -> None:
        """Renew until `stop` is set, or the lease is lost."""
        while not stop.wait(RENEW_S) and self._taker is None:
            try:
                self._renew()
            except VlalError as error:
                logger.debug("%s: the lease was not renewed: %s", self._url, error)

    def release(self) -> None:
        """Remove the lease; one that this process no longer holds stays."""
        try:
            self._renew()  # so that nothing takes it over before the next request
            if self._taker is None:
                self._client.call("delete_object", self._key)
        except VlalError as error:
            logger.warning(
                "%s: the lease stays, and the next writer waits for %.0f s: %s",
                self._url,
                EXPIRED_S,
                error,
            )

    def _renew(self) -> None:
        with self._lock:
            for _ in range(3):
                if self._taker is not None:
                    return
                status = self._replace(self._etag, retried=False)
                if status == 200:
                    return
                if status == 409:  # another request for the object is under way: the next one
                    continue
                etag, other = self._get()
                if other.get("id") != self._holder["id"]:
                    self._taker = other or {"program": "another program"}
                    logger.error("%s: the lease was taken over by %s", self._url, _who(other))
                    return
                self._etag = etag  # our own renewal, whose answer was lost

    def _probe(self) -> None:
        """Check on the new lease that the store honours both conditions.

        Raises:
            ConfigError: it does not; the lease is removed.
        """
        kept = self._etag
        try:
            if self._put(retried=True, IfNoneMatch="*") == 200:
                raise self._unsafe("IfNoneMatch")
            if self._replace(_NO_MATCH, retried=True) == 200:
                raise self._unsafe("IfMatch")
            self._prove_if_match(kept)
        except ConfigError:
            self._client.request("delete_object", self._key)
            raise

    def _prove_if_match(self, etag: str) -> None:
        """Write the lease by its ETag; a ConfigError if that is refused although it is the same."""
        for _ in range(_PROOFS):
            status = self._replace(etag, retried=True)
            if status == 200:
                return
            now, other = self._get()
            if other.get("id") != self._holder["id"]:
                raise self._refused(self._url, other)
            if status == 412 and now == etag:
                break
            etag = now  # it was written, and the answer was lost
        raise self._unsafe("IfMatch")

    def _replace(self, etag: str, *, retried: bool) -> int:
        """Write the lease if it has this ETag; the status."""
        bare, status = etag.strip('"'), 412
        for quote in ('"', "") if self._quote is None else (self._quote,):
            status = self._put(retried=retried, IfMatch=f"{quote}{bare}{quote}")
            if status == 200:
                self._quote = quote
            if status != 412:
                break
        return status

    def _put(self, *, retried: bool, **condition: str) -> int:
        """Write the lease if the condition holds; the status, without answers 404 and 412."""
        self._count += 1
        content = {**self._holder, "renewals": self._count}
        body = (json.dumps(content) + "\n").encode()

        def send() -> Any:
            sent = _now()
            reply = self._client.call(
                "put_object",
                self._key,
                passing=(409, 412, 501) if "IfNoneMatch" in condition else (404, 409, 412, 501),
                reading=True,
                Body=body,
                **condition,
            )
            return sent, reply

        sent, reply = self._client.retry(send) if retried else send()
        if "status" not in reply:
            # Counted from the sending: no other process saw the new ETag before that.
            self._etag, self._renewed_at = reply["ETag"], sent
            return 200
        if reply["status"] == 501:
            raise self._unsafe(*condition)
        return int(reply["status"])

    def _get(self) -> tuple[str, Holder]:
        """ETag and content of the lease; both empty if there is none."""

        def send() -> tuple[str, Holder]:
            try:
                reply = self._client.call("get_object", self._key, reading=True)
                with reply["Body"] as body:
                    data = body.read()
            except NotFoundError:
                return "", {}
            except OSError as error:  # the body broke off
                raise (
                    error
                    if isinstance(error, StorageError)
                    else OutageError(
                        f"{self._url}: the lease cannot be read ({type(error).__name__})"
                    )
                ) from None
            try:
                content = json.loads(data)
            except ValueError:
                content = {}
            return reply["ETag"], content if isinstance(content, dict) else {}

        return self._client.retry(send)

    def _unsafe(self, condition: str) -> ConfigError:
        header = {"IfNoneMatch": "If-None-Match: *", "IfMatch": "If-Match"}[condition]
        return ConfigError(
            f"{self._url}: the store at {self._client.endpoint} does not honour {header} in PUT "
            "requests, so that two writers could overwrite each other; nothing was written. Use a "
            "store, or a version of it, with conditional writes (AWS S3, Ceph 16 or later), "
            "without a proxy that drops these headers; or a local root"
        )


def _who(holder: Mapping[str, Any]) -> str:
    program = holder.get("program", "another program")
    return f"{program} (process {holder.get('pid', '?')} on {holder.get('host', '?')})"


def _now() -> float:
    """Seconds of a clock that goes on while this process is stopped or its machine sleeps."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()
