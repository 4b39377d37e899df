"""What train and evaluate left, as report, `vlal run` and a resumed run read it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.test_programs import write_run
from tests.fuzz.files import build, make_members, seal, write
from tests.fuzz.mutations import byte_ops, explore, mutate_bytes, mutate_json, obeys, pick, tree_ops
from vlal_dist.config.load import load_config
from vlal_dist.evaluate import work as evaluate
from vlal_dist.observability.metrics_log import lines_until
from vlal_dist.pipeline import read_json
from vlal_dist.reporting.page import build_page, render_page
from vlal_dist.storage.store import open_store

FOLDER = "run/evaluation/test-model"
READ = (f"{FOLDER}/result.json", f"{FOLDER}/predictions.safetensors", "run/metrics.jsonl",
        f"{FOLDER}/attributes.parquet", "run/config.yaml", "run/train.result.json",
        "run/starts.jsonl")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluated run on the tiny dataset."""
    root = tmp_path_factory.mktemp("run")
    files = build(make_members())
    write(root / "dataset", files | {"dataset.json": seal(files)})
    write_run(str(root / "run"))
    start = {"device": "cpu", "ranks": 1, "threads": 1, "cores": 2, "version": "1", "step": 0}
    (root / "run/starts.jsonl").write_text(json.dumps(start) + "\n")
    result = {"code": 0, "reason": "done", "counts": {"seconds": 3.5}}
    (root / "run/train.result.json").write_text(json.dumps(result))
    evaluate(config_of(root), {})
    return root


def config_of(root: Path) -> Any:
    values = {
        "paths.root": str(root), "paths.cache": str(root / "cache"), "evaluation.top_k": "3",
        "evaluation.examples": "1", "evaluation.curves": "1", "evaluation.example_attributes": "2",
    }  # fmt: skip
    return load_config(None, values)


def read_all(root: Path) -> None:
    """The page, and what other programs read of the run."""
    config, store = config_of(root), open_store(str(root / "run"))
    page = build_page(config.evaluation, config.paths, seed=1)
    assert len(render_page(page)) > 0
    lines_until(store, "metrics.jsonl", step=10**9)
    assert isinstance(read_json(store.url, "train.result.json"), dict)


def test_report(folder: Path, times: int) -> None:
    files = {key: (folder / key).read_bytes() for key in READ}
    read_all(folder)

    def check(key: str, tree: Any, ops: Any) -> None:
        old = files[key]
        as_tree = key.endswith(".json") and len(ops) > 1
        if key.endswith(".jsonl"):
            lines = old.splitlines()
            at = ops[0][1] % len(lines)
            lines[at] = mutate_json(lines[at], tree)
            data = b"\n".join(lines)
        else:
            data = mutate_json(old, tree) if as_tree else mutate_bytes(old, ops)
        (folder / key).write_bytes(data)
        try:
            obeys(lambda: read_all(folder))
        finally:
            (folder / key).write_bytes(old)

    explore("run, report", check, pick(READ), tree_ops, byte_ops, examples=40, times=times)
