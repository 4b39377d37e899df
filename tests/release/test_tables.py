"""Tables of requests: what columns mean; bad rows are errors in their place, good ones are read."""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.release.conftest import Trained
from vlal_dist.config.sections import PredictConfig
from vlal_dist.data.format.tables import Record
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.release.model import ExportedModel, load_model
from vlal_dist.release.requests import Reject, Request, open_requests
from vlal_dist.release.tables import read_table

SUPPRESSED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]  # also on a busy machine
BOX = (1.0, 2.0, 30.0, 40.0)


@pytest.fixture(scope="module")
def model(trained: Trained) -> ExportedModel:
    return load_model(trained.export)


def read(path: Path, *ignored: str) -> list[Record | DataError]:
    rows = list(read_table(path, ignored)[0])
    assert [row for row, _ in rows] == list(range(len(rows)))
    return [record for _, record in rows]


def reasons(records: Sequence[Record | DataError]) -> list[str]:
    """The reason of each bad row, `ok` for the others."""
    return [str(one).partition(":")[0] if isinstance(one, DataError) else "ok" for one in records]


@pytest.mark.parametrize(
    ("header", "cells", "box"),
    [
        ("image,object", "a.jpg,ball", None),
        ("\ufeffImage , OBJECT,Box", 'a.jpg,ball,"[1,2,30,40]"', BOX),
        ("file_name,object_name,bbox", 'a.jpg,ball,"(1, 2, 30, 40)"', BOX),
        ("File Name,object-name,instance_bbox", "a.jpg,ball,1 2 30 40", BOX),
        ("image_id,object,X,Y,W,H", "a.jpg,ball,1,2,30,40", BOX),
        ("photo,object,x,y,Width,HEIGHT", "a.jpg,ball,1,2,30,40", BOX),
        ("image,object,x1,y1,x2,y2", "a.jpg,ball,1,2,31,42", BOX),
        ("image,object,ymax,xmax,ymin,xmin", "a.jpg,ball,42,31,2,1", BOX),
        ("image,object,left,top,right,bottom", "a.jpg,ball,1,2,31,42", BOX),
        ("image,object,left,top,width,height", "a.jpg,ball,1,2,30,40", BOX),
        ("image,image_id,id,object,bbox", "a.jpg,5,7,ball,", None),
        ("image;object;x;y;w;h", "a.jpg;ball;1;2;30;40", BOX),
        ("image\tobject\tbox", "a.jpg\tball\t1,2,30,40", BOX),
        ("image, object, box", 'a.jpg, ball, "1,2,30,40"', BOX),
        ("image,object,positive_attributes", "a.jpg,ball,red", None),
    ],
)
def test_columns_are_known_by_their_usual_names(
    model: ExportedModel, tmp_path: Path, header: str, cells: str, box: object
) -> None:
    (tmp_path / "t.CSV").write_text(f"{header}\n{cells}\n", encoding="utf-8")
    config = PredictConfig(table=str(tmp_path / "t.CSV"))
    [found] = open_requests(config, model)[1]
    assert isinstance(found, Request)
    assert (found.image, found.object_name, found.box) == ("a.jpg", "ball", box)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            "image,object,boxx",
            r"unknown column: 'boxx' .* --predict\.ignore_columns \"\['boxx'",
        ),
        ("image,object,segmentation", "unknown column: 'segmentation'"),
        (",image,object", "unknown column: ''"),
        ("image,object,box,bbox", r"two columns: 'box' and 'bbox' .* predict\.ignore_columns"),
        ("image,object,box,Box ", "two columns: 'box' and 'Box ' .* remove or rename one"),
        ("image,image,object", "two columns: 'image' and 'image'"),
        ("image,file_name", "two columns: 'image' and 'file_name' both give the image"),
        ("image,bbox,width,height", "two columns: 'bbox' and 'width' both give the box"),
        ("image,x,y,w", "bad box: 'x', 'y', 'w' are not complete"),
        ("image,x,y,x2,y2", "bad box: "),
        ("image,x1,y1,x2,y2,w,h", "bad box: "),
        ("object", "has the columns object; needed is image"),
        ("", "needed is image"),
    ],
)
def test_columns_that_are_not_understood_are_errors(
    tmp_path: Path, header: str, message: str
) -> None:
    (tmp_path / "t.csv").write_text(header + "\n" + "1," * header.count(",") + "1\n")
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "t.csv", [])
    if header:
        cells = {name: ["1"] for name in header.split(",")}
        if len(cells) == header.count(",") + 1:
            pa.parquet.write_table(pa.table(cells), tmp_path / "t.parquet")
            with pytest.raises(DataError, match=message):
                read_table(tmp_path / "t.parquet", [])


def test_the_remedy_for_other_columns_works(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(",image,bbox,width,Height \n0,a.jpg,1 2 3 4,640,480\n")
    assert read(tmp_path / "t.csv", "", "WIDTH", "height") == [{"image": "a.jpg", "box": "1 2 3 4"}]
    with pytest.raises(ConfigError, match=r"ignore_columns: .* no column 'depth'; it has , image"):
        read_table(tmp_path / "t.csv", ["", "width", "height", "depth"])


def test_json_rows_with_other_keys_are_rejected_one_by_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[dict[str, Any]] = [
        {"image": "a", "object": "ball"},
        {"image": "a", "caption": "x"},
        {"image": "a", "box": [1, 2, 3, 4], "bbox": [1, 2, 3, 4]},
        {"Image": "a", "xmin": 1, "ymin": 2, "xmax": 3, "ymax": 4},
        {"image": "a", "x": 1},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level("INFO"):
        found = read(tmp_path / "t.jsonl")
    assert reasons(found) == ["ok", "unknown column", "two columns", "ok", "bad box"]
    assert found[3] == {"image": "a", "x1": 1, "y1": 2, "x2": 3, "y2": 4}
    assert "'xmin', 'ymin', 'xmax', 'ymax' are read as two corners" in caplog.text
    assert reasons(read(tmp_path / "t.jsonl", "Caption", "none"))[1] == "ok"
    assert "no row of" in caplog.text and "'none'" in caplog.text


def test_a_vaw_record_is_a_row(model: ExportedModel, tmp_path: Path) -> None:
    record = {
        "image_id": "2373241",
        "instance_id": "2373241004",
        "instance_bbox": [0.0, 182.5, 500.16666666666663, 148.5],
        "instance_polygon": [[[432.5, 214.16666666666669]]],
        "object_name": "ball",
        "positive_attributes": ["tiled"],
        "negative_attributes": [],
    }
    (tmp_path / "t.jsonl").write_text(json.dumps(record))
    config = PredictConfig(table=str(tmp_path / "t.jsonl"))
    [found] = open_requests(config, model)[1]
    assert found == Request(
        0, "2373241004", "2373241", "ball", 0, (0.0, 182.5, 500.16666666666663, 148.5)
    )


def test_a_json_list_is_converted_as_the_message_says(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps([{"image": "a"}, {"image": "b"}]))
    with pytest.raises(ConfigError, match="a JSON list is not read") as caught:
        read_table(tmp_path / "t.json", [])
    command = "python" + str(caught.value).partition(": python")[2]
    script, _, files = command.partition(" < ")
    source, _, target = files.partition(" > ")
    done = subprocess.run(
        [sys.executable, *shlex.split(script)[1:]],
        input=Path(source).read_text(),
        capture_output=True,
        text=True,
        check=True,
    )
    Path(target).write_text(done.stdout)
    assert read(tmp_path / "t.jsonl") == [{"image": "a"}, {"image": "b"}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("b\xff.jpg,ball".encode("latin-1"), "ok"),  # rejected as a request, not as a row
        (b'"b.jpg,ball', "not CSV"),
        (b'b.jpg,"ball', "not CSV"),
        (b'b"b.jpg,b"all', "ok"),
        (b"b.jpg", "bad row"),
        (b"b.jpg,ball,", "bad row"),
        (b"\0,\0", "ok"),
        (b"b" * 200_000 + b",ball", "not CSV"),
        (b"b" * 3_000_000 + b",ball", "not CSV"),
        (b'"' + b"b" * 3_000_000, "not CSV"),
    ],
)
def test_one_bad_line_of_a_csv_costs_no_other(tmp_path: Path, line: bytes, reason: str) -> None:
    good = [{"image": f"{n}.jpg", "object": "ball"} for n in range(300)]
    lines = [b"image,object", b"0.jpg,ball", line]
    lines += [f"{n}.jpg,ball".encode() for n in range(1, 300)]
    (tmp_path / "t.csv").write_bytes(b"\n".join(lines))
    found = read(tmp_path / "t.csv")
    assert reasons(found[1:2]) == [reason] and [found[0], *found[2:]] == good


def test_a_cell_may_hold_line_ends(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b'image,id\r\na.jpg,"one\r\ntwo"\r\n\r\nb.jpg,x')
    assert read(tmp_path / "t.csv") == [
        {"image": "a.jpg", "id": "one\r\ntwo"},
        {"image": "b.jpg", "id": "x"},
    ]


GOOD = [{"image": "a.jpg", "object": "ball", "box": list(BOX)}, {"image": "a.jpg", "object": "box"}]


@given(junk=st.lists(st.binary(max_size=40).map(lambda data: data.replace(b"\n", b"")), max_size=4))
@settings(max_examples=100, deadline=None, suppress_health_check=SUPPRESSED)
def test_any_bytes_between_json_rows_cost_no_row(tmp_path: Path, junk: list[bytes]) -> None:
    lines, good = [], []
    for n, one in enumerate([*junk, None]):
        good.append({**GOOD[n % 2], "id": str(n)})
        lines += [json.dumps(good[-1]).encode(), *([] if one is None else [one])]
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
    found = read(tmp_path / "t.jsonl")
    assert [one for one in found if isinstance(one, dict) and one] == good


@given(junk=st.binary(max_size=60).map(lambda data: data.replace(b"\n", b"").replace(b"\r", b"")))
@settings(max_examples=100, deadline=None, suppress_health_check=SUPPRESSED)
def test_any_line_of_a_csv_costs_no_other(tmp_path: Path, junk: bytes) -> None:
    good = [f"{n}.jpg" for n in range(100)]
    lines = [b"image,object", *(f"{name},ball".encode() for name in good)]
    lines.insert(50, junk)
    (tmp_path / "t.csv").write_bytes(b"\n".join(lines))
    found = read(tmp_path / "t.csv")
    assert [r["image"] for r in found if isinstance(r, dict) and r["object"] == "ball"] == good


CELLS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["a.jpg", "ball", "1,2,3,4", "[1,2,3]", "nan", "1e999", "\ud83d"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
KEYS = ["image", "object", "id", "box", "x", "y", "w", "h", "x1", "y1", "x2", "y2"]


@given(rows=st.lists(st.dictionaries(st.sampled_from(KEYS), CELLS), max_size=6))
@settings(max_examples=50, deadline=None, suppress_health_check=SUPPRESSED)
def test_any_cells_make_a_request_or_a_reject(
    model: ExportedModel, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PredictConfig(table=str(tmp_path / "t.jsonl"))
    found = list(open_requests(config, model)[1])
    assert [one.row for one in found] == list(range(len(rows)))
    for row, one in zip(rows, found, strict=True):
        if isinstance(one, Reject):
            assert one.reason and len(one.reason) < 40 and len(one.detail) < 1000
            continue
        for text in (one.id, one.image, one.object_name):
            str(text).encode("utf-8")
        given_box = {"box", "x", "y", "w", "h", "x1", "y1", "x2", "y2"} & {
            key for key, value in row.items() if value not in (None, "") and value == value
        }
        if one.box is None:  # never the whole photo for a row that names a box
            assert not given_box or not str(row.get("box") or "").strip()
        else:
            assert given_box and all(abs(side) < 1e309 for side in one.box)


def test_deep_and_long_json_is_one_bad_row(model: ExportedModel, tmp_path: Path) -> None:
    good = json.dumps(GOOD[0])
    lines = [
        "[" * 200_000,
        '{"image": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"image": "a", "box": ' + "[" * 900 + "]" * 900 + "}",
        '{"image": "a", "box": [1' + "0" * 400 + ", 1, 1, 1]}",
        '{"image": "a", "box": [1' + "0" * 5000 + ", 1, 1, 1]}",
        '{"image": "a", "box": [NaN, 1, 1, 1]}',
        '{"image": "a", "box": [Infinity, 1, 1, 1]}',
        '{"image": "a", "image": "b"}',
        '{"image": "a", "box": true}',
        '{"image": ["a"]}',
        '{"image": "' + "a" * 5_000_000 + '"}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join([good, *lines, good]))
    config = PredictConfig(table=str(tmp_path / "t.jsonl"), object="ball")
    first, *bad, last = open_requests(config, model)[1]
    assert isinstance(first, Request) and isinstance(last, Request) and first.box == last.box == BOX
    assert [one.reason for one in bad if isinstance(one, Reject)] == [
        *("not JSON", "not JSON", "bad box", "bad box", "not JSON", "bad box", "bad box"),
        *("not JSON", "bad box", "not text", "not JSON"),
    ]


def test_parquet_cells_that_are_no_text_and_damaged_groups(
    model: ExportedModel, tmp_path: Path
) -> None:
    data = pa.array([b"a.jpg", b"b\xff.jpg", b"c.jpg"]).cast(pa.binary())
    text = pa.StringArray.from_buffers(3, *data.buffers()[1:])
    table = pa.table({"image": text, "object": pa.array(["ball"] * 3).dictionary_encode()})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    config = PredictConfig(table=str(tmp_path / "t.parquet"))
    first, bad, last = open_requests(config, model)[1]
    assert isinstance(first, Request) and isinstance(last, Request) and last.image == "c.jpg"
    assert isinstance(bad, Reject) and bad.reason == "not text" and "\\udcff" in bad.detail

    names = [f"{n:05d}.jpg" for n in range(6000)]
    path = tmp_path / "damaged.PARQUET"
    table = pa.table({"image": names})
    pa.parquet.write_table(table, path, row_group_size=2000, use_dictionary=False)
    column = pa.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    damaged = bytearray(path.read_bytes())
    for at in range(column.data_page_offset, column.data_page_offset + 60):
        damaged[at] ^= 0xFF
    path.write_bytes(damaged)
    rows = dict(read_table(path, [])[0])
    assert isinstance(rows[2000], DataError) and "rows 2000 to 3999" in str(rows[2000])
    assert [r["image"] for r in rows.values() if isinstance(r, dict)] == names[:2000] + names[4000:]
    assert isinstance(rows[4000], dict) and rows[4000]["image"] == names[4000]
