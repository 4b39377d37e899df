"""Ranks whose copies of the data, or settings, differ: refused at the start, on every rank."""

import json
from pathlib import Path

import pytest
import yaml

from tests.fixtures.rank_processes import run_ranks
from tests.fixtures.scored_dataset import copy_merged
from vlal_dist.storage.checks import sha256_of

QUICK = (
    *("--training.epochs", "1", "--training.max_steps", "1", "--training.batch_size", "4"),
    *("--model.depth", "18", "--model.width", "4", "--data.image_size", "64"),
    *("--observability.metrics", "false", "--observability.trackers", "[]"),
)


def train_two(folder: Path, roots: list[Path], *arguments: str) -> tuple[list[int], list[str]]:
    """Exit codes and log lines of two ranks, each with the configuration in its own root."""
    folder.mkdir()
    for rank, root in enumerate(roots):
        config = yaml.safe_load((root / "config.yaml").read_text())
        config["paths"] |= {"run": str(folder / "run"), "merged": str(root / "merged")}
        (folder / f"{rank}.yaml").write_text(yaml.safe_dump(config))
    run_ranks("tests.training.agreement_worker", str(folder), *QUICK, *arguments, world_size=2)
    said = [(folder / f"{rank}.txt").read_text() for rank in (0, 1)]
    return [int((folder / f"{rank}.code").read_text()) for rank in (0, 1)], said


def with_other_bytes(root: Path) -> str:
    """Change a copy without changing a sample; returns its digest."""
    manifest = root / "merged" / "dataset.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()), indent=3))
    return sha256_of(manifest)


@pytest.mark.deepspeed
def test_copies_that_differ_are_refused_with_both_digests(small: Path, tmp_path: Path) -> None:
    copy = copy_merged(small, tmp_path / "copy")
    one, two = sha256_of(small / "merged/dataset.json"), with_other_bytes(copy)
    codes, said = train_two(tmp_path / "job", [small, copy])
    assert codes == [65, 65]
    for text in said:
        assert f'dataset digest: rank 0 has "{one}"; rank 1 has "{two}"' in text
        assert "Give every machine the same copy" in text
    assert not (tmp_path / "job" / "run" / "config.yaml").exists()


@pytest.mark.slow
@pytest.mark.deepspeed
def test_a_cut_copy_and_other_settings_are_refused_and_equal_copies_train(
    small: Path, tmp_path: Path
) -> None:
    copy = copy_merged(small, tmp_path / "copy")
    config = copy / "config.yaml"
    before = config.read_text()
    shard = sorted((copy / "merged" / "train").rglob("*.tar"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    codes, said = train_two(tmp_path / "cut", [small, copy])
    assert codes == [65, 65] and f"{len(data)} are expected" in "".join(said)
    shard.write_bytes(data)
    codes, said = train_two(tmp_path / "equal", [small, copy])
    assert codes == [0, 0], said
    config.write_text(before + "\nmethod: {num_ignore: 3}\n")
    codes, said = train_two(tmp_path / "settings", [small, copy])
    assert codes == [65, 65]
    assert "method.num_ignore: rank 0 has 30; rank 1 has 3." in said[1], said[1]
