"""predict: the same answers as evaluate, from folders and tables; bad rows are listed."""

import csv
import json
import os
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from tests.conftest import S3Server
from tests.fixtures.tiny_dataset import VOCABULARY
from tests.release.conftest import Trained
from vlal_dist import predict
from vlal_dist.data.format.dataset import open_dataset, open_split
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.evaluation.predictions import load_predictions
from vlal_dist.program import run_program
from vlal_dist.release.model import load_model
from vlal_dist.storage.store import open_store

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def crops(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The test split's crops as files of their own, whole photos now, in rows of a table."""
    folder = tmp_path_factory.mktemp("crops")
    dataset = open_dataset(str(trained.dataset), cache=folder / "cache")
    split = open_split(dataset, "test")
    reader, rows = SampleReader(split), []
    for row in range(split.num_samples):
        sample = reader.read(row)
        path = folder / f"{row % 3}" / f"crop {row:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(sample.jpg)
        name = VOCABULARY.objects[sample.object_id]
        rows.append({"image": str(path), "id": f"row {row}", "object": name})
    return rows


def call(trained: Trained, *flags: str) -> int:
    """predict in this process, with this export's model, away from any other configuration."""
    return run_program(predict.PROGRAM, ["--predict.model", str(trained.export), *flags])


def photos_of(crops: list[dict[str, Any]]) -> tuple[str, str]:
    """Flags that name the folder of all crops."""
    return "--predict.images", str(Path(crops[0]["image"]).parents[1])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_whole_photos_get_what_evaluate_gave_them(
    trained: Trained, crops: list[dict[str, Any]], tmp_path: Path
) -> None:
    table = write_csv(tmp_path / "table.csv", crops)
    flags = ("--predict.table", table, "--predict.top_k", "0", "--predict.batch_size", "7")
    flags += photos_of(crops)
    out = tmp_path / "new" / "out.parquet"
    assert call(trained, *flags, "--predict.output", str(out)) == 0
    found = pyarrow.parquet.read_table(out).to_pylist()
    assert [row["id"] for row in found] == [row["id"] for row in crops]
    key = "evaluation/test-model/predictions.safetensors"
    expected = load_predictions(open_store(str(trained.run)), key).score
    ids = VOCABULARY.attribute_ids
    for row, scores in zip(found, expected, strict=True):
        values = {ids[one["name"]]: one["probability"] for one in row["attributes"]}
        assert [values[i] for i in range(len(ids))] == pytest.approx(scores.tolist(), abs=1e-6)
    assert not (tmp_path / "new/out.rejects.jsonl").exists()
    assert json.loads((tmp_path / "new/predict.result.json").read_text())["code"] == 0


def test_every_kind_of_table_and_file_says_the_same(
    trained: Trained, crops: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows = [
        {**row, "box": [8.0, 9.5, 70.0, 60.0] if n % 2 else None} for n, row in enumerate(crops)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    write_csv(tmp_path / "c.csv", [{**row, "box": row["box"] or ""} for row in rows])
    sides = [dict(zip("xywh", row["box"] or [""] * 4, strict=True)) for row in rows]
    plain = [{**row, **side} for row, side in zip(crops, sides, strict=True)]
    write_csv(tmp_path / "d.csv", plain)
    found = []
    for name in ("a.jsonl", "b.parquet", "c.csv", "d.csv"):
        out = tmp_path / f"{name}.jsonl"
        flags = ("--predict.table", str(tmp_path / name), "--predict.output", str(out))
        flags += photos_of(crops)
        assert call(trained, *flags, "--predict.thresholds", "true", "--predict.top_k", "3") == 0
        found.append(lines(out))
    assert found[0] == found[1] == found[2] == found[3]
    first = found[0][1]
    assert first["box"] == [8.0, 9.5, 70.0, 60.0] and first["row"] == 1
    model = load_model(trained.export)
    for row in found[0]:
        box = None if row["box"] is None else tuple(row["box"])
        answer = model(row["image"], row["object"], box=box, top_k=3)
        assert [(a["name"], a["present"]) for a in row["attributes"]] == [
            (a.name, a.present) for a in answer
        ]
        values = [a["probability"] for a in row["attributes"]]
        assert values == pytest.approx([a.probability for a in answer], abs=2e-6)

    flags = ("--predict.table", str(tmp_path / "a.jsonl"), "--predict.thresholds", "true")
    flags += photos_of(crops)
    for suffix in ("csv", "parquet"):
        out = str(tmp_path / f"out.{suffix}")
        assert call(trained, *flags, "--predict.output", out, "--predict.top_k", "3") == 0
    whole = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    flat = list(csv.DictReader((tmp_path / "out.csv").read_text("utf-8").splitlines()))
    assert len(flat) == 3 * len(whole) and flat[3]["x"] == "8.0" and flat[0]["x"] == ""
    for row, expected in zip(whole, found[0], strict=True):
        three, flat = flat[:3], flat[3:]
        for one, text, other in zip(row["attributes"], three, expected["attributes"], strict=True):
            assert one["name"] == text["attribute"] == other["name"]
            assert str(one["present"]).lower() == text["present"] == str(other["present"]).lower()
            assert float(text["probability"]) == other["probability"]
            assert one["probability"] == pytest.approx(other["probability"], rel=1e-5)
        assert {**row, "attributes": 0} == {**expected, "attributes": 0}
        assert [text["rank"] for text in three] == ["1", "2", "3"]


def test_a_folder_and_a_zip_of_it(
    trained: Trained, crops: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = Path(crops[0]["image"]).parents[1]
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for row in crops:
            archive.write(row["image"], Path(row["image"]).relative_to(folder))
        archive.writestr("notes.txt", "no photo")
    found = []
    for place in (folder, tmp_path / "photos.zip"):
        out = tmp_path / f"{place.name}.jsonl"
        flags = ("--predict.images", str(place), "--predict.object", "box")
        assert call(trained, *flags, "--predict.output", str(out)) == 0
        found.append(lines(out))
    assert found[0] == found[1]
    names = [row["image"] for row in found[0]]
    assert names == sorted(names) and len(names) == len(crops) and "/" in names[0]
    assert {row["object"] for row in found[0]} == {"box"}
    assert all("present" not in one for one in found[0][0]["attributes"])
    # Members of a zip are also found by their file name alone.
    table = write_csv(tmp_path / "t.csv", [{"image": Path(n).name, "object": "box"} for n in names])
    flags = ("--predict.table", table, "--predict.images", str(tmp_path / "photos.zip"))
    assert call(trained, *flags, "--predict.output", str(tmp_path / "t.jsonl")) == 0
    answers = [row["attributes"] for row in lines(tmp_path / "t.jsonl")]
    assert answers == [row["attributes"] for row in found[0]]


def test_photos_in_a_tar_and_in_a_table(
    trained: Trained, crops: list[dict[str, Any]], tmp_path: Path
) -> None:
    paths = [Path(row["image"]) for row in crops]
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        for path in paths:
            tar.add(path, path.name)
        tar.add(write_csv(tmp_path / "t.csv", [{"image": path.name} for path in paths]), "t.csv")
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pa.parquet.write_table(pa.table({"image": pa.array(rows, kind)}), tmp_path / "one.parquet")
    out, found = tmp_path / "o.jsonl", []
    for place in ("one.tar", "one.parquet", "*.tar"):
        flags = ("--predict.images", str(tmp_path / place), "--predict.object", "ball")
        flags += ("--predict.output", str(out))
        assert call(trained, *flags) == 0
        found.append(lines(out))
        assert [row["image"] for row in found[-1]] == sorted(f"one/{path.name}" for path in paths)
        assert call(trained, *flags, "--predict.table", str(tmp_path / "t.csv")) == 0
        by_name = {row["image"]: row["attributes"] for row in lines(out)}
        assert all(by_name[row["image"][4:]] == row["attributes"] for row in found[-1])
    assert found[0] == found[1] == found[2]


def test_photos_in_a_bucket(
    trained: Trained, crops: list[dict[str, Any]], tmp_path: Path, moto_s3: S3Server
) -> None:
    url = moto_s3.url()
    store = open_store(url)
    store.create("a/one.jpg", Path(crops[0]["image"]).read_bytes())
    store.create("bare", Path(crops[1]["image"]).read_bytes())
    store.create("two.txt", b"no photo")
    store.create(".hidden.jpg", b"no photo")
    out = tmp_path / "o.jsonl"
    flags = ("--predict.images", url, "--predict.object", "ball", "--predict.output", str(out))
    assert call(trained, *flags) == 0
    assert [row["image"] for row in lines(out)] == ["a/one.jpg", "bare"]
    counts = json.loads((tmp_path / "predict.result.json").read_text())["counts"]
    assert counts["left_out"] == {"hidden": 1, "not a photo": 1} and counts["rejected"] == 0
    table = write_csv(tmp_path / "t.csv", [{"image": n} for n in ("a/one", "b.jpg", "../c")])
    assert call(trained, *flags, "--predict.table", table) == 0
    reasons = [row["reason"] for row in lines(tmp_path / "o.rejects.jsonl")]
    assert len(lines(out)) == 1 and reasons == ["missing", "outside"]


def test_bad_rows_are_listed_and_the_others_answered_in_order(
    trained: Trained, crops: list[dict[str, Any]], tmp_path: Path
) -> None:
    good, jpg = "good.jpg", Path(crops[0]["image"]).read_bytes()
    (tmp_path / good).write_bytes(jpg)
    (tmp_path / "text.jpg").write_text("not an image at all")
    (tmp_path / "cut.jpg").write_bytes(jpg[: len(jpg) // 2])
    Image.new("RGB", (400, 400)).save(tmp_path / "large.png")
    records: list[Any] = [
        {"image": good, "object": "ball"},
        {"image": good, "object": "bal"},
        {"image": good},
        {"object": "ball"},
        {"image": "none.jpg", "object": "ball"},
        {"image": "text.jpg", "object": "ball"},
        {"image": "cut.jpg", "object": "ball"},
        {"image": "large.png", "object": "ball"},
        {"image": good, "object": "ball", "box": [500, 0, 9, 9]},
        {"image": good, "object": "ball", "box": [0, 0, 0.5, 9]},
        {"image": good, "object": "ball", "box": [1, 2, 3]},
        {"image": good, "object": "ball", "box": "wide"},
        {"image": good, "object": "ball", "x": 1, "y": 2, "w": 3},
        {"image": 7, "object": 8},
        [1],
        {"image": good, "object": "box", "id": 5},
    ]
    text = "".join(json.dumps(record) + "\n" for record in records) + "{broken\n"
    (tmp_path / "table.jsonl").write_text(text)
    out = tmp_path / "o.jsonl"
    flags = ["--predict.table", str(tmp_path / "table.jsonl"), "--predict.output", str(out)]
    flags += ["--predict.max_pixels", "100000", "--predict.batch_size", "1"]
    assert call(trained, *flags) == 0
    assert [(row["row"], row["id"]) for row in lines(out)] == [(0, "0"), (15, "5")]
    rejects = lines(tmp_path / "o.rejects.jsonl")
    assert [row["row"] for row in rejects] == [*range(1, 15), 16]
    assert [row["reason"] for row in rejects] == [
        *("unknown object", "no object", "no image", "missing", "not an image"),
        *("truncated or damaged", "too large", "box outside", "zero size"),
        *("bad box", "bad box", "bad box", "unknown object", "not JSON", "not JSON"),
    ]
    assert "'ball'" in rejects[0]["detail"] and rejects[0]["object"] == "bal"
    result = json.loads((tmp_path / "predict.result.json").read_text())
    assert result["counts"]["objects"] == 2 and result["counts"]["rejected"] == 15


def test_a_folder_s_files_are_photos_by_content_and_what_is_left_out_is_counted(
    trained: Trained,
    crops: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    jpg, root = Path(crops[0]["image"]).read_bytes(), tmp_path / "photos"
    (root / "linked").mkdir(parents=True)
    (root / "linked").rmdir()
    (tmp_path / "elsewhere").mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    Image.open(crops[0]["image"]).save(root / "moving.gif")
    for path in (
        root / "A.JFIF",
        root / "bare",
        root / "text.dat",
        root.parent / "elsewhere/b.JPG",
    ):
        path.write_bytes(jpg)
    with open(os.fsencode(root) + b"/\xe9.jpg", "wb") as file:
        file.write(jpg)
    (root / "notes.txt").write_text("no photo")
    (root / ".hidden.jpg").write_bytes(jpg)
    os.mkfifo(root / "pipe.jpg")
    (root / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    (root / "evil.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    flags = ("--predict.images", str(root), "--predict.object", "ball")
    expected = ["A.JFIF", "bare", "linked/b.JPG", "moving.gif", "text.dat", "\\udce9.jpg"]
    for name in ("o.jsonl", "o.parquet", "o.CSV"):
        out = tmp_path / name
        assert call(trained, *flags, "--predict.output", str(out), "--predict.top_k", "1") == 0
        assert "objects 6, rejected 2" in (closing := capsys.readouterr().out)
        for part in ("not a photo 1", "hidden 1", "special file 1", "folder that is listed 1"):
            assert part in closing
        rejects = lines(tmp_path / "o.rejects.jsonl")
        assert [row["image"] for row in rejects] == ["evil.jpg", "phone.HEIC"]
    assert [row["image"] for row in lines(tmp_path / "o.jsonl")] == expected
    assert pyarrow.parquet.read_table(tmp_path / "o.parquet")["image"].to_pylist() == expected
    rows = csv.DictReader((tmp_path / "o.CSV").read_text("utf-8").splitlines())
    assert [row["image"] for row in rows] == expected

    assert call(trained, *flags[2:], "--predict.images", str(root / "bare"), "--predict.output",
                str(tmp_path / "one.jsonl")) == 0  # fmt: skip
    assert [row["image"] for row in lines(tmp_path / "one.jsonl")] == ["bare"]


def test_a_table_reads_nothing_outside_of_the_named_folder(
    trained: Trained, crops: list[dict[str, Any]], tmp_path: Path
) -> None:
    jpg, root = Path(crops[0]["image"]).read_bytes(), tmp_path / "photos"
    root.mkdir()
    for path in (root / "ok.jpg", tmp_path / "secret.jpg"):
        path.write_bytes(jpg)
    os.mkfifo(root / "pipe.jpg")
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    names = ["ok", str(root / "ok.jpg"), "/dev/zero", "/dev/stdin", "../secret.jpg"]
    names += [str(tmp_path / "secret.jpg"), "pipe.jpg", "link.jpg"]
    rows = [{"image": name, "object": "ball"} for name in names]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "o.jsonl"
    flags = ("--predict.images", str(root), "--predict.table", str(tmp_path / "t.jsonl"))
    assert call(trained, *flags, "--predict.output", str(out)) == 0
    assert [row["row"] for row in lines(out)] == [0, 1]
    rejects = lines(tmp_path / "o.rejects.jsonl")
    assert [row["reason"] for row in rejects] == [*["outside"] * 4, "not a file", "outside"]
    assert "predict.follow_links: true" in rejects[-1]["detail"]
    assert call(trained, *flags, "--predict.output", str(out), "--predict.follow_links", "1") == 0
    assert [row["row"] for row in lines(out)] == [0, 1, 7]
    flags = ("--predict.images", str(tmp_path), "--predict.table", str(tmp_path / "t.jsonl"))
    assert call(trained, *flags, "--predict.output", str(out), "--predict.max_bytes", "100") == 65
    assert {"too large", "missing", "outside"} == {
        row["reason"] for row in lines(tmp_path / "o.rejects.jsonl")
    }


def test_cells_that_are_no_text_cost_no_other_row(
    trained: Trained, crops: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "a b.jpg").write_bytes(Path(crops[0]["image"]).read_bytes())
    good = {"image": "a b.jpg", "object": "ball"}
    rows = [{**good, key: "x\ud83d"} for key in ("image", "object", "id", "box")]
    rows += [good, {**good, "id": "\ud83d\ude00"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.csv").write_bytes(
        b"image,object,id\n\xff,ball,0\na b.jpg,b\xff,1\na b.jpg,ball,\xff\na b.jpg,ball,3\n"
    )
    for table, answered, rejected in (
        ("a.jsonl", [("4", 4), ("\U0001f600", 5)], ["not text"] * 3 + ["bad box"]),
        ("b.csv", [("3", 3)], ["not text"] * 3),
    ):
        for suffix in ("jsonl", "parquet", "csv"):
            out = tmp_path / f"o.{suffix}"
            flags = ("--predict.table", str(tmp_path / table), "--predict.output", str(out))
            assert call(trained, *flags, "--predict.top_k", "1") == 0
            rejects = lines(tmp_path / "o.rejects.jsonl")
            assert [row["reason"] for row in rejects] == rejected
            assert "\\ud" in rejects[0]["detail"]
        assert [(row["id"], row["row"]) for row in lines(tmp_path / "o.jsonl")] == answered
    assert call(trained, "--predict.table", str(tmp_path / "b.csv"), "--predict.object", "\udce9",
                "--predict.output", str(tmp_path / "o.jsonl")) == 64  # fmt: skip


def test_a_column_is_left_out_as_the_message_says(
    trained: Trained,
    crops: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a.jpg").write_bytes(Path(crops[0]["image"]).read_bytes())
    flags = ["--predict.table", str(tmp_path / "t.csv"), "--predict.output"]
    flags.append(str(tmp_path / "o.jsonl"))
    for column in ("", "Unnamed: 0", "caption"):
        (tmp_path / "t.csv").write_text(f"{column},image,object\n0,a.jpg,ball\n")
        assert call(trained, *flags) == 65
        remedy = capsys.readouterr().err.partition("leave it out: ")[2]
        assert call(trained, *flags, *shlex.split(remedy)) == 0


def test_a_spreadsheet_runs_no_cell(
    trained: Trained, crops: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "+1.jpg").write_bytes(Path(crops[0]["image"]).read_bytes())
    ids = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "plain", "a=1", "'=1"]
    rows = [{"image": "+1.jpg", "object": "ball", "id": one, "box": [-1, 0, 9, 9]} for one in ids]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "o.csv"
    flags = ("--predict.table", str(tmp_path / "t.jsonl"), "--predict.top_k", "1")
    assert call(trained, *flags, "--predict.output", str(out)) == 0
    with out.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["id"] for row in found] == [f"'{one}" for one in ids[:6]] + ids[6:]
    assert {row["image"] for row in found} == {"'+1.jpg"} and found[0]["x"] == "-1.0"
    assert call(trained, *flags, "--predict.output", str(tmp_path / "o.jsonl")) == 0
    assert [row["id"] for row in lines(tmp_path / "o.jsonl")] == ids


def test_only_bad_rows_are_an_error_and_leave_no_answers(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_text("nothing")
    out = tmp_path / "o.jsonl"
    out.write_text("of an earlier run\n")
    flags = ("--predict.images", str(tmp_path), "--predict.object", "ball")
    assert call(trained, *flags, "--predict.output", str(out)) == 65
    assert "not an image 1; " in capsys.readouterr().err
    assert not out.exists() and len(lines(tmp_path / "o.rejects.jsonl")) == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    (tmp_path / "bad.png").unlink()
    assert call(trained, *flags, "--predict.output", str(out)) == 65
    error = capsys.readouterr().err
    assert "no rows and no photos; left out: " in error and "not a photo 2" in error
    assert call(trained, *flags[2:], "--predict.table", write_csv(tmp_path / "t.csv", [
        {"image": "none.jpg"}]), "--predict.output", str(out)) == 65  # fmt: skip
    assert "the first: row 0: missing: no such photo in" in capsys.readouterr().err


def test_a_photo_is_turned_as_its_exif_says(trained: Trained, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (70, 100, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png")
    image.rotate(90, expand=True).save(tmp_path / "b.png", exif=exif)
    out = tmp_path / "o.jsonl"
    flags = ("--predict.images", str(tmp_path), "--predict.object", "ball")
    assert call(trained, *flags, "--predict.output", str(out)) == 0
    first, second = (row["attributes"] for row in lines(out))
    assert first == second


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ((), 64, "predict.images and predict.table are absent"),
        (("--predict.images", "."), 64, "predict.object is absent"),
        (("--predict.images", "nowhere", "--predict.object", "ball"), 64, "no such folder"),
        (("--predict.images", "t.csv", "--predict.object", "ball"), 64, "predict.table"),
        (("--predict.images", ".", "--predict.object", "bll"), 64, "'ball'"),
        (("--predict.table", "none.csv"), 64, "no such file"),
        (("--predict.table", "t.txt"), 64, ".ndjson, .parquet, .arrow are read"),
        (("--predict.table", "t.csv"), 65, "has the columns id, object"),
        (("--predict.table", "bad.parquet"), 65, "is not Parquet"),
        (("--predict.table", "latin.csv"), 65, "not CSV in UTF-8"),
        (("--predict.table", "utf16.csv"), 65, "is UTF-16; save it as CSV in UTF-8"),
        (("--predict.table", "ok.csv", "--predict.output", "o.txt"), 64, "are written"),
        (("--predict.model", "none"), 74, "run vlal export"),
        (("--predict.topk", "3"), 64, "predict.top_k"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("id,object\na,ball\n")
    for name in ("ok.csv", "t.txt"):
        (tmp_path / name).write_text("image\n")
    (tmp_path / "utf16.csv").write_text("image\na\n", encoding="utf-16")
    (tmp_path / "bad.parquet").write_text("PAR1")
    (tmp_path / "latin.csv").write_bytes("image,größe\na,b\n".encode("latin-1"))
    assert call(trained, *flags) == code
    assert message in capsys.readouterr().err


def test_thresholds_that_the_model_lacks_are_refused(
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store(str(tmp_path))
    for path in trained.export.iterdir():
        store.replace(path.name, path.read_bytes())
    values = json.loads(store.read("config.json"))
    del values["files"]["thresholds.json"]
    store.replace("config.json", json.dumps(values).encode())
    flags = ("--predict.model", str(tmp_path), "--predict.images", str(tmp_path))
    assert call(trained, *flags, "--predict.thresholds", "true") == 64
    assert "export again" in capsys.readouterr().err


def test_it_runs_anywhere_without_a_configuration(
    trained: Trained, crops: list[dict[str, Any]], tmp_path: Path
) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "VLAL_CONFIG"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "vlal_dist.predict", "--predict.model", str(trained.export)]
    command += ["--predict.images", str(Path(crops[0]["image"]).parent), "--predict.object", "box"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "predict: done: objects 12" in done.stdout
    assert len(lines(tmp_path / "runs" / "predictions.jsonl")) == 12


def test_help_lists_every_knob(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(predict.PROGRAM, ["--help"]) == 0
    text = capsys.readouterr().out
    for key in ("model", "images", "table", "object", "output", "top_k", "thresholds"):
        assert f"--predict.{key}" in text


def test_an_interrupted_run_leaves_nothing_under_the_outputs_name(
    trained: Trained, crops: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o.parquet"

    def interrupted(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "predict_requests", interrupted)
    flags = ("--predict.table", write_csv(tmp_path / "t.csv", crops))
    assert call(trained, *flags, "--predict.output", str(out)) == 75
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv"]
