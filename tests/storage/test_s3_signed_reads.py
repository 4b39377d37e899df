"""Reads by signed URL over kept connections, against real sockets."""

import datetime
import ipaddress
import logging
import socket
import ssl
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from vlal_dist.storage.s3_client import OutageError, S3Client

ANSWER = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 5\r\nETag: v1\r\n\r\n"


class Server:
    """Answers `answers` requests on each connection, then closes it; counts connections."""

    def __init__(self, *, answers: int, body: bytes, context: ssl.SSLContext | None) -> None:
        self.answers, self.body, self.context = answers, body, context
        self.connections, self.stopping = 0, False
        self.open: socket.socket | None = None
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
        self.open = connection
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
        if server.open is not None:
            with suppress(OSError):  # a kept connection ends with the server
                server.open.shutdown(socket.SHUT_RDWR)
        with socket.create_connection(("127.0.0.1", server.port)):
            server.thread.join()
        server.listener.close()


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., S3Client]:
    """Makes a client of the server on a port."""

    def client(port: int, *, scheme: str = "http", ca_bundle: Path | None = None) -> S3Client:
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"):
            monkeypatch.setenv(f"AWS_{name}", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"{scheme}://127.0.0.1:{port}")
        if ca_bundle is not None:
            monkeypatch.setenv("AWS_CA_BUNDLE", str(ca_bundle))
        return S3Client("s3://bucket", "bucket", "", read_timeout_s=5.0)

    return client


def read(client: S3Client) -> bytes:
    reply = client.get_signed("key", extent="bytes=0-4", etag="v1")
    try:
        assert reply["ETag"] == "v1"
        return b"".join(iter(lambda: reply["Body"].read(3), b""))
    finally:
        reply["Body"].close()


def test_a_connection_is_reused(at: Callable[..., S3Client]) -> None:
    with serving() as server:
        client = at(server.port)
        assert [read(client) for _ in range(3)] == [b"12345"] * 3
        assert server.connections == 1


def test_a_body_that_was_not_read_ends_its_connection(at: Callable[..., S3Client]) -> None:
    with serving() as server:
        client = at(server.port)
        client.get_signed("key", extent="bytes=0-4", etag="v1")["Body"].close()
        assert read(client) == b"12345"
        assert server.connections == 2


def test_a_connection_that_the_server_closed_is_not_reused(at: Callable[..., S3Client]) -> None:
    with serving(answers=1) as server:
        client = at(server.port)
        for number in range(1, 4):
            assert read(client) == b"12345"
            assert server.closed.acquire(timeout=5.0)
            assert server.connections == number


def test_a_short_body_gives_what_arrived_and_ends_its_connection(
    at: Callable[..., S3Client],
) -> None:
    with serving(answers=1, body=b"123") as server:
        client = at(server.port)
        assert [read(client) for _ in range(2)] == [b"123"] * 2
        assert server.connections == 2


def test_errors_show_no_signature(at: Callable[..., S3Client]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(OutageError, match="no answer from the store") as refused:
        read(at(port))
    with serving(answers=0) as server, pytest.raises(OutageError, match="no answer") as closed:
        read(at(server.port))
    for error in (refused, closed):
        assert error.value.reason == "unreachable"
        text = "".join(traceback.format_exception(error.value))
        assert "Signature" not in text and "secret" not in text


def test_no_log_shows_a_signature(
    at: Callable[..., S3Client], caplog: pytest.LogCaptureFixture
) -> None:
    with serving() as server, caplog.at_level(logging.DEBUG):
        client = at(server.port)
        for name in ("botocore", "boto3"):
            logging.getLogger(name).setLevel(logging.INFO)
        assert read(client) == b"12345"
    assert "Signature" not in caplog.text


def test_a_proxy_of_the_environment_rules_signed_reads_out(
    at: Callable[..., S3Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serving() as server:
        monkeypatch.setenv("no_proxy", "")
        assert at(server.port).get_signed("key", extent="bytes=0-4", etag="v1") is None
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert read(at(server.port)) == b"12345"


def test_certificates_are_checked(at: Callable[..., S3Client], tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serving(context=context) as server:
        with pytest.raises(OutageError, match="SSLError"):
            read(at(server.port, scheme="https"))
        client = at(server.port, scheme="https", ca_bundle=certificate)
        assert [read(client) for _ in range(2)] == [b"12345"] * 2
        assert server.connections == 2


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
