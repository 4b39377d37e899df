"""`inspect --order` against real loaders: the same samples, visits and micro-batches, no image."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.fixtures.tiny_vaw import run, run_all, write_small_vaw
from vlal_dist.config.sections import DataConfig, TrainingConfig
from vlal_dist.data.format.dataset import open_dataset, open_split, read_labels
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.data.loading.batch_builder import BatchBuilder
from vlal_dist.data.loading.loader import TrainLoader
from vlal_dist.data.loading.shard_reader import ShardReader
from vlal_dist.data.order.epoch_plan import EpochPlan
from vlal_dist.data.order.mixture import Mixture, open_mixture

Seen = list[tuple[int, int, int, str, int]]
"""Step, rank, micro-batch, uid and visit of each sample."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`config.yaml` names `merged` and `other`, which have no shards; whole ones are `whole-*`."""
    folder = tmp_path_factory.mktemp("order")
    path = write_small_vaw(folder, images={"train": 24, "val": 2})
    config = yaml.safe_load(path.read_text())
    for name, width in (("merged", 60_000), ("other", 20_000)):
        config["paths"]["dataset"] = str(folder / f"whole-{name}")
        config["pack"].update(name=name, shard_bytes=width, block_bytes=2_048)
        path.write_text(yaml.safe_dump(config))
        run_all(path, ["clean", "pack"])
        shutil.copytree(folder / f"whole-{name}", folder / name)
        for split in ("train", "val"):
            shutil.rmtree(folder / name / split / "shards")
    config["paths"]["dataset"] = str(folder / "other")
    path.write_text(yaml.safe_dump(config))
    dataset = open_dataset(str(folder / "merged"), cache=folder / "cache")
    keys = read_labels(dataset, "train")["key"].to_pylist()
    (folder / "keys.txt").write_text("\n".join(keys[::2]))
    return folder


def printed(
    folder: Path, what: dict[str, int], capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[str, list[dict[str, str]]]:
    """The first header line, and the lines by the names in the second."""
    capsys.readouterr()
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in what.items()]
    assert run("inspect", folder / "config.yaml", "--order", *flags, *more) == 0
    first, second, *lines = capsys.readouterr().out.splitlines()
    assert lines.pop().startswith("inspect: done:")
    names = second.removeprefix("# ").split("\t")
    return first, [dict(zip(names, line.split("\t"), strict=True)) for line in lines]


def identities(lines: list[dict[str, str]]) -> Seen:
    return [
        (int(one["step"]), int(one["rank"]), int(one["micro_batch"]), one["uid"], int(one["visit"]))
        for one in lines
    ]


def seen_by_loaders(
    mixture: Mixture, what: dict[str, int], *, first: int, training: TrainingConfig, **data: Any
) -> Seen:
    """What real loaders of all ranks give; lanes and micro-batches are those of a first start."""

    def loader(rank: int, world_size: int, **fixed: Any) -> TrainLoader:
        builder = BatchBuilder(
            ShardReader(mixture.corpus),
            mixture.dataset,
            DataConfig(image_size=64, threads=1, prefetch_steps=1, **data),
        )
        plan = EpochPlan(mixture.corpus, seed=99, passes=mixture.passes, factor=mixture.factor)
        return TrainLoader(
            builder,
            plan,
            training,
            rank=rank,
            world_size=world_size,
            **fixed,
        )

    begun = loader(0, first)
    begun.close()
    fixed = {"lanes": begun.lanes, "micro_batches": begun.micro_batches}
    found: Seen = []
    for rank in range(what["ranks"]):
        one = loader(rank, what["ranks"], **fixed)
        start = what["step"] * training.batch_size
        steps = zip(range(what["steps"]), one.epoch(what["epoch"], start), strict=False)
        for number, step in steps:
            for micro_batch, batch in enumerate(step.micro_batches):
                uids = batch.uid.numpy().view(np.uint64).tolist()
                found += [
                    (what["step"] + number, rank, micro_batch, f"{uid:016x}", visit)
                    for uid, visit in zip(uids, batch.visit.tolist(), strict=True)
                ]
        one.close()
    return sorted(found, key=lambda line: line[:2])


CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "a whole epoch": ({"epoch": 0, "step": 0, "steps": 9, "ranks": 1}, {}),
    "three ranks": ({"epoch": 1, "step": 1, "steps": 2, "ranks": 3}, {}),
    "recut": (
        {"epoch": 0, "step": 2, "steps": 2, "ranks": 3, "first_ranks": 4},
        {"lanes": 8, "accumulation": 2},
    ),
    "fewer ranks": (
        {"epoch": 4, "step": 0, "steps": 2, "ranks": 2, "first_ranks": 4},
        {"accumulation": 2},
    ),
    "exact end": ({"epoch": 1, "step": 4, "steps": 3, "ranks": 2}, {"epoch_end": "exact"}),
    "one window": ({"epoch": 0, "step": 0, "steps": 2, "ranks": 2}, {"window_blocks": 1}),
    "mix": (
        {"epoch": 3, "step": 0, "steps": 9, "ranks": 2},
        {"mix": {"merged": 1.0, "other": 0.4}},
    ),
    "repeats": ({"epoch": 2, "step": 1, "steps": 9, "ranks": 4}, {"repeat_threshold": 0.4}),
    "subset": (
        {"epoch": 2, "step": 0, "steps": 2, "ranks": 2},
        {"subset": "keys.txt", "repeat_threshold": 0.2},
    ),
    "score files": ({"epoch": 0, "step": 0, "steps": 2, "ranks": 1}, {"likelihood": "scores"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_printed_order_is_what_loaders_give(
    folder: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    what, data = CASES[case][0], dict(CASES[case][1])
    mix, accumulation = data.pop("mix", {}), data.pop("accumulation", 1)
    subset = str(folder / data.pop("subset")) if "subset" in data else None
    mixture = open_mixture(
        str(folder / ("whole-other" if "likelihood" in data else "whole-merged")),
        DataConfig(
            mix={str(folder / f"whole-{name}"): passes for name, passes in mix.items()},
            subset=subset,
            repeat_threshold=data.get("repeat_threshold", 0.0),
        ),
        cache=folder / "cache",
    )
    named = ("lanes", "epoch_end", "window_blocks")
    expected = seen_by_loaders(
        mixture,
        what,
        first=what.get("first_ranks", what["ranks"]),
        training=TrainingConfig(batch_size=14, accumulation=accumulation),
        **{name: data[name] for name in named if name in data},
    )
    assert len(expected) > 14
    arguments = [f"--data.{name}={value}" for name, value in data.items()]
    arguments += ["--training.batch_size=14", f"--training.accumulation={accumulation}"]
    arguments += [f"--data.mix={json.dumps({str(folder / name): p for name, p in mix.items()})}"]
    arguments += [f"--data.subset={subset}"] if subset else []
    _, lines = printed(folder, what, capsys, *arguments)
    assert identities(lines) == expected
    for rank in range(what["ranks"]):
        _, own = printed(folder, {**what, "rank": rank}, capsys, *arguments)
        assert identities(own) == [line for line in expected if line[1] == rank]


def test_a_line_locates_its_sample(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mix = json.dumps({str(folder / name): 1 for name in ("merged", "other")})
    first, lines = printed(folder, {"steps": 99}, capsys, "--data.mix", mix, "--data.lanes", "4")
    assert first == "# epoch 0, visits 144, lanes 4, micro_batches 1, steps 9"
    assert [int(line["position"]) for line in lines] == list(range(144))
    assert {line["dataset"] for line in lines} == {"merged", "other"}
    for name in ("merged", "other"):
        dataset = open_dataset(str(folder / f"whole-{name}"), cache=folder / "cache")
        split = open_split(dataset, "train")
        reader = SampleReader(split)
        own = [line for line in lines if line["dataset"] == name]
        assert sorted(int(line["row"]) for line in own) == list(range(72))
        for line in own:
            sample = reader.read(int(line["row"]))
            shard = split.shards[int(split.index.shard[sample.row])].name
            assert (line["uid"], line["key"], line["shard"], line["object"]) == (
                f"{sample.uid:016x}",
                sample.key,
                shard,
                dataset.vocabulary.objects[sample.object_id],
            )


def test_counts_go_to_the_json_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "counts.json"
    more = ("--json", str(found), "--data.lanes", "12")
    _, lines = printed(folder, {"step": 3, "steps": 5, "ranks": 3, "rank": 1}, capsys, *more)
    counts = json.loads(found.read_text())
    seconds, warnings = counts.pop("seconds"), counts.pop("warnings")
    assert (
        seconds >= 0
        and warnings == []
        and counts
        == {
            "epoch": 0,
            "visits": 72,
            "lanes": 12,
            "micro_batches": 3,
            "steps": 4,
            "printed": len(lines),
        }
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epoch=", "--epoch '': give a whole number, 0 or larger"),
        ("--epoch=-1", "--epoch '-1': give a whole number, 0 or larger"),
        ("--steps=two", "--steps 'two': give a whole number, 1 or larger"),
        ("--epoch=9999999999", "give a whole number"),
        ("--lanes=4", "unknown flag --lanes"),
        ("--steps=0", "1 or larger"),
        ("--ranks=0", "1 or larger"),
        ("--rank=1", "--rank 1: ranks are counted from 0 and --ranks is 1"),
        ("--step=4", "has 4 steps of 16 samples"),
        ("--ranks=5", "5 ranks but 4 lanes"),
        ("--first-ranks=5", "5 ranks but 4 lanes"),
    ],
)
def test_impossible_steps_are_a_usage_error(
    folder: Path, flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--order", flags, "--data.lanes", "4")
    assert run("inspect", folder / "config.yaml", *arguments) == 2
    assert message in capsys.readouterr().err


def test_flags_that_select_steps_need_the_order(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", folder / "config.yaml", "--step", "3") == 2
    assert "give --order too" in capsys.readouterr().err


def test_without_the_flag_the_dataset_is_described(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", folder / "config.yaml") == 0
    assert "train: 72 samples" in capsys.readouterr().out
