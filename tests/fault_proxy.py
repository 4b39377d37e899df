"""A loopback proxy that breaks HTTP replies on purpose, to see what S3 clients make of it.

It forwards requests unchanged (the signature covers `Host`) on one connection each, and logs them.
"""

import fcntl
import http.client
import random
import re
import socket
import socketserver
import struct
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Literal
from urllib.parse import urlsplit

PIECE_BYTES = 64 << 10
ANSWERS = {
    "busy": (503, "SlowDown"),
    "fail": (500, "InternalError"),
    "refuse": (403, "AccessDenied"),
    "clash": (409, "ConditionalRequestConflict"),
    "moved": (301, "PermanentRedirect"),
}
"""Faults that are an answer of the proxy's own: status and code."""


@dataclass
class Fault:
    """What to do to the next matching requests.

    Attributes:
        kind: `reset` (TCP RST), `truncate` (orderly close), `stall` (silence, then close), `flip`
            (one bit), all at body byte `at`; `short` (a reply that ends there, and states that
            as its length); `busy` (503 SlowDown, not forwarded); `fail` (500), `refuse` (403),
            `clash` (409: another commit is under way), `moved` (301: the bucket is in another
            region), likewise; `latency` (a wait before forwarding); `lost` (forwarded, then closed
            without an answer); `away` (this and all requests within `seconds` are closed without
            one).
        match: regular expression searched in `METHOD /path?query`.
        times: how many requests it hits.
        chance: share of the matching requests that it hits, drawn from a fixed seed.
        at: byte of the reply's body.
        seconds: length of a stall, latency or absence.
        then: called once the fault has been done, before the client can see it.
    """

    kind: Literal[
        "reset", "truncate", "stall", "flip", "short", "busy", "fail", "refuse", "clash", "moved",
        "latency", "lost", "away",
    ]  # fmt: skip
    match: str = "^GET "
    times: int = 1
    chance: float = 1.0
    at: int = 0
    seconds: float = 0.0
    then: Callable[[], None] | None = None


@dataclass(frozen=True)
class Seen:
    """One request as it arrived, and the fault it met."""

    line: str
    headers: dict[str, str]
    fault: str | None


class FaultProxy(socketserver.ThreadingTCPServer):
    """`with FaultProxy(endpoint) as proxy:` listens on `proxy.endpoint` until the block ends.

    Args:
        upstream: the real server, http://host:port.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: list[Fault] = []
        self.log: list[Seen] = []
        self._lock = threading.Lock()
        self._draw = random.Random(0)
        self._away_until = 0.0
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def take_fault(self, line: str, headers: dict[str, str]) -> Fault | None:
        """The fault for this request, used up by one; logs the request."""
        with self._lock:
            now = time.monotonic()
            hits = (f for f in self.faults if f.times > 0 and re.search(f.match, line))
            fault = next((f for f in hits if f.chance == 1 or self._draw.random() < f.chance), None)
            if now < self._away_until:
                fault = Fault("away")
            elif fault is not None:
                fault.times -= 1
                self._away_until = now + fault.seconds if fault.kind == "away" else 0.0
            self.log.append(Seen(line, headers, fault.kind if fault else None))
        return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no error here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def log_message(self, format: str, *args: object) -> None:
        """Silence: the proxy keeps its own log."""

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.take_fault(
            f"{self.command} {self.path}", {k.lower(): v for k, v in self.headers.items()}
        )
        if fault is not None and fault.kind == "away":
            self.close_connection = True
            return None
        if fault is not None and fault.kind in ANSWERS:
            return self._send_error(*ANSWERS[fault.kind])
        if fault is not None and fault.kind == "latency":
            time.sleep(fault.seconds)
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    upstream.putheader(name, value)
            upstream.endheaders(body or None)
            self._relay(upstream.getresponse(), fault)
        finally:
            upstream.close()

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

    def _send_error(self, status: int, code: str) -> None:
        text = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(text)))
        if status == 301:
            self.send_header("x-amz-bucket-region", "eu-central-1")
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else text)

    def _relay(self, reply: http.client.HTTPResponse, fault: Fault | None) -> None:
        if fault is not None and fault.kind == "lost":
            reply.read()
            self._break(fault)
            return
        # A chunked reply has no length: it is read whole and sent with one.
        whole = reply.read() if reply.getheader("Content-Length") is None else None
        self.send_response_only(reply.status)
        for name, value in reply.getheaders():
            if name.lower() == "content-length" and fault is not None and fault.kind == "short":
                value = str(min(int(value), fault.at))
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        if whole is not None and reply.status not in (204, 304):
            self.send_header("Content-Length", str(len(whole)))
        self.end_headers()
        sent = 0
        while piece := whole if whole is not None else reply.read(PIECE_BYTES):
            whole = b"" if whole is not None else None
            if fault is not None and sent <= fault.at < sent + len(piece):
                if fault.kind in ("reset", "truncate", "stall"):
                    self.wfile.write(piece[: fault.at - sent])
                    self._break(fault)
                    return
                if fault.kind == "short":
                    self.wfile.write(piece[: fault.at - sent])
                    return
                if fault.kind == "flip":
                    flipped = bytearray(piece)
                    flipped[fault.at - sent] ^= 1
                    piece = bytes(flipped)
            self.wfile.write(piece)
            sent += len(piece)

    def _break(self, fault: Fault) -> None:
        if fault.then is not None:
            fault.then()
        if fault.kind == "stall":
            time.sleep(fault.seconds)
        if fault.kind == "reset":
            self._wait_until_sent()
            # Lingering for 0 s makes the close an RST instead of an orderly FIN.
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            socket.close(self.connection.detach())
        self.close_connection = True

    def _wait_until_sent(self) -> None:
        """An RST throws away what is still queued, and the client must get all of it."""
        queued = 1
        while queued:
            answer = fcntl.ioctl(self.connection.fileno(), termios.TIOCOUTQ, bytes(4))
            (queued,) = struct.unpack("i", answer)
            time.sleep(0.001)
