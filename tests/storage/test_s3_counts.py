"""Every repeated request is counted under its reason, and no other."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conftest import S3Server
from tests.fixtures.fault_proxy import Fault, FaultProxy
from tests.storage.conftest import DATA, MIB
from vlal_dist.observability.metric_definitions import S3_REASONS
from vlal_dist.storage import s3_client
from vlal_dist.storage.s3 import S3Store
from vlal_dist.storage.s3_client import _Process
from vlal_dist.storage.s3_counts import REASONS, S3Counts, S3Tally, process_counts

LATE_S = 3.0
"""Beyond the read timeout of the tests' store, 1 s."""


def part(store: S3Store) -> None:
    """A ranged read, which boto3 sends as long as the object's version is not known."""
    assert store.read("shard.tar", offset=7, length=MIB) == DATA[7 : 7 + MIB]


def direct_part(store: S3Store) -> None:
    """Two ranged reads, the second sent by urllib3 itself."""
    part(store)
    part(store)


def whole(store: S3Store) -> None:
    assert store.read("shard.tar") == DATA


def commit(store: S3Store) -> None:
    assert store.create("commit", b"x")


SECOND = "urllib3/"
"""In the agent of reads that urllib3 sends; botocore has an agent of its own."""
CASES: list[tuple[list[Fault], Callable[[S3Store], None], Mapping[Any, int]]] = [
    ([Fault("busy", times=2)], part, {"throttled": 2}),
    ([Fault("busy", agent=SECOND)], direct_part, {"throttled": 1}),
    ([Fault("busy", match="^PUT ")], commit, {"throttled": 1}),
    ([Fault("fail", times=3)], part, {"error": 3}),
    ([Fault("fail", agent=SECOND)], direct_part, {"error": 1}),
    ([Fault("lost")], part, {"unreachable": 1}),
    ([Fault("lost", agent=SECOND, times=2)], direct_part, {"unreachable": 2}),
    ([Fault("latency", seconds=LATE_S)], part, {"timeout": 1}),
    ([Fault("latency", agent=SECOND, seconds=LATE_S)], direct_part, {"timeout": 1}),
    ([Fault("stall", at=1000, seconds=LATE_S)], part, {"timeout": 1}),
    ([Fault("stall", agent=SECOND, at=1000, seconds=LATE_S)], direct_part, {"timeout": 1}),
    ([Fault("reset", at=1000)], part, {"truncated": 1}),
    ([Fault("reset", agent=SECOND, at=1000)], direct_part, {"truncated": 1}),
    ([Fault("truncate", at=1000), Fault("truncate", at=2000)], part, {"truncated": 2}),
    ([Fault("short", at=1000)], part, {"truncated": 1}),
    ([Fault("flip", at=1000)], whole, {"altered": 1}),
    ([Fault("clash", match="^PUT ", times=2)], commit, {"commit": 2}),
    ([Fault("moved", match="^(GET|HEAD) ")], part, {"redirected": 1}),
    (
        [Fault("busy"), Fault("fail"), Fault("lost"), Fault("reset", at=1000), Fault("flip", at=9)],
        whole,
        {"throttled": 1, "error": 1, "unreachable": 1, "truncated": 1, "altered": 1},
    ),
]


@pytest.mark.parametrize(
    ("faults", "use", "expected"),
    CASES,
    ids=lambda value: (
        "-".join(value) if isinstance(value, dict) else getattr(value, "__name__", "")
    ),
)
def test_each_reason_is_counted_exactly(
    root: S3Store,
    proxy: FaultProxy,
    faults: list[Fault],
    use: Callable[[S3Store], None],
    expected: Mapping[Any, int],
) -> None:
    before = process_counts()
    assert root.counts.repeated == {}
    proxy.faults = [Fault(**vars(fault)) for fault in faults]  # they are used up
    proxy.log.clear()
    use(root)
    assert root.counts.repeated == expected
    assert sum(root.counts.repeated.values()) == sum(expected.values())
    met = [seen for seen in proxy.log if seen.fault]
    assert len(met) == sum(fault.times for fault in faults)
    assert root.counts.requests - 1 == len(proxy.log)  # one wrote the object
    after = process_counts().repeated
    assert {
        name: after.get(name, 0) - before.repeated.get(name, 0) for name in expected
    } == expected


def test_the_cases_cover_all_reasons_and_the_metric_has_their_names() -> None:
    assert {name for *_, expected in CASES for name in expected} == set(REASONS)
    assert S3_REASONS == REASONS


def test_threads_lose_no_count() -> None:
    tally = S3Tally()

    def work() -> None:
        for _ in range(2000):
            tally.add(S3Counts(requests=1, repeated={"error": 1}))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tally.counts == S3Counts(requests=16_000, repeated={"error": 16_000})


def test_first_requests_of_several_threads_for_absent_objects(
    moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread may have made a state of its own; none of them may miss its counts."""
    threads, made = 8, threading.Barrier(8)

    def slowly(pid: int) -> s3_client._Process:
        made.wait(10)  # all threads are past the look at the state
        return _Process(pid)

    store = S3Store(moto_s3.url())
    with moto_s3.environment(), ThreadPoolExecutor(threads) as pool:
        monkeypatch.setattr(s3_client, "_Process", slowly)
        found = list(pool.map(lambda _: store.exists("absent"), range(threads)))
    assert found == [False] * threads


def test_an_absent_object_is_no_repeated_request(moto_s3: S3Server) -> None:
    before = process_counts()
    with moto_s3.environment():
        assert not S3Store(moto_s3.url()).exists("absent")
    after = process_counts()
    assert after.requests - before.requests == 2  # the object, then whether the bucket is there
    assert after.repeated == before.repeated
