"""A Ray that does not answer, and one that cannot be started: one line, in time, with a remedy."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Timer

import pytest

from vlal_dist import ray_tasks
from vlal_dist.errors import Stopped, StorageError
from vlal_dist.ray_tasks import try_connecting


@contextmanager
def silent() -> Iterator[str]:
    """A listening socket that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_closed_port_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with silent() as address:
        pass
    for name in (address, f"ray://{address}"):
        monkeypatch.setenv("RAY_ADDRESS", name)
        with pytest.raises(StorageError, match=f"RAY_ADDRESS={name} .*refused.*unset RAY_ADDRESS"):
            try_connecting(Event())


def test_what_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_tasks, "CONNECT_S", 1.0)
    with silent() as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(StorageError, match=r"no connection in 1 s; .*scoring\.use_ray false"):
            try_connecting(Event())


def test_a_stop_is_obeyed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, started = Event(), time.monotonic()
    Timer(0.3, stop.set).start()
    with silent() as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(Stopped):
            try_connecting(stop)
    assert time.monotonic() - started < 10
