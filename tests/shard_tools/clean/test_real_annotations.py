"""Real annotations cleaned end to end: Visual Genome's raw names, and a product catalogue."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from shard_tools.__main__ import main
from shard_tools.clean.hide import HIDDEN
from vlal_dist.config.load import load_config
from vlal_dist.vocabulary import Vocabulary

DATA = Path(__file__).parents[4] / "shared" / "data"
SAMPLE = DATA / "visual_genome_sample" / "vg100.json"
FASHION = DATA / "fashion12k"
CONFIG = Path(__file__).parents[3] / "configs" / "fashion12k.yaml"
SPARSE = CONFIG.with_name("fashion12k_sparse.yaml")


@pytest.mark.skipif(not SAMPLE.is_file(), reason="the Visual Genome sample is absent")
@pytest.mark.skipif(
    not Path("/usr/share/wordnet/index.noun").is_file(),
    reason="WordNet 3.0 (Debian: wordnet-base) is absent",
)
def test_visual_genome_sample(tmp_path: Path) -> None:
    rules = {"min_side": 50, "require_positive": True, "merge": "wordnet"}
    config = {"clean": {"annotations": {"train": [str(SAMPLE)]}, **rules}}
    path, out = tmp_path / "config.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(config))
    assert main(["clean", "--config", str(path), "--paths.instances", str(out)]) == 0

    records = json.loads(SAMPLE.read_text(encoding="utf-8"))
    large = [r for r in records if min(r["instance_bbox"][2:]) >= 50]
    values = json.loads((out / "vocabulary.json").read_text())
    counts, merges = values["counts"], values["merges"]
    assert counts["read"]["instances"] == len(records) == 3671
    assert counts["min_side"]["instances"] == len(large)
    assert counts["merge"]["objects"] < counts["min_side"]["objects"]
    assert {merges[name] for name in ("cars", "trees", "windows")} == {"car", "tree", "window"}

    rows = pq.read_table(out / "train.parquet").to_pylist()
    kept = [r for r in large if r["positive_attributes"]]
    assert [row["instance_id"] for row in rows] == [r["instance_id"] for r in kept]
    vocabulary = Vocabulary.from_json(values)
    for row, given in zip(rows, kept, strict=True):
        name = given["object_name"]
        assert vocabulary.objects[row["object_id"]] == merges.get(name, name)
        names = {vocabulary.attributes[i] for i in row["positive"]}
        assert names == set(given["positive_attributes"])
        assert row["box"] == given["instance_bbox"]
    assert pq.read_table(out / "rejects.parquet").num_rows == 0


@pytest.mark.skipif(not FASHION.is_dir(), reason="fashion12k is absent")
def test_fashion12k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASHION12K", str(FASHION))
    counts_path = tmp_path / "counts.json"
    argv = ["clean", "--config", str(CONFIG), "--json", str(counts_path)]
    assert main([*argv, "--paths.instances", str(tmp_path / "one")]) == 0
    counts = json.loads(counts_path.read_text())
    assert (counts["instances"], counts["objects"], counts["attributes"]) == (12_000, 92, 248)
    assert counts["splits"] == {"train": 8390, "val": 1198, "test": 2412}
    assert (counts["rejected"], counts["expected"]) == (0, "met")

    index = json.loads((FASHION / "attribute_index.json").read_text(encoding="utf-8"))
    types = json.loads((FASHION / "attribute_types.json").read_text(encoding="utf-8"))
    vocabulary = Vocabulary.from_json(json.loads((tmp_path / "one/vocabulary.json").read_text()))
    assert set(vocabulary.attributes) == set(index)
    for name, kind in zip(vocabulary.attributes, vocabulary.attribute_type, strict=True):
        assert name in types[kind]
    groups = vocabulary.groups()
    assert [len(groups[name]) for name in ("head", "medium", "tail")] == [117, 99, 32]

    assert main([*argv, "--paths.instances", str(tmp_path / "two")]) == 0
    for path in (tmp_path / "one").iterdir():
        if not path.name.startswith(("clean.result", "clean.config")):
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.skipif(not FASHION.is_dir(), reason="fashion12k is absent")
def test_fashion12k_sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASHION12K", str(FASHION))
    counts_path = tmp_path / "counts.json"
    argv = ["clean", "--config", str(SPARSE), "--json", str(counts_path)]
    assert main([*argv, "--paths.instances", str(tmp_path)]) == 0
    counts = json.loads(counts_path.read_text())
    assert counts["expected"] == "met"
    assert abs(counts["kept_positives"] / 8390 - 1.8) < 0.05
    assert abs(counts["kept_negatives"] / 8390 - 1.2) < 0.05
    vocabulary = Vocabulary.from_json(json.loads((tmp_path / "vocabulary.json").read_text()))
    for split in ("train", "val", "test"):
        given = json.loads((FASHION / f"{split}.json").read_text(encoding="utf-8"))
        rows = pq.read_table(tmp_path / f"{split}.parquet").to_pylist()
        hidden = pq.read_table(tmp_path / HIDDEN).to_pylist() if split == "train" else []
        for polarity in ("positive", "negative"):
            found = [set(row[polarity]) for row in rows]
            for one, other in zip(found, hidden, strict=False):
                assert one.isdisjoint(other[polarity])
                one.update(other[polarity])
            names = [{vocabulary.attributes[i] for i in one} for one in found]
            assert names == [set(record[f"{polarity}_attributes"]) for record in given]


def test_the_sparse_config_is_the_whole_one_but_for_roots_and_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASHION12K", "unused")
    whole, sparse = (load_config(str(path), {}).model_dump() for path in (CONFIG, SPARSE))
    assert sparse["paths"] == {
        name: value.replace("runs/fashion12k", "runs/fashion12k_sparse")
        for name, value in whole["paths"].items()
    }
    assert (sparse["clean"].pop("hide"), whole["clean"].pop("hide")) == ("vaw_density", "none")
    expected = sparse["clean"].pop("expected")
    assert expected | whole["clean"].pop("expected") == expected
    # How often and where a table is run decides nothing of a run.
    for section in ("paths", "experiments"):
        del whole[section], sparse[section]
    assert sparse == whole
