"""Kept connections against real sockets: used again, given up, encrypted."""

import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from botocore.exceptions import ConnectionClosedError, EndpointConnectionError, HTTPClientError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from vlal_dist.storage.s3_connections import Connections

ANSWER = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 5\r\nETag: v1\r\n\r\n"


class Server:
    """Answers `answers` requests on each connection, then closes it; counts connections."""

    def __init__(self, *, answers: int, body: bytes, context: ssl.SSLContext | None) -> None:
        self.answers, self.body, self.context = answers, body, context
        self.connections, self.stopping = 0, False
        self.closed = threading.Semaphore(0)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            with connection:
                if self.stopping:
                    return
                self._answer(connection)
            self.closed.release()

    def _answer(self, connection: socket.socket) -> None:
        self.connections += 1
        if self.context is not None:
            try:
                connection = self.context.wrap_socket(connection, server_side=True)
            except OSError:
                return
        with connection:
            for _ in range(self.answers):
                request = b""
                while not request.endswith(b"\r\n\r\n"):
                    if not (piece := connection.recv(4096)):
                        return
                    request += piece
                connection.sendall(ANSWER + self.body)


@contextmanager
def serving(
    *, answers: int = 9, body: bytes = b"12345", context: ssl.SSLContext | None = None
) -> Iterator[Server]:
    server = Server(answers=answers, body=body, context=context)
    try:
        yield server
    finally:
        server.stopping = True
        with socket.create_connection(("127.0.0.1", server.port)):
            server.thread.join()
        server.listener.close()


def connections(port: int, *, scheme: str = "http", ca_bundle: str | None = None) -> Connections:
    return Connections(
        f"{scheme}://127.0.0.1:{port}/bucket/key?signature=secret",
        connect_timeout_s=5.0,
        read_timeout_s=5.0,
        most=4,
        ca_bundle=ca_bundle,
    )


def body_of(opened: Connections) -> bytes:
    reply = opened.get("/bucket/key", {"Range": "bytes=0-4"})
    try:
        assert (reply.status, reply.headers["ETag"]) == (206, "v1")
        return b"".join(iter(lambda: reply.read(3), b""))
    finally:
        reply.close()


def test_a_connection_is_used_again() -> None:
    with serving() as server:
        opened = connections(server.port)
        assert [body_of(opened) for _ in range(3)] == [b"12345"] * 3
        assert server.connections == 1
        del opened


def test_a_body_that_was_not_read_ends_its_connection() -> None:
    with serving() as server:
        opened = connections(server.port)
        opened.get("/bucket/key", {}).close()
        assert body_of(opened) == b"12345"
        assert server.connections == 2
        del opened


def test_a_connection_that_the_server_closed_meanwhile_is_not_used() -> None:
    with serving(answers=1) as server:
        opened = connections(server.port)
        for number in range(1, 4):
            assert body_of(opened) == b"12345"
            assert server.closed.acquire(timeout=5.0)
            assert server.connections == number


def test_a_short_body_ends_early_and_its_connection_too() -> None:
    with serving(answers=1, body=b"123") as server:
        opened = connections(server.port)
        assert [body_of(opened) for _ in range(2)] == [b"123"] * 2
        assert server.connections == 2


def test_errors_name_no_signature() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(EndpointConnectionError) as refused:
        body_of(connections(port))
    with serving(answers=0) as server, pytest.raises(ConnectionClosedError) as closed:
        body_of(connections(server.port))
    for error in (refused, closed):
        assert isinstance(error.value, HTTPClientError | EndpointConnectionError)
        assert "secret" not in str(error.getrepr(chain=True))


def test_a_proxy_of_the_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert connections(1).direct
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    assert not connections(1).direct
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert connections(1).direct


def test_certificates_are_checked(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serving(context=context) as server:
        opened = connections(server.port, scheme="https", ca_bundle=str(certificate))
        assert [body_of(opened) for _ in range(2)] == [b"12345"] * 2
        assert server.connections == 1
        del opened
        with pytest.raises(EndpointConnectionError):
            body_of(connections(server.port, scheme="https"))


def make_certificate(folder: Path) -> Path:
    """A certificate for 127.0.0.1 that signs itself, with its key, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path
