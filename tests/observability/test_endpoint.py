"""The endpoint of a rank under scrapers that do not behave."""

import http.client
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.fixtures.rank_processes import free_port
from tests.fixtures.scrapers import hanging, scrape, tight_loop
from vlal_dist.observability.metrics import (
    ANSWERS_PER_S,
    AT_ONCE,
    KEPT_S,
    MOST_CONNECTIONS,
    Endpoint,
)

HALF = b"GET /metrics HTTP/1.1\r\nHost: x\r\n"
WHOLE = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
HUNG = 120
BIG = b"x" * (8 << 20)


@contextmanager
def serving(render: Callable[[], bytes]) -> Iterator[int]:
    """The port of an endpoint; it must close at once, whatever hangs."""
    port = free_port()
    endpoint = Endpoint(render, host="127.0.0.1", port=port)
    try:
        yield port
    finally:
        started = time.monotonic()
        endpoint.close()
        assert time.monotonic() - started < 2


def files_open() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("sent", "text"),
    [(b"", b"a 1\n"), (HALF, b"a 1\n"), (WHOLE, BIG)],
    ids=["silent", "half a request", "never reads"],
)
def test_many_that_hang_cost_few_threads_and_files_and_the_next_one_is_answered(
    sent: bytes, text: bytes
) -> None:
    with serving(lambda: text) as port:
        threads, files = threading.active_count(), files_open()
        with hanging(port, number=HUNG, sent=sent) as clients:
            assert scrape(port)  # the queue is served in its order: all of them have had their turn
            assert threading.active_count() - threads <= MOST_CONNECTIONS + 1
            # Theirs are of this process, too.
            assert files_open() - files - len(clients) <= MOST_CONNECTIONS + 1
            started = time.monotonic()
            assert scrape(port)
            assert time.monotonic() - started < 2


def test_a_tight_loop_is_answered_some_times_a_second_and_so_is_another() -> None:
    rendered = itertools.count()
    with (
        serving(lambda: b"a %d\n" % next(rendered)) as port,
        tight_loop(port, clients=4) as answered,
    ):
        started, ours = time.monotonic(), 0
        while time.monotonic() - started < 4:
            asked = time.monotonic()
            scrape(port)
            assert time.monotonic() - asked < 1
            ours += 1
        seconds, texts = time.monotonic() - started, next(rendered)
        allowed = AT_ONCE + ANSWERS_PER_S * (seconds + 1)
        assert allowed / 3 < len(answered) + ours <= allowed
        assert texts <= seconds / KEPT_S + 2


def test_who_asks_now_and_then_gets_what_is_true_now() -> None:
    rendered = itertools.count()
    with serving(lambda: b"a %d\n" % next(rendered)) as port:
        found = []
        for _ in range(3):
            found.append(scrape(port))
            time.sleep(KEPT_S + 0.05)
    assert found == ["a 0\n", "a 1\n", "a 2\n"]


def test_a_text_that_cannot_be_made_is_told_and_the_next_one_is_sent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts = iter([b"a 1\n"])

    def render() -> bytes:
        if "broken" not in caplog.text:
            raise ValueError("broken")
        return next(texts)

    with serving(render) as port:
        with pytest.raises(ConnectionError):
            scrape(port)
        deadline = time.monotonic() + 5
        while "a scrape was not answered" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        assert scrape(port) == "a 1\n"


def test_it_listens_on_ipv6_too() -> None:
    port = free_port()
    endpoint = Endpoint(lambda: b"a 1\n", host="::1", port=port)
    try:
        connection = http.client.HTTPConnection("::1", port, timeout=5)
        connection.request("GET", "/")
        answer = connection.getresponse()
        assert answer.read() == b"a 1\n"
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        connection.close()
    finally:
        endpoint.close()
