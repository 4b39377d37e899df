import errno
import os
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import S3Server
from vlal_dist.errors import DataError, StorageError
from vlal_dist.method.metrics import AttributeScores
from vlal_dist.observability.metric_definitions import (
    ATTRIBUTE_STATUS,
    S3_REASONS,
    SAVE_FAILURES,
    STORAGE,
)
from vlal_dist.storage.checks import translated_errors
from vlal_dist.storage.store import open_store
from vlal_dist.training.run_log import attribute_status, failure_reason, storage_readings


def test_every_attribute_has_one_status() -> None:
    positive, negative = np.array([2, 0, 1, 0, 3]), np.array([1, 4, 0, 0, 1])
    scores = AttributeScores(
        ap=np.zeros(5), num_positive=positive, num_negative=negative, num_unannotated=positive
    )
    found = attribute_status(scores)
    assert found == {"scored": 2, "no_positive": 1, "no_negative": 1, "unannotated": 1}
    assert set(found) == set(ATTRIBUTE_STATUS)


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.ENOSPC, "disk_full"), (errno.EDQUOT, "disk_full"), (errno.EIO, "io")],
)
def test_failure_reason_of_a_disk_error(code: int, reason: str) -> None:
    with pytest.raises(StorageError) as raised, translated_errors(Path("/x")):
        raise OSError(code, os.strerror(code))
    assert failure_reason(raised.value) == reason and reason in SAVE_FAILURES


def test_failure_reason_of_another_error() -> None:
    assert failure_reason(DataError("two wrote one name")) == "other"


def test_storage_readings_are_known_metrics_of_this_process(
    moto_s3: S3Server, tmp_path: Path
) -> None:
    disks = {"cache": tmp_path / "not" / "made" / "yet", "run": None}
    before = storage_readings(disks)
    store = open_store(moto_s3.url())
    store.create("k", b"12345")
    assert store.read("k") == b"12345"
    after = storage_readings(disks)
    grown = {name: after[name] - before[name] for name in after if name[0].startswith("vlal_s3")}
    assert grown["vlal_s3_bytes_total", "in"] == grown["vlal_s3_bytes_total", "out"] == 5
    assert grown["vlal_s3_requests_total",] >= 2
    assert [grown["vlal_s3_retries_total", reason] for reason in S3_REASONS] == [0] * 8
    assert after["vlal_disk_free_bytes", "cache"] > 0
    assert ("vlal_disk_free_bytes", "run") not in after
    for name, *labels in after:
        assert all(
            value in known
            for value, known in zip(labels, STORAGE[name].labels.values(), strict=True)
        )
