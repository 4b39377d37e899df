"""Fixtures for all tests: S3 servers `moto_s3` and `ceph_s3`, and `small`, a merged dataset.

A test that uses a server, directly or through a fixture, runs with its AWS variables set and none
of the developer's own. Fixtures of a wider scope use `with server.environment():`; a subprocess
gets `server.env`.
"""

import gc
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

# Set before torch is imported: with few cores its threads would wait for each other at every tiny
# tensor. Tests of threads set their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.fixtures.ceph import ACCESS_KEY, SECRET_KEY, CephError, Cluster

_AWS_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_EC2_METADATA_DISABLED",
)


@dataclass(frozen=True)
class S3Server:
    """A running S3 server with a bucket of our own.

    Attributes:
        name: `moto` or `ceph`.
        endpoint: http://host:port.
        bucket: name of the bucket.
        env: AWS_* variables that lead to it; all others must be unset.
    """

    name: str
    endpoint: str
    bucket: str
    env: dict[str, str]

    def url(self, prefix: str = "") -> str:
        """An `s3://` root in the bucket; a fresh one by default."""
        return f"s3://{self.bucket}/{prefix or uuid.uuid4().hex[:12]}"

    def client(self) -> Any:
        """A plain boto3 client, to read or change the bucket without the store."""
        return self._client

    @cached_property
    def _client(self) -> Any:
        import boto3.session

        with self.environment():
            return boto3.session.Session().client("s3")

    @contextmanager
    def environment(self, **changes: str | None) -> Iterator[None]:
        """Set the AWS variables within a block; `changes` adds to them, None removes one."""
        with pytest.MonkeyPatch.context() as patch:
            self.apply(patch, **changes)
            yield

    def apply(self, patch: pytest.MonkeyPatch, **changes: str | None) -> None:
        """Set the AWS variables until `patch` is undone."""
        for name in _AWS_VARIABLES:
            patch.delenv(name, raising=False)
        for name, value in {**self.env, **changes}.items():
            if value is None:
                patch.delenv(name, raising=False)
            else:
                patch.setenv(name, value)


def _server(name: str, endpoint: str, access_key: str, secret_key: str) -> S3Server:
    env = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_DEFAULT_REGION": os.environ.get("AWS_DEFAULT_REGION", "us-east-1"),
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server = S3Server(name, endpoint, f"vlal-test-{uuid.uuid4().hex[:12]}", env)
    server.client().create_bucket(Bucket=server.bucket)
    return server


def _remove_bucket(server: S3Server) -> None:
    client = server.client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=server.bucket):
        for entry in page.get("Contents", []):
            client.delete_object(Bucket=server.bucket, Key=entry["Key"])
    client.delete_bucket(Bucket=server.bucket)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `config.yaml`, `dataset`, `scores` and `merged`; leave it as it is."""
    from tests.fixtures.scored_dataset import write_merged

    return write_merged(tmp_path_factory.mktemp("made") / "small")


@pytest.fixture(scope="session")
def moto_s3() -> Iterator[S3Server]:
    """moto on a loopback socket: right semantics, but it checks neither secrets nor checksums."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield _server("moto", f"http://{host}:{port}", "moto-access", "moto-secret")
    server.stop()


@pytest.fixture(scope="session")
def ceph_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Ceph RADOS Gateway: the one at VLAL_TEST_S3_ENDPOINT, else our own; skips without either."""
    endpoint = os.environ.get("VLAL_TEST_S3_ENDPOINT")
    if endpoint:
        keys = [os.environ.get(name, "") for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
        if not all(keys):
            pytest.fail("VLAL_TEST_S3_ENDPOINT also needs AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY")
        server = _server("ceph", endpoint, *keys)
        yield server
        _remove_bucket(server)
        return
    cluster = Cluster(tmp_path_factory.mktemp("ceph"))
    try:
        cluster.start()
    except CephError as error:
        pytest.skip(f"no Ceph gateway: {error}")
    yield _server("ceph", cluster.endpoint, ACCESS_KEY, SECRET_KEY)
    cluster.stop(kill=True)  # its objects are in memory only


def pytest_collection_finish() -> None:
    """Exclude imported objects (torch's are many) from garbage collection."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that uses `ceph_s3` with `ceph`."""
    for item in items:
        if isinstance(item, pytest.Function) and "ceph_s3" in item.fixturenames:
            item.add_marker("ceph")


@pytest.fixture(autouse=True)
def _aws_environment(request: pytest.FixtureRequest) -> Iterator[None]:
    """Set the AWS variables of the server that a test uses."""
    names = [name for name in ("moto_s3", "ceph_s3") if name in request.fixturenames]
    if len(names) != 1:
        yield
        return
    server: S3Server = request.getfixturevalue(names[0])
    with server.environment():
        yield
