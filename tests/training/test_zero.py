"""Adam's state under ZeRO 1 and 2 on real DeepSpeed engines, restored on any number of ranks."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.rank_processes import run_ranks

pytestmark = pytest.mark.deepspeed


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of four steps: `S-2` in one go on two ranks, the others cut after two."""
    folder = tmp_path_factory.mktemp("zero")
    two = [f":{s}:half{s}" for s in (0, 1, 2)]
    two += [f"half{s}:{s}:end{s}" for s in (0, 1, 2)]  # the same stage goes on
    two += ["half1:0:from1to0", "half0:2:from0to2"]
    run_ranks("tests.training.zero_worker", str(folder), *two, world_size=2)
    one = ["half1:1:one1", "half2:0:one0"]
    run_ranks("tests.training.zero_worker", str(folder), *one, world_size=1)
    run_ranks("tests.training.zero_worker", str(folder), "half1:2:three2", world_size=3)
    return folder


def load(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def test_all_stages_save_the_same_state(kept: Path) -> None:
    plain = load(kept, "half0")
    assert {"a:conv.weight.exp_avg", "a:bn.bias.exp_avg_sq", "a:table.weight.step"} <= set(plain)
    for stage in (1, 2):
        found = load(kept, f"half{stage}")
        assert found.keys() == plain.keys()
        for name, value in plain.items():
            torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("name", ["end1", "end2", "from1to0", "from0to2", "one1", "one0", "three2"])
def test_training_continues_with_any_stage_and_number_of_ranks(kept: Path, name: str) -> None:
    expected, found = load(kept, "end0"), load(kept, name)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)
    moved = load(kept, "half0")
    assert not torch.allclose(moved["m:conv.weight"], found["m:conv.weight"], atol=1e-3)
