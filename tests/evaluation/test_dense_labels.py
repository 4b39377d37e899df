"""Dense labels are joined by instance id, whatever the order of the file."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.fixtures.tiny_dataset import VOCABULARY, make_instances
from vlal_dist.data.format.dataset import Dataset
from vlal_dist.errors import DataError, NotFoundError
from vlal_dist.evaluation.dense_labels import join_dense_labels, read_dense_labels
from vlal_dist.storage.store import read_url


def table(rows: list[tuple[str, list[str]]]) -> pa.Table:
    schema = pa.schema([("instance_id", pa.string()), ("positive", pa.list_(pa.string()))])
    columns = {"instance_id": [row[0] for row in rows], "positive": [row[1] for row in rows]}
    return pa.table(columns, schema=schema)


def test_join_is_row_aligned_with_the_index(dataset: Dataset, truth_file: Path) -> None:
    dense = read_dense_labels(str(truth_file), dataset, "test")
    assert dense.unknown_names == []
    for row, instance in enumerate(make_instances()):
        present = [int(i) for i in (dense.label[row] == 1).nonzero()[0]]
        assert present == instance.present
    assert set(dense.label.ravel().tolist()) == {-1, 1}


def test_names_unknown_to_the_vocabulary_are_listed() -> None:
    rows = [("a", ["red", "shiny"]), ("b", ["old", "blue", "shiny"]), ("c", [])]
    ids = pa.array(["c", "b", "a"])
    dense = join_dense_labels(table(rows), ids, vocabulary=VOCABULARY, where="t")
    assert dense.unknown_names == ["old", "shiny"]
    assert (dense.label == 1).sum(axis=1).tolist() == [0, 1, 1]
    assert dense.label[1, VOCABULARY.attribute_ids["blue"]] == 1


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("a", ["red"])], "lacks 1 of 2 instances, first 'b'"),
        ([("a", ["red"]), ("b", []), ("a", [])], "twice"),
        ([("a", ["Red"]), ("b", [])], "no name in it, such as Red"),
    ],
)
def test_bad_labels_are_refused(rows: list[tuple[str, list[str]]], says: str) -> None:
    with pytest.raises(DataError, match=says):
        join_dense_labels(table(rows), pa.array(["a", "b"]), vocabulary=VOCABULARY, where="t")


def test_other_files_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_dense_labels(str(tmp_path / "none.parquet"), dataset, "test")
    (tmp_path / "text").write_text("no Parquet")
    with pytest.raises(DataError, match="no Parquet"):
        read_dense_labels(str(tmp_path / "text"), dataset, "test")
    pa.parquet.write_table(pa.table({"key": ["a"]}), tmp_path / "other")
    with pytest.raises(DataError, match="instance_id"):
        read_dense_labels(str(tmp_path / "other"), dataset, "test")


def test_a_plain_file_name_is_read_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert read_url("x.json") == read_url(f"file://{tmp_path}/x.json") == b"{}"
