"""Rows of one photo get one number."""

import json
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import S3Server
from tests.fixtures.damaged_tars import SPLIT, open_remote, upload
from tests.fixtures.scored_dataset import copy_merged
from vlal_dist.data.format.dataset import Dataset, open_dataset, open_split
from vlal_dist.data.format.photo_groups import image_numbers
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.errors import DataError


@pytest.fixture
def merged(small: Path, tmp_path: Path) -> Dataset:
    folder = copy_merged(small, tmp_path / "small")
    return open_dataset(str(folder / "merged"), cache=folder / "cache")


def test_rows_of_a_photo_share_a_number(merged: Dataset, moto_s3: S3Server, tmp_path: Path) -> None:
    split = open_split(merged, SPLIT)
    reader = SampleReader(split)
    photos = [
        json.loads(reader.read_members(row)[1]["json"])["image_id"]
        for row in range(len(split.index))
    ]
    found = image_numbers(split)
    assert found.dtype == np.int64 and len(set(photos)) < len(photos)
    # pack lays the rows of a photo side by side, so the numbers count up.
    runs = [len(list(group)) for _, group in groupby(photos)]
    assert np.array_equal(found, np.repeat(np.arange(len(runs)), runs))
    root = moto_s3.url()
    upload(merged, root)
    assert np.array_equal(image_numbers(open_split(open_remote(root, tmp_path), SPLIT)), found)


def test_a_damaged_json_member_is_refused(merged: Dataset) -> None:
    split = open_split(merged, SPLIT)
    path = split.store.local_path(split.shard_key(0))
    assert path is not None
    data = path.read_bytes()
    at = int(split.index.offset[0] + split.index.json_offset[0])
    for wrong in (b"#", b'{"object_id":99999999}'):
        path.chmod(0o644)
        path.write_bytes(data[:at] + wrong + data[at + len(wrong) :])
        with pytest.raises(DataError, match="json of sample row 0 is not what was packed"):
            image_numbers(split)
