"""Single samples over S3: what arrives altered is fetched once more, what is damaged is named."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import S3Server
from tests.fixtures.damaged_tars import SPLIT, open_remote, upload
from tests.fixtures.fault_proxy import Fault, FaultProxy
from vlal_dist.data.format.dataset import Dataset, open_dataset, open_split
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.errors import DataError

SHARDS = f"^GET .*/{SPLIT}/shards/"


@pytest.fixture(scope="module")
def merged(small: Path) -> Dataset:
    return open_dataset(str(small / "merged"), cache=small / "cache")


@pytest.fixture
def proxy(moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(moto_s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture(scope="module")
def root(moto_s3: S3Server, merged: Dataset) -> str:
    """The dataset in a bucket; leave it as it is."""
    with moto_s3.environment():
        root = moto_s3.url()
        upload(merged, root)
    return root


@pytest.mark.parametrize("times", [1, 2])
def test_a_sample_that_arrives_altered_is_fetched_once_more(
    merged: Dataset, root: str, proxy: FaultProxy, tmp_path: Path, times: int
) -> None:
    plain = SampleReader(open_split(merged, SPLIT))
    remote = SampleReader(open_split(open_remote(root, tmp_path), SPLIT))
    offset = int(remote.split.index.offset[0] - remote.split.blocks.offset[0])
    proxy.faults = [Fault("flip", match=SHARDS, at=offset + 600, times=times)]
    if times == 1:
        assert remote.read_range(0) == plain.read_range(0)
        assert [remote.read_range(row) for row in range(5)] == list(map(plain.read_range, range(5)))
        return
    with pytest.raises(DataError, match=r"sample row 0 .*crc32 [0-9a-f]{8} where"):
        remote.read_range(0)
