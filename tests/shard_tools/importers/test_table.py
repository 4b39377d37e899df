"""`vlal import table`: layouts, columns, values, rejects, mutilated files."""

import csv
import json
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from shard_tools.importers.program import main
from shard_tools.importers.records import Notes, Record, RecordWriter, Rejected
from shard_tools.importers.table import read_table
from tests.conftest import S3Server
from tests.fixtures.mutilate import mutilations
from tests.fixtures.tiny_vaw import run_all
from vlal_dist.config.load import load_config
from vlal_dist.config.sections import ImportConfig
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.storage.store import open_store

LISTS = "image,object,id,box,positive,negative\n"
SUPPRESSED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def read(path: Path | Sequence[Path], text: str = "", **more: Any) -> list[Record | Rejected]:
    """What is read of a table, which is written first where its text is given."""
    if isinstance(path, Path) and text:
        path.write_text(text, encoding="utf-8")
    files = [str(path)] if isinstance(path, Path) else [str(one) for one in path]
    items = read_table(ImportConfig(inputs=more.pop("inputs", {"all": files}), **more))
    return [one for one in items if not isinstance(one, Notes)]


def labels(items: Sequence[Record | Rejected]) -> list[Any]:
    """Photo and names of each record; reason and line of each reject."""
    return [
        (one.image_id, one.positive, one.negative)
        if isinstance(one, Record)
        else (one.reason, one.line)
        for one in items
    ]


RED = [("a.jpg", ("red",), ("blue",)), ("b.jpg", (), ("red",))]


@pytest.mark.parametrize(
    "text",
    [
        "image,positive,negative\na.jpg,red,blue\nb.jpg,,red\n",
        'File_Name;Positive-Attributes;negative_attributes\na.jpg;"[""red""]";[\'blue\']\nb.jpg;[];red',
        "photo,attribute,value\na.jpg,red,1\na.jpg,blue,0\nb.jpg,red,0\nb.jpg,blue,\n",
        "image,attribute,value\na.jpg,red,yes\nb.jpg,red,no\na.jpg,blue,absent\n",
        "image\tred\tblue\na.jpg\tpresent\tFALSE\nb.jpg\t0.0\tunknown\n",
        "image_id,red,blue\na.jpg,1,0\nb.jpg,0,\n",
    ],
)
def test_every_layout_is_known_by_its_columns(tmp_path: Path, text: str) -> None:
    assert labels(read(tmp_path / "t.csv", text)) == RED


def test_lists_of_several_names_and_their_separators(tmp_path: Path) -> None:
    text = LISTS + "a,mug,,,red | shiny,\nb,,,,red;light blue,x|y;z\n"
    assert labels(read(tmp_path / "t.csv", text)) == [
        ("a", ("red", "shiny"), ()),
        ("b", ("red", "light blue"), ("x", "y;z")),
    ]


def test_rows_of_one_object_need_not_be_adjacent(tmp_path: Path) -> None:
    rows = [(n % 700, a) for a in ("red", "blue", "big") for n in range(1400)]
    text = "image,box,attribute,value\n"
    text += "".join(f"{n}.jpg,1 1 2 2,{a},{n % 2}\n" for n, a in rows)
    found = read(tmp_path / "t.csv", text)
    assert [one.image_id for one in found if isinstance(one, Record)] == [
        f"{n}.jpg" for n in range(700)
    ]
    assert labels(found)[1][1] == ("red", "blue", "big") and not labels(found)[0][1]


def test_rows_of_one_id_that_differ_are_rejected(tmp_path: Path) -> None:
    text = "image,id,attribute\na.jpg,1,red\nb.jpg,2,red\nc.jpg,1,blue\na.jpg,1,tall\n"
    assert labels(read(tmp_path / "t.csv", text)) == [
        ("conflict", 4),
        ("a.jpg", ("red", "tall"), ()),
        ("b.jpg", ("red",), ()),
    ]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ("1/0/-1", [(("red",), ()), ((), ("red",)), ((), ())]),
        ("1/-1/0", [(("red",), ()), ((), ()), ((), ("red",))]),
    ],
)
def test_numbers_are_read_by_the_rule(tmp_path: Path, numbers: str, expected: list[Any]) -> None:
    text = "image,red\na,1\nb,0\nc,-1.0\n"
    found = labels(read(tmp_path / "t.csv", text, numbers=numbers))
    assert [one[1:] for one in found] == expected
    table = pa.table({"image": ["a", "b", "c"], "red": pa.array([1, 0, -1], pa.int8())})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    assert labels(read(tmp_path / "t.parquet", numbers=numbers)) == found
    with pytest.raises(DataError, match=r"1/0/-1 reads 0 as absent .* 1/-1/0 reads -1 as absent"):
        read(tmp_path / "t.csv")
    with pytest.raises(DataError, match=r"t.csv, line 4: a value is -1"):
        read(tmp_path / "t.csv", "image,attribute,value\na,red,1\nb,red,0\nc,red,-1\n")


def test_own_values_and_certainties(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("importing: {values: {maybe: unknown, yes: absent, -1: unknown, 2: present}}")
    values = load_config(config, {}, sections=["importing"]).importing.values
    text = "image,red\na,Maybe\nb,yes\nc,-1\nd,2\n"
    found = labels(read(tmp_path / "t.csv", text, values=values))
    assert [one[1:] for one in found] == [((), ()), ((), ("red",)), ((), ()), (("red",), ())]
    text = "image,attribute,value,certainty\na,red,1,4\na,big,1,1\na,old,0,x\n"
    found = labels(read(tmp_path / "t.csv", text, min_certainty=2))
    assert found == [("bad_certainty", 4), ("a", ("red",), ())]
    with pytest.raises(ConfigError, match=r"importing.min_certainty NUMBER"):
        read(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("image,red,note", "a,1,hello", "column 'note' is not understood .*'hello' is no value"),
        ("image,positive,note", "a,red,1", "'note' is not understood .*none of layout lists"),
        ("image,attribute,extra", "a,red,1", "'extra' is not understood .*none of layout long"),
        ("image,file_name,red", "a,b,1", "'image' and 'file_name' both give the image"),
        ("image,red,red", "a,1,1", "'red' occurs twice"),
        ("name,red", "a,1", "none names the photo"),
        ("image,object", "a,mug", "none is an attribute"),
        ("image,x,y,red", "a,1,2,1", "'x', 'y' are not one box"),
    ],
)
def test_a_column_that_is_not_understood_is_an_error(
    tmp_path: Path, header: str, row: str, message: str
) -> None:
    with pytest.raises(DataError, match=rf"t\.csv.*{message}"):
        read(tmp_path / "t.csv", f"{header}\n{row}\n")


def test_the_remedies_of_unknown_columns_work(tmp_path: Path) -> None:
    text = "name,Note,red,w\na,hello,1,1\n"
    found = read(tmp_path / "t.csv", text, columns={"image": "Name"}, ignore_columns=["note", "w"])
    assert labels(found) == [("a", ("red",), ())]
    found = read(tmp_path / "t.csv", columns={"image": "name", "object": "NOTE"},
                 attributes=["red", "w"])  # fmt: skip
    assert labels(found) == [("a", ("red", "w"), ())]
    assert isinstance(found[0], Record) and found[0].object_name == "hello"
    with pytest.raises(ConfigError, match=r"columns.image: .* no column 'nam'; it has name, Note"):
        read(tmp_path / "t.csv", columns={"image": "nam"})
    with pytest.raises(ConfigError, match=r"importing.attributes: .* no column 'rde'"):
        read(tmp_path / "t.csv", columns={"image": "name"}, attributes=["rde"],
             ignore_columns=["note", "red", "w"])  # fmt: skip


def test_rejects_name_line_and_reason_and_cost_no_other_row(tmp_path: Path) -> None:
    text = LISTS + 'a,"m\nug",1,,red,\n,mug,2,,red,\nc,mug,3,"1,2,0,x",red,\nd,mug\n'
    text += 'e,mug,5,,"[1, 2]",\nf,mug,6,,"[""red""",\nz,mug,9,"1,2,3,4",red,\n'
    found = read(tmp_path / "t.csv", text)
    assert labels(found) == [
        ("a", ("red",), ()), ("no_image", 4), ("bad_box", 5), ("bad_row", 6),
        ("bad_attributes", 7), ("bad_attributes", 8), ("z", ("red",), ()),
    ]  # fmt: skip
    assert [one.id for one in found[1:3] if isinstance(one, Rejected)] == ["2", "3"]


def test_the_column_split_and_splits_of_inputs(tmp_path: Path) -> None:
    text = "image,split,red\na,Train,1\nb,validation,0\nc,TEST,1\nd,other,1\n"
    found = read(tmp_path / "t.csv", text)
    assert [one.split for one in found if isinstance(one, Record)] == ["train", "val", "test"]
    assert labels(found)[3] == ("bad_split", 5)
    path = str(tmp_path / "t.csv")
    with pytest.raises(ConfigError, match=r"as val, and it has the column 'split'"):
        read(tmp_path, inputs={"val": [path]})
    found = read(tmp_path, inputs={"val": [path]}, ignore_columns=["split"])
    assert {one.split for one in found if isinstance(one, Record)} == {"val"}
    with pytest.raises(ConfigError, match="has the split 'valid'"):
        read(tmp_path, inputs={"valid": [path]})


def test_photos_in_a_column_are_named_as_pack_names_them(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": b"x", "path": "p/a.jpg"}, {"bytes": b"y", "path": None}]
    table = pa.table({"image": pa.array(cells, kind), "positive": [["red"], None]})
    pa.parquet.write_table(table, tmp_path / "t-00.parquet")
    path = tmp_path / "t-00.parquet"
    assert labels(read(path)) == [("p/a.jpg", ("red",), ()), ("t-00-00000001", (), ())]
    with pa.ipc.new_stream(str(tmp_path / "t-00.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert labels(read(tmp_path / "t-00.arrow")) == labels(read(path))
    notes = [one for one in read_table(ImportConfig(inputs={"all": [str(path)]}))
             if isinstance(one, Notes)]  # fmt: skip
    assert notes[0].settings == {"pack.images": [str(path)]}
    with pytest.raises(DataError, match=r"both have a photo 'p/a.jpg'"):
        read([path, tmp_path / "t-00.arrow"])


OBJECTS = st.lists(
    st.tuples(
        st.sampled_from(["a.jpg", "b/c.png", "d"]),
        st.sampled_from(["mug", "ball"]),
        st.none() | st.tuples(*[st.integers(1, 90)] * 4),
        st.dictionaries(st.sampled_from(["red", "big", "öl", "x y"]), st.booleans(), min_size=1),
    ),
    min_size=1,
    max_size=12,
)


def written(folder: Path, objects: Sequence[Any]) -> Iterator[Path]:
    """The same objects as tables of several layouts and formats."""
    names = list(dict.fromkeys(name for *_, values in objects for name in values))
    lists: list[dict[str, Any]] = []
    wide: list[dict[str, Any]] = []
    long: list[tuple[int, dict[str, Any]]] = []
    for number, (image, kind, box, values) in enumerate(objects):
        head = {"image": image, "object": kind, "id": f"n{number}", "box": box and list(box)}
        sides = [[n for n in names if values.get(n) is one] for one in (True, False)]
        lists.append({**head, "positive": sides[0], "negative": sides[1]})
        wide.append({**head, **{name: values.get(name) for name in names}})
        long += [(names.index(n), {**head, "attribute": n, "value": values[n]})
                 for n in names if n in values]  # fmt: skip
    # attribute by attribute: rows of an object lie apart, its first row decides the order
    apart = [row for _, row in sorted(long, key=lambda one: one[0])]
    first = {row["id"]: None for row in apart}
    for rows in (lists, wide):
        rows.sort(key=lambda row: list(first).index(row["id"]))
    for stem, rows in (("lists", lists), ("wide", wide), ("long", apart)):
        text = StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {key: "|".join(cell) if key in ("positive", "negative") else cell
             for key, cell in row.items()} for row in rows
        )  # fmt: skip
        (folder / f"{stem}.csv").write_text(text.getvalue(), encoding="utf-8")
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{stem}.jsonl").write_text(lines, encoding="utf-8")
        table = pa.Table.from_pylist(rows)
        pa.parquet.write_table(table, folder / f"{stem}.parquet")
        with pa.ipc.new_file(str(folder / f"{stem}.arrow"), table.schema) as ipc:
            ipc.write_table(table)
        yield from (folder / f"{stem}.{one}" for one in ("csv", "jsonl", "parquet", "arrow"))


@given(objects=OBJECTS)
@settings(max_examples=25, deadline=None, suppress_health_check=SUPPRESSED)
def test_any_objects_are_the_same_records_in_every_layout_and_format(
    tmp_path: Path, objects: Sequence[Any]
) -> None:
    outputs = set()
    for path in written(tmp_path, objects):
        folder = tmp_path / f"{path.name}.out"
        folder.mkdir(exist_ok=True)
        writer = RecordWriter(folder, rules=[])
        for item in read_table(ImportConfig(inputs={"all": [str(path)]})):
            writer.add(item)
        writer.close()
        assert writer.counts["records"] == {"all": len(objects)}, (path, writer.examples)
        outputs.add(writer.files["all.parquet"].read_bytes())
    assert len(outputs) == 1


TEXT = LISTS + "".join(
    f'p{n}.jpg,mug,{n},"[{n + 1}, 2, 30, 40]",red|tall,blue\n' for n in range(12)
)


def _files() -> dict[str, bytes]:
    lines = TEXT.splitlines()[1:]
    rows = [{"image": f"p{n}.jpg", "box": [n + 1, 2, 30, 40], "positive": ["red"], "negative": []}
            for n in range(len(lines))]  # fmt: skip
    sink, ipc = pa.BufferOutputStream(), pa.BufferOutputStream()
    pa.parquet.write_table(pa.Table.from_pylist(rows), sink)
    with pa.ipc.new_file(ipc, pa.Table.from_pylist(rows).schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows))
    long = "image,id,attribute,value\n" + "".join(
        f"p{n % 5}.jpg,{n % 5},a{n},{n % 2}\n" for n in range(20)
    )
    wide = "image,red,blue\n" + "".join(f"p{n}.jpg,{n % 2},\n" for n in range(12))
    return {
        "lists.csv": TEXT.encode(),
        "long.csv": long.encode(),
        "wide.csv": wide.encode(),
        "t.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "t.parquet": sink.getvalue().to_pybytes(),
        "t.arrow": ipc.getvalue().to_pybytes(),
    }


@pytest.mark.parametrize("name", sorted(_files()))
def test_mutilated_tables_are_records_rejects_or_an_error_that_names_the_file(
    tmp_path: Path, name: str
) -> None:
    original = _files()[name]
    ends = {"whole": 0, "rejects": 0, "error": 0}
    for seed in range(100):
        path = tmp_path / name
        path.write_bytes(mutilations(original, seed))
        writer = RecordWriter(tmp_path, rules=[])
        try:
            for item in read_table(ImportConfig(inputs={"all": [str(path)]})):
                writer.add(item)
        except (ConfigError, DataError) as error:
            assert name in str(error) and len(str(error)) < 3000, seed
            ends["error"] += 1
        else:
            ends["rejects" if writer.reasons else "whole"] += 1
        finally:
            writer.close()
        assert all(one.file == name and one.reason for one in writer.examples.values())
    assert all(ends.values()) or name.endswith((".parquet", ".arrow")), ends


def test_the_command_writes_a_root_and_says_what_is_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.csv").write_text("image,Red_ ,tall\na.jpg,1,0\nb.jpg,0,x\nb.jpg,0,1\n")
    words = ["table", "--importing.inputs.train", str(tmp_path / "*.csv"), "--paths.root",
             str(tmp_path / "root"), "--importing.names", "[lower, underscores, trim]"]  # fmt: skip
    assert main([*words, "--importing.values.x", "unknown"]) == 0
    root = tmp_path / "root/imported"
    done = capsys.readouterr()
    assert f"next: vlal run --config {root}/config.yaml" in done.out
    assert "import: done: files 1, records (train 3), positive 2, negative 3" in done.out
    config = load_config(root / "config.yaml", {})
    assert config.paths.imported == str(root) and not config.model.object_gate
    assert config.clean.annotations == {"train": [f"{root}/train.parquet"]}
    assert config.pack.images == [str(tmp_path)]
    facts = json.loads((root / "import.json").read_bytes())
    assert facts["renamed"] == {"lower": 1, "underscores": 1, "trim": 1}
    rows = pyarrow.parquet.read_table(root / "train.parquet").to_pylist()
    assert rows[0] == {
        "image_id": "a.jpg", "instance_id": "a.jpg", "instance_bbox": None, "object_name": "image",
        "positive_attributes": ["red"], "negative_attributes": ["tall"],
    }  # fmt: skip
    before = {path.name: path.read_bytes() for path in root.glob("*.parquet")}
    assert main([*words, "--importing.values.x", "unknown"]) == 0  # repeated: nothing changes
    assert main([*words, "--importing.values.x", "absent"]) == 65  # another import
    assert {path.name: path.read_bytes() for path in root.glob("*.parquet")} == before


def test_the_limit_takes_the_first_photos_of_each_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{n // 2}.jpg,{('train', 'val')[n // 2 % 2]},1,{n + 1} 1 5 5" for n in range(40)]
    (tmp_path / "t.csv").write_text("\n".join(["image,split,red,box", *rows]))
    words = ["table", "--importing.inputs", str(tmp_path / "t.csv"), "--paths.root"]
    assert main([*words, str(tmp_path / "a"), "--limit", "3"]) == 0
    assert "records (train 6, val 6)" in capsys.readouterr().out
    assert main([*words, str(tmp_path / "b"), "--limit", "3",
                 "--importing.ignore_columns", "split"]) == 0  # fmt: skip
    assert "records (all 6)" in capsys.readouterr().out
    assert main([*words, str(tmp_path / "c"), "--limit", "0"]) == 64


@pytest.mark.parametrize(
    ("inputs", "code", "message"),
    [
        ("[]", 64, "importing.inputs is empty"),
        ("NONE.csv", 64, "NONE.csv does not exist"),
        ("NONE*.csv", 64, "matches no file"),
        (".", 64, "is a folder; name its files"),
        ("t.json", 64, "a JSON list is not read"),
        ("t.xls", 64, ".csv, .tsv, .jsonl, .ndjson, .parquet, .arrow"),
        ("empty.csv", 65, "none names the photo"),
        ("header.csv", 65, "no record; give files that hold annotations"),
    ],
)
def test_inputs_that_are_none(
    tmp_path: Path, inputs: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("t.json", "t.xls", "empty.csv"):
        (tmp_path / name).write_text("")
    (tmp_path / "header.csv").write_text("image,red\n")
    place = inputs if inputs == "[]" else str(tmp_path / inputs)
    words = ["table", "--importing.inputs", place, "--paths.root", str(tmp_path / "root")]
    assert main(words) == code
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "root").rglob("*.parquet"))


@pytest.mark.slow
def test_the_written_configuration_runs_from_photos_in_a_folder_or_in_a_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    rows: list[dict[str, Any]] = []
    for number in range(24):
        name = f"{number:02d}.jpg"
        Image.new("RGB", (64 + number, 48), (9 * number, 60, 90)).save(photos / name)
        rows.append({"image": name, "red": number % 2, "tall": number % 3 % 2})
    text = "image,red,tall\n" + "".join("{image},{red},{tall}\n".format(**row) for row in rows)
    (tmp_path / "t.csv").write_text(text)
    for row in rows:
        row["image"] = {"bytes": (photos / row["image"]).read_bytes(), "path": row["image"]}
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    labels = []
    for name, place in (("t.csv", photos), ("t.parquet", None)):
        root = tmp_path / name.replace(".", "_") / "own"  # the dataset's name is its last part
        words = ["table", "--importing.inputs", str(tmp_path / name), "--paths.root", str(root)]
        more = [] if place is None else ["--importing.photos", str(place)]
        assert main([*words, *more]) == 0
        run_all(root / "imported/config.yaml", ["clean", "pack"])
        files = sorted(path for path in (root / "dataset").rglob("labels.parquet"))
        manifest = json.loads((root / "dataset/dataset.json").read_bytes())
        labels.append(([path.read_bytes() for path in files], manifest["splits"]))
    assert labels[0] == labels[1] and len(labels[0][0]) == 3


@pytest.mark.slow
def test_tables_and_roots_may_lie_in_a_bucket(
    moto_s3: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    url = moto_s3.url()
    store = open_store(url)
    for number in range(3):
        store.create(f"in/t{number}.csv", f"image,red\n{number}.jpg,1\n".encode())
    words = ["table", "--paths.root", f"{url}/own", "--importing.inputs"]
    assert main([*words, f"{url}/in/t[01].csv"]) == 0
    assert "records (all 2)" in capsys.readouterr().out
    data = store.read("own/imported/all.parquet")
    found = pyarrow.parquet.read_table(pa.BufferReader(data)).column("image_id").to_pylist()
    assert found == ["0.jpg", "1.jpg"]
    assert main([*words, f"{url}/in/t7.csv"]) == 64
    assert "t7.csv does not exist" in capsys.readouterr().err
