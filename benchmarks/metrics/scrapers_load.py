"""For metrics_cost.py: who asks a thousand times a second, and the endpoints that are asked."""

import contextlib
import resource
import selectors
import socket
import time
from collections.abc import Iterator
from multiprocessing import get_context
from typing import Any

OFFERED_PER_S, PATIENCE_S = 1000, 0.3
REQUEST = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


class Theirs:
    """prometheus_client's server with our endpoint's face."""

    def __init__(self, render: Any, *, host: str, port: int) -> None:
        from prometheus_client import start_http_server

        registry = render.__closure__[0].cell_contents.registry
        self._server, _ = start_http_server(port, addr=host, registry=registry)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()


def decoy(told: Any, server: str) -> None:
    """An endpoint in a process without other work."""
    from tests.fixtures.rank_exporter import Exporter
    from vlal_dist.observability import metrics

    if server == "prometheus_client":
        metrics.Endpoint = Theirs  # type: ignore[assignment,misc]
    exporter = Exporter()
    exporter.begin()
    exporter.step()
    exporter.rarely()
    told.put(exporter.metrics.serve(host="127.0.0.1", port=29500))
    time.sleep(1e6)


def offer(port: Any, counts: Any) -> None:
    """Open a thousand connections a second to a port, ask, and give up soon; 0: nobody."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 8192), most))
    chosen, under_way = selectors.DefaultSelector(), dict[socket.socket, float]()
    begun, started, to = 0, time.monotonic(), 0

    def drop(client: socket.socket) -> None:
        chosen.unregister(client)
        client.close()
        del under_way[client]

    while True:
        now = time.monotonic()
        if port.value != to:
            to, begun, started = port.value, 0, now
        while to and begun < (now - started) * OFFERED_PER_S:
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", to))
            chosen.register(client, selectors.EVENT_WRITE)
            under_way[client] = now
            begun += 1
            counts[0] += 1
        for key, mask in chosen.select(0.001):
            client = key.fileobj
            try:
                if mask & selectors.EVENT_WRITE:
                    client.send(REQUEST)
                    chosen.modify(client, selectors.EVENT_READ)
                elif part := client.recv(1 << 16):
                    counts[1] += part.startswith(b"HTTP")
                else:
                    drop(client)
            except OSError:
                drop(client)
        for client in [one for one, since in under_way.items() if now - since > PATIENCE_S]:
            drop(client)


@contextlib.contextmanager
def helpers(server: str) -> Iterator[tuple[int, Any, Any]]:
    """Port of the decoy; where the scraper asks; (asked, answered) of it."""
    context = get_context("spawn")
    port, counts, told = context.Value("i", 0), context.Array("q", 2, lock=False), context.Queue()
    others = [
        context.Process(target=decoy, args=(told, server), daemon=True),
        context.Process(target=offer, args=(port, counts), daemon=True),
    ]
    for one in others:
        one.start()
    try:
        yield told.get(timeout=120), port, counts
    finally:
        for one in others:
            one.kill()
            one.join()
