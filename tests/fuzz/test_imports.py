"""Mutilated annotations in other formats: a message with file and place, never a traceback.

Each format's valid files are changed by seeds: bytes of any file, and nodes of a JSON tree (other
types, dropped keys, repeated entries, NaN, a hundred thousand brackets).
"""

import json
import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from shard_tools.importers.program import main
from tests.fuzz.mutations import mutate_bytes, mutate_json, obeys
from tests.shard_tools.importers import test_coco, test_cub, test_openimages

SEEDS = 100
KINDS_OF_BYTES = ("flip", "set", "word", "cut", "delete", "insert", "double", "swap")
KINDS_OF_TREE = ("put", "put", "put", "drop", "rename", "swap", "wrap", "double", "longer")

STYLES = {
    "names": [{"attributes": ["red", "wet"]}, {"attributes": {"red": True, "wet": 0}}],
    "ids": [{"attribute_ids": [0, 2], "unknown_color": 0}, {"attribute_ids": []}],
    "vector": [{"att_vec": [1, 0, -1]}, {"att_vec": [-1, -1, 1]}],
}


def write_coco(folder: Path, style: str) -> list[Path]:
    document = {
        "images": test_coco.IMAGES,
        "categories": test_coco.CATEGORIES,
        "attributes": test_coco.OVAD,
        "attr_type_to_attr_idxs": {"color": [0, 1]},
        "annotations": [
            test_coco.annotation(number, **STYLES[style][number % 2]) for number in range(4)
        ],
    }
    path = folder / "annotations.json"
    path.write_text(json.dumps(document))
    return [path]


def write_openimages(folder: Path) -> list[Path]:
    for name, text in test_openimages.ALL.items():
        (folder / name).write_text(text)
    (folder / "photos").mkdir()
    test_openimages.write_photos(folder / "photos")
    return [folder / name for name in test_openimages.ALL]


def write_cub(folder: Path) -> list[Path]:
    for name, text in test_cub.FILES.items():
        path = folder / "CUB_200_2011" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return sorted(path for path in folder.rglob("*.txt") if path.name != "certainties.txt")


def arguments(word: str, folder: Path, files: list[Path]) -> list[str]:
    inputs = [str(folder)] if word == "cub" else [str(path) for path in files]
    words = [word, "--importing.inputs", json.dumps(inputs)]
    return [*words, "--importing.photos", str(folder / "photos")] if word == "openimages" else words


def mutilate(path: Path, rng: random.Random) -> None:
    """Change one to three places of a file; JSON by its tree as often as by its bytes."""
    data = path.read_bytes()
    tree = path.suffix == ".json" and rng.random() < 0.5
    kinds = KINDS_OF_TREE if tree else KINDS_OF_BYTES
    ops = [
        (rng.choice(kinds), rng.randrange(2**32), rng.randrange(2**32))
        for _ in range(rng.randint(1, 3))
    ]
    path.write_bytes(mutate_json(data, ops) if tree else mutate_bytes(data, ops))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["coco names", "coco ids", "coco vector", "openimages", "cub"])
def test_mutilated_files(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    word, _, style = case.partition(" ")
    whole = tmp_path / "whole"
    whole.mkdir()
    write = {"openimages": write_openimages, "cub": write_cub}
    files = write_coco(whole, style) if word == "coco" else write[word](whole)
    codes = {0: 0, 64: 0, 65: 0}
    for seed in range(SEEDS):
        folder = tmp_path / str(seed)
        shutil.copytree(whole, folder)
        here = [folder / path.relative_to(whole) for path in files]
        rng = random.Random(seed)
        changed = rng.choice(here)
        mutilate(changed, rng)
        root = folder / "root"
        words = [*arguments(word, folder, here), "--paths.root", str(root)]
        code = obeys(lambda words=words: main(words))
        error = capsys.readouterr().err
        assert code in codes, (seed, code, error)
        assert "Traceback" not in error, (seed, error)
        codes[code] += 1
        if code:
            names = {path.name for path in here} | {folder.name}
            assert any(name in error for name in names), (seed, error)
            assert "importing." in error or "no usable record" in error, (seed, error)
        else:
            rejects = pq.read_table(root / "imported" / "rejects.parquet").to_pylist()
            assert all(one["file"] and one["reason"] and one["detail"] for one in rejects), seed
        shutil.rmtree(folder)
    assert codes[0] and codes[65], codes
