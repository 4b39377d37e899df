"""Photos and prediction tables: used, or rejected with a reason."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from tests.fuzz.mutations import byte_ops, explore, mutate_bytes, mutate_json, obeys, pick, tree_ops
from vlal_dist.data.format.images import open_photo, photo_format
from vlal_dist.data.format.jpeg import decode_jpeg
from vlal_dist.errors import DataError
from vlal_dist.release.tables import read_table

PIXELS = 100_000


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


_RGB = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8))
_EXIF = Image.Exif()
_EXIF[0x0112] = 6  # orientation
PHOTOS = {
    "JPEG": _saved(_RGB, "JPEG"),
    "progressive": _saved(_RGB, "JPEG", progressive=True),
    "CMYK": _saved(_RGB.convert("CMYK"), "JPEG"),
    "PNG": _saved(_RGB, "PNG"),
    "palette": _saved(_RGB.convert("P"), "PNG", transparency=3),
    "gray 16": _saved(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)), "PNG"),
    "WEBP": _saved(_RGB, "WEBP"),
    "BMP": _saved(_RGB, "BMP"),
    "GIF": _saved(_RGB, "GIF"),
    "TIFF": _saved(_RGB, "TIFF"),
    "EXIF": _saved(_RGB, "JPEG", exif=_EXIF),
}  # fmt: skip


def test_photos(times: int) -> None:
    def check(name: str, ops: Any) -> None:
        data = mutate_bytes(PHOTOS[name], ops)
        photo_format(data[:64])
        image = obeys(lambda: open_photo(data, max_pixels=PIXELS))
        if image is not None:
            assert image.mode == "RGB" and 0 < image.width * image.height <= PIXELS
            np.asarray(image)
        pixels = obeys(lambda: decode_jpeg(data))
        assert pixels is None or (pixels.dtype == np.uint8 and pixels.shape[2] == 3)

    explore("photos", check, pick(list(PHOTOS)), byte_ops, examples=400, times=times)


RECORDS = [
    {"image": "a.jpg", "object": "ball", "id": "1", "box": [1, 2, 30, 40]},
    {"image": "b/ö.png", "object": "car", "id": "2", "box": None},
    {"image": "c.jpg", "object": "ball", "id": "3", "box": [0.5, 0, 1e3, 7]},
]


def _tables() -> dict[str, bytes]:
    sink = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(RECORDS), sink)
    lines = ["image,object,x,y,w,h", "a.jpg,ball,1,2,3,4", '"b, c.jpg",car,0,0,9,9', ""]
    return {
        "t.jsonl": b"".join(json.dumps(one).encode() + b"\n" for one in RECORDS),
        "t.csv": "\r\n".join(lines).encode(),
        "t.parquet": sink.getvalue(),
    }


def test_tables(tmp_path: Path, times: int) -> None:
    tables = _tables()

    def check(name: str, tree: Any, ops: Any) -> None:
        data = tables[name]
        if name == "t.jsonl" and ops[0][1] % 2:
            lines = data.splitlines()
            lines[ops[0][2] % 3] = mutate_json(lines[ops[0][2] % 3], tree)
            data = b"\n".join(lines)
        else:
            data = mutate_bytes(data, ops)
        path = tmp_path / name
        path.write_bytes(data)

        def use() -> None:
            rows, _ = read_table(path, [])
            for number, row in rows:
                assert number >= 0
                assert isinstance(row, DataError | dict) or hasattr(row, "get")

        obeys(use)

    drawn = pick(list(tables)), tree_ops, byte_ops
    explore("prediction tables", check, *drawn, examples=250, times=times)
