"""Connections for ranged reads by signed URLs: http.client's own, kept open and used again.

boto3's HTTP session parses the URL, looks for proxies and builds a pool's key for every request,
which takes more CPU than sending it and receiving 512 KiB. Failures are botocore's exceptions, as
from boto3, and name the endpoint only: a signed URL is shown nowhere.
"""

import http.client
import ssl
import weakref
from collections import deque
from urllib.parse import urlsplit

from botocore.exceptions import (
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    ReadTimeoutError,
)
from botocore.httpsession import get_cert_path
from botocore.utils import get_environ_proxies
from urllib3.util.wait import wait_for_read

_BROKEN = (OSError, http.client.HTTPException)


class Reply:
    """An answer whose body is still to be read; closing it gives its connection back.

    Attributes:
        status: HTTP status.
        headers: of the answer.
    """

    def __init__(self, connections: "Connections", used: http.client.HTTPConnection) -> None:
        self._connections, self._used = connections, used
        self._response = used.getresponse()
        self.status, self.headers = self._response.status, self._response.headers

    def read(self, size: int) -> bytes:
        """At most `size` further bytes of the body; none at its end.

        Raises:
            HTTPClientError: the connection broke or (ReadTimeoutError) fell silent.
        """
        try:
            return self._response.read(size)
        except TimeoutError as error:
            where = self._connections.endpoint
            raise ReadTimeoutError(endpoint_url=where, error=error) from None
        except _BROKEN as error:
            raise HTTPClientError(error=type(error).__name__) from None

    def close(self) -> None:
        """Keep the connection if the body was read to its end, else end it."""
        if self._response.isclosed() and not self._response.will_close:
            self._connections.keep(self._used)
        else:
            self._used.close()


class Connections:
    """Connections to one endpoint; safe to share by threads, not to inherit by fork.

    Args:
        endpoint: scheme, host and port; the rest of a URL is left out.
        connect_timeout_s, read_timeout_s: longest silence.
        most: connections kept.
        ca_bundle: certificates to trust, PEM; None: those that boto3 trusts.

    Attributes:
        endpoint: scheme, host and port.
        direct: whether the environment names no proxy for the endpoint.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        connect_timeout_s: float,
        read_timeout_s: float,
        most: int,
        ca_bundle: str | None,
    ) -> None:
        parts = urlsplit(endpoint)
        self.endpoint, self._netloc = f"{parts.scheme}://{parts.netloc}", parts.netloc
        self._connect_timeout_s, self._read_timeout_s = connect_timeout_s, read_timeout_s
        self._most = most
        self.direct = not get_environ_proxies(self.endpoint)
        self._context = None
        if parts.scheme == "https":
            trusted = ca_bundle or get_cert_path(True)
            self._context = ssl.create_default_context(cafile=trusted)
        self._idle: deque[http.client.HTTPConnection] = deque()
        weakref.finalize(self, _close_all, self._idle)

    def get(self, target: str, headers: dict[str, str]) -> Reply:
        """Send a GET and wait for its status and headers.

        Args:
            target: path and query.
            headers: besides Host.

        Raises:
            HTTPClientError, EndpointConnectionError: no answer came.
        """
        connection = self._connected()
        try:
            connection.request("GET", target, headers=headers)
            return Reply(self, connection)
        except TimeoutError as error:
            connection.close()
            raise ReadTimeoutError(endpoint_url=self.endpoint, error=error) from None
        except _BROKEN:
            connection.close()
            raise ConnectionClosedError(endpoint_url=self.endpoint) from None

    def keep(self, connection: http.client.HTTPConnection) -> None:
        """Take a connection back that may be used again."""
        if len(self._idle) < self._most:
            self._idle.append(connection)
        else:
            connection.close()

    def _connected(self) -> http.client.HTTPConnection:
        """A connection that the other end has not closed meanwhile; the last used one first."""
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread took it
                break
            # Nothing is expected: what can be read is its end.
            if not wait_for_read(connection.sock, timeout=0.0):
                return connection
            connection.close()
        connection = (
            http.client.HTTPConnection(self._netloc)
            if self._context is None
            else http.client.HTTPSConnection(self._netloc, context=self._context)
        )
        connection.timeout = self._connect_timeout_s
        try:
            connection.connect()
        except TimeoutError as error:
            raise ConnectTimeoutError(endpoint_url=self.endpoint, error=error) from None
        except OSError as error:
            raise EndpointConnectionError(endpoint_url=self.endpoint, error=error) from None
        connection.sock.settimeout(self._read_timeout_s)
        return connection


def _close_all(idle: deque[http.client.HTTPConnection]) -> None:
    while idle:
        idle.pop().close()
