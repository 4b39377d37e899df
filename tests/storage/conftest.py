"""One object on moto, behind a proxy that injects faults."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import S3Server
from tests.fixtures.fault_proxy import FaultProxy
from vlal_dist.storage import s3_client
from vlal_dist.storage.s3 import S3Store

MIB = 1 << 20
DATA = os.urandom(6 * MIB + 12_345)


@pytest.fixture(autouse=True)
def _no_endpoint_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port of an earlier test's server may be met again."""
    monkeypatch.setattr(s3_client, "_answered", set())


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tries, in a third of the time."""
    monkeypatch.setattr(s3_client, "_FIRST_PAUSE_S", 0.03)


@pytest.fixture
def proxy(moto_s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(moto_s3.endpoint) as proxy:
        yield proxy


@pytest.fixture
def root(moto_s3: S3Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """A store that reaches moto through the proxy, with one object in it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    store = S3Store(moto_s3.url(), read_timeout_s=1.0)
    store.create("shard.tar", DATA)
    proxy.log.clear()
    return store


@pytest.fixture
def behind(moto_s3: S3Server) -> Any:
    """A client that goes around store and proxy."""
    return moto_s3.client()


def name_of(store: S3Store, key: str) -> dict[str, str]:
    """Where an object is, in the words of boto3."""
    bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": f"{prefix}/{key}"}
