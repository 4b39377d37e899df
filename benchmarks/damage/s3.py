"""S3 for damage.py: a server of our own, a bucket on it, and faults.

A fault is done by fault_proxy.py between a loader and the server, or to the bucket itself.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3.session
from botocore.config import Config

from tests.fixtures.ceph import ACCESS_KEY, SECRET_KEY, Cluster, missing_reason
from tests.fixtures.damaged_tars import SHARD, SPLIT, name_of
from tests.fixtures.fault_proxy import Fault

BURST_EPOCHS = 10


@dataclass(frozen=True)
class Bucket:
    """The dataset on an S3 server.

    Attributes:
        server: its name.
        endpoint: where it answers.
        url: root of the dataset.
        client: goes around all faults.
    """

    server: str
    endpoint: str
    url: str
    client: Any


@dataclass(frozen=True)
class S3Fault:
    """A fault between the loaders and the store.

    Attributes:
        name, what: for the table.
        faults: what the proxy does, given the byte of the reply's body that lies in a photo.
        epochs: how many are read under it.
        disturb: done to the bucket, before the last epoch.
        at_start: done before anything is opened instead.
    """

    name: str
    what: str
    faults: Callable[[int], list[Fault]] = field(default=lambda at: [])
    epochs: int = 1
    disturb: Callable[[Bucket], object] | None = None
    at_start: bool = False

    def shown(self, epochs: list[Any]) -> list[Any]:
        """Those of which the table speaks: all, or the one after the disturbance."""
        return epochs[-1:] if self.disturb else epochs


def shard_key(number: int) -> str:
    """Key of a shard of the training split."""
    return f"{SPLIT}/shards/{SPLIT}-{number:06}.tar"


def put(bucket: Bucket, data: bytes) -> None:
    """Write the shard anew, around everything."""
    bucket.client.put_object(**name_of(bucket.url, shard_key(SHARD)), Body=data)


def put_other(bucket: Bucket) -> None:
    """Another shard's bytes in its place."""
    other = bucket.client.get_object(**name_of(bucket.url, shard_key(SHARD + 1)))
    put(bucket, other["Body"].read())


def remove(bucket: Bucket) -> None:
    """The shard goes."""
    bucket.client.delete_object(**name_of(bucket.url, shard_key(SHARD)))


def once(kind: Any, **more: Any) -> Callable[[int], list[Fault]]:
    """In the first read of the shard."""
    return lambda at: [Fault(kind, f"^GET .*/{shard_key(SHARD)}", at=at, **more)]


def busy(share: float) -> Callable[[int], list[Fault]]:
    """For a share of all reads of shards."""
    return lambda at: [Fault("busy", f"^GET .*/{SPLIT}/shards/", times=10**6, chance=share)]


S3_FAULTS = (
    S3Fault("503, 10 %", "of the reads of 10 epochs", busy(0.1), epochs=BURST_EPOCHS),
    S3Fault("503, 50 %", "of the reads of 10 epochs", busy(0.5), epochs=BURST_EPOCHS),
    S3Fault("outage", "no request is answered for 3 s", once("away", seconds=3.0)),
    S3Fault("reset", "TCP RST within a photo", once("reset")),
    S3Fault("truncation", "the body ends within a photo", once("truncate")),
    S3Fault("truncation, wrong length", "and Content-Length says the same", once("short")),
    S3Fault("stall", "3 s of silence within a photo, then the end", once("stall", seconds=3.0)),
    S3Fault("bit flip", "in a photo, on the wire", once("flip")),
    S3Fault(
        "object replaced", "by another shard's bytes; the epoch after", epochs=2, disturb=put_other
    ),
    S3Fault("object missing", "from the start on", disturb=remove, at_start=True),
)


def s3_client() -> Any:
    """boto3's client for the endpoint of the environment, by path and signed as today."""
    config = Config(signature_version="s3v4", s3={"addressing_style": "path"})
    return boto3.session.Session().client("s3", config=config)


@contextmanager
def s3_server(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and endpoint of a server of our own."""
    os.environ |= {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    if missing_reason() is None:
        cluster = Cluster(folder)
        cluster.start()
        yield "Ceph RADOS Gateway", cluster.endpoint
        cluster.stop(kill=True)
        return
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"moto (no Ceph here: {missing_reason()})", f"http://{host}:{port}"
    server.stop()
