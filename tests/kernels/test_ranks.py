"""A global batch cut over real processes, in any way: the same draw, losses and gradients."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.loss_batches import FUSED, oracle_mask, plain
from tests.fixtures.rank_processes import run_ranks
from tests.kernels.rank_worker import (
    NUM_IGNORE,
    SPLITS,
    features,
    global_case,
    global_loss,
    losses_of,
    rows_of,
    small_model,
)
from vlal_dist.kernels.arguments import MODES

pytestmark = pytest.mark.skipif(not FUSED, reason="no C++ compiler")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def by_rank(request, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    out: Path = tmp_path_factory.mktemp("ranks")
    run_ranks("tests.kernels.rank_worker", str(out), world_size=request.param)
    return [load_file(out / f"{rank}.safetensors") for rank in range(request.param)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", SPLITS)
def test_rows_have_the_bits_of_one_process(by_rank, split, mode):
    alone = losses_of(global_case(), mode)
    order = torch.cat([rows_of(split, rank, len(by_rank)) for rank in range(len(by_rank))])
    assert order.sort().values.tolist() == list(range(len(order)))
    parts = [{name: rank[f"{split}.{mode}.{name}"] for name in alone} for rank in by_rank]
    for name in ("losses", "gradient", "drawn"):
        whole = torch.cat([part[name] for part in parts])
        wanted = alone[name][order]
        assert whole.shape == wanted.shape
        assert plain(whole).numpy().tobytes() == plain(wanted).numpy().tobytes(), name
    assert torch.equal(sum(part["counts"] for part in parts), alone["counts"])
    total = sum(part["sums"] for part in parts)
    torch.testing.assert_close(total, alone["sums"], rtol=1e-14, atol=0)


@pytest.mark.parametrize("split", SPLITS)
def test_ranks_draw_what_the_readable_draw_does(by_rank, split):
    case = global_case()
    wanted = oracle_mask(case, num_ignore=NUM_IGNORE)
    assert case.row_weight is not None
    wanted[case.row_weight == 0] = False  # rows without weight are skipped, their draw included
    for rank, found in enumerate(by_rank):
        picked = rows_of(split, rank, len(by_rank))
        for row, ids in zip(picked, found[f"{split}.draw.drawn"].tolist(), strict=True):
            assert [a for a in ids if a >= 0] == wanted[row].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("split", SPLITS)
def test_gradients_of_wrapped_models_are_those_of_one_process(by_rank, split, kind):
    model = small_model()
    global_loss(model, global_case(), features()).backward()
    for rank in by_rank:
        for name, parameter in model.named_parameters():
            found, wanted = rank[f"{split}.{kind}.{name}"], parameter.grad
            assert (found - wanted).norm() <= 1e-6 * wanted.norm()
            assert torch.equal(found, by_rank[0][f"{split}.{kind}.{name}"])
