"""Scrapers that do not behave, over real sockets; and one that does."""

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator


def scrape(port: int, *, timeout_s: float = 10.0) -> str:
    """What a scraper that asks properly gets."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        assert answer.status == 200
        return answer.read().decode()
    finally:
        connection.close()


@contextlib.contextmanager
def hanging(port: int, *, number: int, sent: bytes) -> Iterator[list[socket.socket]]:
    """So many clients that connect, send this much, read nothing, and stay."""
    opened: list[socket.socket] = []
    try:
        for _ in range(number):
            client = socket.socket()
            # A reply that nobody reads must not fit into the kernel's buffers.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            client.settimeout(10)
            client.connect(("127.0.0.1", port))
            opened.append(client)
            with contextlib.suppress(OSError):  # the server may have ended it already
                client.sendall(sent)
        yield opened
    finally:
        for client in opened:
            client.close()


@contextlib.contextmanager
def tight_loop(port: int, *, clients: int) -> Iterator[list[float]]:
    """So many clients that scrape again and again; when they were answered, monotonic seconds."""
    done, answered = threading.Event(), list[float]()

    def work() -> None:
        while not done.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                scrape(port)
                answered.append(time.monotonic())

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield answered
    finally:
        done.set()
        for thread in threads:
            thread.join()
