"""Reads from S3 under faults: broken bodies, outages, short objects, replaced objects."""

import hashlib
import http.server
import logging
import os
import pickle
import random
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import S3Server
from tests.fixtures.fault_proxy import Fault, FaultProxy
from tests.storage.conftest import DATA, MIB, name_of
from vlal_dist.errors import (
    DataError,
    NotFoundError,
    ReplacedError,
    StorageError,
    TruncatedError,
)
from vlal_dist.storage import s3_client
from vlal_dist.storage.s3 import S3Store
from vlal_dist.storage.s3_client import TRIES
from vlal_dist.storage.s3_counts import S3Counts
from vlal_dist.storage.store import fetch


class TestBrokenBodies:
    @pytest.mark.parametrize("kind", ["reset", "truncate", "stall"])
    def test_a_broken_body_is_resumed(self, root: S3Store, proxy: FaultProxy, kind: Any) -> None:
        proxy.faults = [Fault(kind, at=3 * MIB + 500, seconds=3.0)]
        before = root.counts
        assert root.read("shard.tar", offset=1000, length=6 * MIB) == DATA[1000 : 1000 + 6 * MIB]
        first, second = proxy.log
        assert (first.fault, second.fault) == (kind, None)
        assert first.headers["range"] == f"bytes=1000-{1000 + 6 * MIB - 1}"
        assert "if-match" not in first.headers
        # After an orderly close every byte that arrived is kept, else whole reads of 1 MiB are.
        reached = 1000 + 3 * MIB + (500 if kind == "truncate" else 0)
        assert second.headers["range"] == f"bytes={reached}-{1000 + 6 * MIB - 1}"
        assert second.headers["if-match"].strip('"') == hashlib.md5(DATA).hexdigest()
        assert sum(root.counts.repeated.values()) - sum(before.repeated.values()) == 1
        assert root.counts.requests - before.requests == 2
        assert root.counts.bytes_in - before.bytes_in == 6 * MIB

    def test_a_whole_read_is_resumed(self, root: S3Store, proxy: FaultProxy) -> None:
        proxy.faults = [Fault("reset", at=2 * MIB), Fault("truncate", at=MIB)]
        assert root.read("shard.tar") == DATA
        ranges = [seen.headers.get("range") for seen in proxy.log]
        last = len(DATA) - 1
        assert ranges == [None, f"bytes={2 * MIB}-{last}", f"bytes={3 * MIB}-{last}"]

    def test_a_body_that_always_breaks_is_an_error(
        self, root: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(s3_client, "OUTAGE_S", 0.0)
        proxy.faults = [Fault("reset", times=99, at=1000)]
        given_up = rf"'shard.tar': the body broke off at byte 0.* given up after {TRIES} tries"
        with pytest.raises(StorageError, match=given_up):
            root.read("shard.tar", length=100_000)
        assert len(proxy.log) == TRIES

    def test_an_object_replaced_in_between_is_not_mixed(
        self, root: S3Store, proxy: FaultProxy, behind: Any
    ) -> None:
        other = os.urandom(len(DATA))
        proxy.faults = [
            Fault(
                "truncate",
                at=2 * MIB,
                then=lambda: behind.put_object(**name_of(root, "shard.tar"), Body=other),
            )
        ]
        with pytest.raises(ReplacedError, match=r"'shard\.tar' was replaced while being read"):
            root.read("shard.tar")

    def test_an_object_deleted_in_between(
        self, root: S3Store, proxy: FaultProxy, behind: Any
    ) -> None:
        gone = name_of(root, "shard.tar")
        proxy.faults = [Fault("reset", at=MIB, then=lambda: behind.delete_object(**gone))]
        with pytest.raises(NotFoundError, match=r"shard\.tar"):
            root.read("shard.tar")

    def test_a_flipped_bit_is_fetched_once_more(
        self, root: S3Store, proxy: FaultProxy, tmp_path: Path
    ) -> None:
        """S3 has no check of a read's bytes that all stores offer: we have digests of our own."""
        digest = hashlib.sha256(DATA).hexdigest()
        proxy.faults = [Fault("flip", at=5000, times=2)]
        with pytest.raises(DataError, match=f"expected {digest}"):
            fetch(root, "shard.tar", cache=tmp_path, sha256=digest)
        assert list(tmp_path.iterdir()) == []
        proxy.faults = [Fault("flip", at=5000)]
        assert fetch(root, "shard.tar", cache=tmp_path, sha256=digest).read_bytes() == DATA

    def test_a_whole_object_is_held_to_the_digest_it_was_written_with(
        self, root: S3Store, proxy: FaultProxy, behind: Any
    ) -> None:
        proxy.faults = [Fault("flip", at=5000)]
        assert root.read("shard.tar") == DATA
        proxy.faults = [Fault("short", at=1000)]  # the reply states the cut length
        assert root.read("shard.tar") == DATA
        proxy.faults = [Fault("flip", at=5000, times=2)]
        with pytest.raises(DataError, match=r"shard\.tar' has sha256 .* recorded when it was"):
            root.read("shard.tar")
        behind.put_object(**name_of(root, "foreign"), Body=b"of another tool")
        assert root.read("foreign") == b"of another tool"


class ProxyAt(FaultProxy):
    """A proxy on a port of our choice, so that it can go and come back; some replies are 503."""

    def __init__(self, upstream: str, port: int, *, busy: float = 0.0) -> None:
        self._port = port
        self._busy, self._chance = busy, random.Random(0)
        super().__init__(upstream)

    def server_bind(self) -> None:
        self.server_address = ("127.0.0.1", self._port)
        super().server_bind()

    def take_fault(self, line: str, headers: dict[str, str]) -> Fault | None:
        given = super().take_fault(line, headers)
        return given or (Fault("busy") if self._chance.random() < self._busy else None)

    def vanish(self) -> None:
        """Stop listening: new connections are refused."""
        self.shutdown()
        self.server_close()


def free_port() -> int:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return int(closed.getsockname()[1])


class TestOutages:
    @pytest.fixture
    def port(self, moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> int:
        """Where the store will be; no server listens there yet."""
        port = free_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        return port

    @pytest.fixture
    def shard(self, moto_s3: S3Server) -> S3Store:
        """A root with a shard, whose store has not been used in this process."""
        store = S3Store(moto_s3.url())
        with moto_s3.environment():
            S3Store(store.url).create("shard.tar", DATA)
        return store

    def test_a_server_that_comes_back(
        self, moto_s3: S3Server, port: int, shard: S3Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """boto3's five tries would end within about two seconds."""
        monkeypatch.setattr(s3_client, "_LONGEST_PAUSE_S", 0.5)
        with ThreadPoolExecutor(1) as pool:
            started = time.monotonic()
            reading = pool.submit(shard.read, "shard.tar", offset=5, length=MIB)
            time.sleep(3.0)
            assert not reading.done()
            with ProxyAt(moto_s3.endpoint, port) as proxy:
                assert reading.result() == DATA[5 : 5 + MIB]
        assert 3.0 <= time.monotonic() - started < 6.0
        assert len(proxy.log) == 1
        assert shard.counts == S3Counts(
            requests=shard.counts.requests,
            repeated={"unreachable": shard.counts.requests - 1},
            bytes_in=MIB,
        )
        assert shard.counts.requests > TRIES

    def test_a_server_that_dies_in_mid_body(
        self, moto_s3: S3Server, port: int, shard: S3Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also of a whole read: the store has answered, so it is there."""
        monkeypatch.setattr(s3_client, "_LONGEST_PAUSE_S", 0.25)
        with ThreadPoolExecutor(1) as pool:
            dying = ProxyAt(moto_s3.endpoint, port).__enter__()
            dying.faults = [Fault("reset", at=2 * MIB, then=dying.vanish)]
            reading = pool.submit(shard.read, "shard.tar")
            time.sleep(2.0)
            assert not reading.done()
            with ProxyAt(moto_s3.endpoint, port) as proxy:
                assert reading.result() == DATA
        rest = f"bytes={2 * MIB}-{len(DATA) - 1}"
        assert [seen.headers.get("range") for seen in proxy.log] == [rest]
        assert shard.counts.bytes_in == len(DATA)

    def test_a_server_that_stays_away(
        self, port: int, shard: S3Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(s3_client, "OUTAGE_S", 2.0)
        monkeypatch.setattr(s3_client, "_LONGEST_PAUSE_S", 0.5)
        started = time.monotonic()
        away = r"no answer from the store \(EndpointConnectionError\): check AWS_ENDPOINT_URL"
        with pytest.raises(StorageError, match=rf"{away}.* tries, 2 s after") as caught:
            shard.read("shard.tar", length=10)
        assert 2.0 <= time.monotonic() - started < 4.0
        assert type(pickle.loads(pickle.dumps(caught.value))) is StorageError

    def test_an_endpoint_that_never_answered_is_given_up_soon(
        self, port: int, shard: S3Store
    ) -> None:
        """Else a mistyped endpoint would be reported only after a minute."""
        started = time.monotonic()
        with pytest.raises(StorageError, match=rf"given up after {TRIES} tries"):
            shard.read("dataset.json")
        assert time.monotonic() - started < 8.0
        assert shard.counts.requests == TRIES

    def test_an_unknown_host_is_an_outage(
        self, moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(s3_client, "OUTAGE_S", 1.0)
        monkeypatch.setattr(s3_client, "_LONGEST_PAUSE_S", 0.2)
        with moto_s3.environment(AWS_ENDPOINT_URL="http://no-such-host.invalid"):
            store = S3Store(moto_s3.url())
            with pytest.raises(StorageError, match=r"no answer from the store.* [12] s after"):
                store.read("k", length=1)
            assert store.counts.requests > TRIES

    @pytest.mark.parametrize("busy", [0.1, 0.5])
    def test_bursts_of_busy_answers(
        self,
        moto_s3: S3Server,
        port: int,
        shard: S3Store,
        monkeypatch: pytest.MonkeyPatch,
        busy: float,
    ) -> None:
        monkeypatch.setattr(s3_client, "_FIRST_PAUSE_S", 0.005)
        with ProxyAt(moto_s3.endpoint, port, busy=busy) as proxy, ThreadPoolExecutor(8) as pool:
            parts = pool.map(
                lambda at: shard.read("shard.tar", offset=at, length=1000), range(0, 100_000, 1000)
            )
            assert b"".join(parts) == DATA[:100_000]
        assert shard.counts == S3Counts(
            requests=len(proxy.log),
            repeated={"throttled": len(proxy.log) - 100},
            bytes_in=100_000,
        )
        assert len(proxy.log) > 100 / (1 - busy) * 0.85

    def test_permanent_refusals_are_not_repeated(
        self, root: S3Store, proxy: FaultProxy, moto_s3: S3Server
    ) -> None:
        with pytest.raises(NotFoundError):
            root.read("absent", length=5)
        assert len(proxy.log) == 1
        nothing = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
        with moto_s3.environment(**nothing):
            store = S3Store(root.url)
            started = time.monotonic()
            with pytest.raises(StorageError, match="no AWS credentials"):
                store.read("shard.tar", length=5)
        assert time.monotonic() - started < 2.0
        assert store.counts.requests == 0

    def test_wrong_keys_are_refused_at_once_by_a_real_gateway(self, ceph_s3: S3Server) -> None:
        with ceph_s3.environment(AWS_SECRET_ACCESS_KEY="wrong"):
            store = S3Store(ceph_s3.url())
            with pytest.raises(StorageError, match=r"\(403 "):
                store.read("k", length=5)
        assert store.counts.requests == 1

    def test_busy_answers_are_repeated_counted_and_logged(
        self, root: S3Store, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
    ) -> None:
        proxy.faults = [Fault("busy", times=2), Fault("truncate", at=2)]
        before = root.counts
        with caplog.at_level(logging.WARNING):
            assert root.read("shard.tar", length=10) == DATA[:10]
        assert root.counts.requests - before.requests == 4
        assert sum(root.counts.repeated.values()) - sum(before.repeated.values()) == 3
        assert root.counts.bytes_in - before.bytes_in == 10
        assert "503 SlowDown): the store is busy; repeat the command later; try 3" in caplog.text
        assert "'shard.tar': the body broke off at byte 2" in caplog.text

    def test_latency_below_the_timeout_costs_no_retry(
        self, root: S3Store, proxy: FaultProxy
    ) -> None:
        proxy.faults = [Fault("latency", seconds=0.4)]
        before = root.counts
        assert root.read("shard.tar", length=10) == DATA[:10]
        assert sum(root.counts.repeated.values()) == sum(before.repeated.values())


class Scripted(http.server.ThreadingHTTPServer):
    """A store of one object, `BODY`; `reply` makes (Content-Range, body) of a requested range."""

    BODY = bytes(range(250)) * 4

    def __init__(self, reply: Callable[[int, int], tuple[str | None, bytes]]) -> None:
        self.reply = reply
        self.ranges: list[tuple[int, int]] = []
        super().__init__(("127.0.0.1", 0), _ScriptedHandler)

    def __enter__(self) -> "Scripted":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _ScriptedHandler(http.server.BaseHTTPRequestHandler):
    server: Scripted

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""

    def do_GET(self) -> None:
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        self.server.ranges.append((first, last))
        extent, body = self.server.reply(first, last)
        self.send_response(206)
        if extent is not None:
            self.send_header("Content-Range", extent)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class TestShortObjects:
    """A truncated object is distinguished from a truncated reply."""

    @pytest.fixture
    def scripted(
        self, moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[Callable[..., Scripted]]:
        servers: list[Scripted] = []

        def start(reply: Callable[[int, int], tuple[str | None, bytes]]) -> Scripted:
            servers.append(Scripted(reply).__enter__())
            endpoint = f"http://127.0.0.1:{servers[0].server_address[1]}"
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            return servers[0]

        monkeypatch.setattr(s3_client, "OUTAGE_S", 0.0)
        monkeypatch.setattr(s3_client, "_FIRST_PAUSE_S", 0.001)
        yield start
        servers[0].__exit__()

    def test_a_cut_with_a_wrong_content_length_is_resumed(
        self, scripted: Callable[..., Scripted]
    ) -> None:
        body = Scripted.BODY
        for said in (True, False):  # whether the proxy also shortened the range it states

            def cut(first: int, last: int, said: bool = said) -> tuple[str, bytes]:
                end = min(last + 1, first + 60)
                return f"bytes {first}-{end - 1 if said else last}/1000", body[first:end]

            server = scripted(cut)
            store = S3Store("s3://bucket")
            assert store.read("k", offset=10, length=200) == body[10:210]
            assert server.ranges[-4:] == [(10, 209), (70, 209), (130, 209), (190, 209)]
            assert store.counts == S3Counts(requests=4, repeated={"truncated": 3}, bytes_in=200)

    def test_replies_that_are_always_cut_are_a_storage_error(
        self, scripted: Callable[..., Scripted]
    ) -> None:
        scripted(lambda first, last: (f"bytes {first}-{last}/1000", b""))
        with pytest.raises(StorageError, match=f"broke off at byte 10.*after {TRIES} tries"):
            S3Store("s3://bucket").read("k", offset=10, length=200)

    def test_a_total_below_the_range_is_damage(self, scripted: Callable[..., Scripted]) -> None:
        server = scripted(lambda first, _: (f"bytes {first}-999/1000", Scripted.BODY[first:]))
        with pytest.raises(TruncatedError, match=r"wanted 11 bytes at offset 990.* at byte 1000"):
            S3Store("s3://bucket").read("k", offset=990, length=11)
        assert len(server.ranges) == 1

    @pytest.mark.parametrize(
        ("extent", "size_bytes"),
        [(None, 10), ("bytes 0-9/1000", 10), ("bytes 5-14/*", 10), ("bytes 5-14/1000", 11)],
    )
    def test_a_reply_for_another_range_is_not_used(
        self, scripted: Callable[..., Scripted], extent: str | None, size_bytes: int
    ) -> None:
        server = scripted(lambda *_: (extent, Scripted.BODY[:size_bytes]))
        with pytest.raises(StorageError, match="requested bytes=5-14, the reply has"):
            S3Store("s3://bucket").read("k", offset=5, length=10)
        assert len(server.ranges) == TRIES

    def test_a_refused_range_that_exists_is_no_damage(
        self, root: S3Store, proxy: FaultProxy, behind: Any
    ) -> None:
        """The object is whole again when its size is requested."""
        place = name_of(root, "restored")
        behind.put_object(**place, Body=b"12345")
        with pytest.raises(TruncatedError, match=r"offset 5, but it ends at byte 5; .*`verify`"):
            root.read("restored", offset=5, length=1)
        restore = Fault(
            "lost", match="^HEAD ", then=lambda: behind.put_object(**place, Body=b"1234567")
        )
        proxy.faults = [restore]
        assert root.read("restored", offset=5, length=1) == b"6"
        assert restore.times == 0


@pytest.fixture(params=["moto_s3", pytest.param("ceph_s3", marks=pytest.mark.ceph)])
def server(request: pytest.FixtureRequest) -> Iterator[S3Server]:
    found: S3Server = request.getfixturevalue(request.param)
    with found.environment():
        yield found


class TestReplacedObjects:
    """Stored data is never edited in place; ranged reads hold an object to that."""

    @pytest.fixture
    def ours(self, server: S3Server) -> S3Store:
        return S3Store(server.url())

    @pytest.fixture
    def theirs(self, ours: S3Store) -> S3Store:
        """Another client of the same root."""
        return S3Store(ours.url)

    def test_ranges_of_two_versions_are_never_mixed(self, ours: S3Store, theirs: S3Store) -> None:
        ours.create("shard", b"a" * 1000)
        assert ours.read("shard", length=10) == b"a" * 10
        assert ours.read("shard", offset=990) == b"a" * 10
        for other in (b"b" * 1000, b"c" * 5):
            theirs.replace("shard", other)
            for offset, length in ((0, 10), (500, 10), (990, None)):
                with pytest.raises(ReplacedError, match="'shard' was replaced while being read"):
                    ours.read("shard", offset=offset, length=length)
        assert S3Store(ours.url).read("shard", length=2) == b"cc"

    def test_an_object_read_whole_may_change(self, ours: S3Store, theirs: S3Store) -> None:
        ours.replace("status", b"1")
        assert ours.read("status") == b"1"
        theirs.replace("status", b"22")
        assert ours.read("status") == b"22"
        assert ours.read("status", offset=1) == b"2"
        theirs.replace("status", b"333")
        assert ours.read("status") == b"333"

    def test_a_change_by_this_store_is_expected(self, ours: S3Store) -> None:
        ours.replace("status", b"1")
        assert ours.read("status", length=1) == b"1"
        ours.replace("status", b"2")
        assert ours.read("status", length=1) == b"2"
        ours.delete("status")
        ours.create("status", b"3")
        assert ours.read("status", length=1) == b"3"

    def test_fetch_is_held_to_one_version(
        self, ours: S3Store, theirs: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = b"a" * 1000
        ours.create("index", data)
        assert ours.read("index", length=1) == b"a"
        theirs.replace("index", b"b" * 1000)
        with pytest.raises(ReplacedError):
            fetch(ours, "index", cache=tmp_path, sha256=hashlib.sha256(data).hexdigest())
        assert list(tmp_path.iterdir()) == []

    def test_threads_children_and_copies(self, ours: S3Store, theirs: S3Store) -> None:
        ours.create("shard", b"a" * 1000)
        with ThreadPoolExecutor(8) as pool:
            got = pool.map(lambda at: ours.read("shard", offset=at, length=10), range(0, 1000, 10))
            assert b"".join(got) == b"a" * 1000
        theirs.replace("shard", b"b" * 1000)
        copy: S3Store = pickle.loads(pickle.dumps(ours))
        assert copy.read("shard", length=1) == b"b"
        child = os.fork()
        if child == 0:
            # Nothing of pytest may run in the child.
            try:
                ours.read("shard", length=1)
            except ReplacedError:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0


def test_a_replacement_is_seen_in_a_store_that_ignores_if_match(
    root: S3Store, behind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert root.read("shard.tar", length=1) == DATA[:1]
    behind.put_object(**name_of(root, "shard.tar"), Body=b"other")
    real = s3_client.S3Client.call

    def without_condition(self: Any, operation: str, key: str, **arguments: Any) -> Any:
        arguments.pop("IfMatch", None)
        return real(self, operation, key, **arguments)

    monkeypatch.setattr(s3_client.S3Client, "call", without_condition)
    for offset, length in ((0, 1), (9, 1)):
        with pytest.raises(ReplacedError):
            root.read("shard.tar", offset=offset, length=length)


class TestDirectReads:
    """From its second range on, an object is read by requests that urllib3 sends."""

    def test_a_thread_whose_first_request_is_signed_meets_an_outage(
        self, moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("vlal_dist.storage.s3_client.OUTAGE_S", 0.0)
        url, found = moto_s3.url(), []
        with (
            FaultProxy(moto_s3.endpoint) as proxy,
            moto_s3.environment(AWS_ENDPOINT_URL=proxy.endpoint, AWS_SESSION_TOKEN="token7"),
        ):
            store = S3Store(url)
            store.create("shard", bytes(range(100)))
            assert store.read("shard", offset=0, length=9) == bytes(range(9))
            proxy.faults = [Fault("lost", times=99)]

            def read() -> None:
                try:
                    store.read("shard", offset=9, length=9)
                except StorageError as error:
                    found.append("".join(traceback.format_exception(error)))

            thread = threading.Thread(target=read)
            thread.start()
            thread.join()
        (shown,) = found
        assert "no answer from the store" in shown
        assert "token7" not in shown and "Signature" not in shown

    def test_refused_ones_fall_back_to_requests_of_botocore(self, moto_s3: S3Server) -> None:
        with (
            FaultProxy(moto_s3.endpoint) as proxy,
            moto_s3.environment(AWS_ENDPOINT_URL=proxy.endpoint),
        ):
            store = S3Store(moto_s3.url())
            store.create("shard", bytes(range(100)))
            proxy.faults = [Fault("refuse", agent="urllib3/", times=99)]
            data = [store.read("shard", offset=n, length=1)[0] for n in range(10)]
        assert data == list(range(10))
        assert [seen.fault for seen in proxy.log].count("refuse") == 1

    def test_no_url_holds_a_signature_or_a_token(self, moto_s3: S3Server) -> None:
        with (
            FaultProxy(moto_s3.endpoint) as proxy,
            moto_s3.environment(AWS_ENDPOINT_URL=proxy.endpoint, AWS_SESSION_TOKEN="token7"),
        ):
            store = S3Store(moto_s3.url())
            store.create("a b/ü.tar", bytes(range(100)))
            data = [store.read("a b/ü.tar", offset=n, length=1)[0] for n in range(4)]
        assert data == list(range(4))
        direct = [seen for seen in proxy.log if "urllib3/" in seen.headers["user-agent"]]
        assert len(direct) == 3
        for seen in direct:
            assert "?" not in seen.line and "token7" not in seen.line
            assert seen.headers["x-amz-security-token"] == "token7"
            assert "Signature=" in seen.headers["authorization"]
