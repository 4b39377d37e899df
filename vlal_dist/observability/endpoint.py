"""An HTTP endpoint that cannot cost the work beside it more than a little, whoever asks.

It answers ten times a second at most, all others wait in the kernel; what it says is made anew
once a second at most; of more connections than a few the oldest is ended. So neither a scraper in
a tight loop nor a hundred that hang take the interpreter's lock, threads or files away from the
training, and the one that asks properly is answered.
"""

import contextlib
import logging
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

logger = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ANSWERS_PER_S = 10
AT_ONCE = 100
"""Answers saved up while fewer were asked for."""
KEPT_S = 1.0
"""How long a text is sent again before it is made anew."""
MOST_CONNECTIONS = 16
SILENCE_S = 10.0
"""After which a client that sends or takes nothing is given up."""


class Endpoint(socketserver.ThreadingTCPServer):
    """Serves one text, whatever the path, from threads that end with the process.

    Args:
        render: makes the text.
        host, port: where to listen.

    Raises:
        OSError: it cannot listen there.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, render: Callable[[], bytes], *, host: str, port: int) -> None:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        self.address_family, address = found[0][0], found[0][4]
        super().__init__(address, _Handler)  # type: ignore[arg-type]
        self._render = render
        self._text, self._made_at = b"", -KEPT_S
        self._rendering = threading.Lock()
        self._answer_at = 0.0
        self._open: list[socket.socket] = []
        self._opening = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True, name="metrics").start()

    def close(self) -> None:
        """Stop listening; connections that hang do not delay it."""
        self.shutdown()
        self.server_close()

    def text(self) -> bytes:
        """What to send now."""
        with self._rendering:
            if time.monotonic() - self._made_at >= KEPT_S:
                self._text, self._made_at = self._render(), time.monotonic()
            return self._text

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection, in its turn."""
        now = time.monotonic()
        time.sleep(max(0.0, self._answer_at - now))
        self._answer_at = max(self._answer_at, now - AT_ONCE / ANSWERS_PER_S) + 1 / ANSWERS_PER_S
        with self._opening:
            self._open.append(request)
            if len(self._open) > MOST_CONNECTIONS:
                with contextlib.suppress(OSError):  # it may just have ended
                    self._open[0].shutdown(socket.SHUT_RDWR)
                del self._open[0]
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        with self._opening, contextlib.suppress(ValueError):
            self._open.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up or hangs is no error here; a text that cannot be made is."""
        if not isinstance(sys.exception(), OSError):
            logger.warning("a scrape was not answered", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint
    timeout = SILENCE_S

    def do_GET(self) -> None:
        """Send the text."""
        text = self.server.text()
        self.send_response_only(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        """Silence: a line per scrape would drown the log."""
